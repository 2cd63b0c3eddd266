"""Kill training runs, resume them, and compare them with a run that was left alone.

    python assets/kill.py                   # tiny, twelve steps, a SIGKILL at each named moment
    python assets/kill.py soak              # 2,000 steps, a checkpoint every 50, 20 SIGKILLs
    python assets/kill.py soak 100 5 10     # 100 steps, 5 SIGKILLs, a checkpoint every 10

A resumed run must have the same adapter, the same metrics and the same files, and must need no more
memory and disk. Works where there is os.fork, on a CPU.
"""
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"            # a fork copies one thread and no pool of them
import transformers  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as ev  # noqa: E402
import folora  # noqa: E402
import train_math  # noqa: E402

ARGUMENTS = ("--max-steps 12 --batch-size 8 --micro-batch-size 4 --max-samples 64 --log-every 3 "
             "--rank 8 --basis-rank 16 --calibration-samples 4 --calibration-max-tokens 130 "
             "--task-samples 8 --eval-samples 4 --compare no --tasks facts,drift").split()
TOKENIZER = transformers.PreTrainedTokenizerBase
# The moment: a function and which of its calls is the last, or a file and which of its versions is
# cut in half, under its temporary name.
MOMENTS = {
    "config.json half written": ("config.json", 1),
    "held_out.json half written": ("held_out.json", 1),
    "untouched.json half written": ("untouched.json", 1),
    "calibration.json half written": ("calibration.json", 1),
    "in the eigenproblems": (folora, "decompose", 1),
    "prepared.pt half written": ("prepared.pt", 1),
    "in the first step": (train_math, "gradients", 1),
    "in step 8": (train_math, "gradients", 8),
    "metrics.jsonl half written": ("metrics.jsonl", 2),
    "first checkpoint.pt half written": ("checkpoint.pt", 1),
    "last checkpoint.pt half written": ("checkpoint.pt", 4),
    "adapter/ without its tokenizer": (TOKENIZER, "save_pretrained", 1),
    "in the last scoring": (ev, "evaluate", 2),
    "summary.json half written": ("summary.json", 1),
    "before the left-over files go": (Path, "unlink", 1),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(owner, name, call):
    """Make the call-th call of owner.name this process's last."""
    real, calls = getattr(owner, name), itertools.count(1)
    setattr(owner, name, lambda *args, **kwargs: die() if next(calls) == call
            else real(*args, **kwargs))


def die_writing(name, version):
    """Leave half of a file's version, under its temporary name."""
    replace, versions = Path.replace, itertools.count(1)

    def replace_or_die(path, final):
        if Path(final).name == name and next(versions) == version:
            os.truncate(path, path.stat().st_size // 2)
            die()
        return replace(path, final)

    Path.replace = replace_or_die


def start(arguments, moment=()):
    """The process id of a copy of this process that trains, and dies at the moment."""
    pid = os.fork()
    if pid > 0:
        return pid
    try:
        if moment:
            (die_in if len(moment) == 3 else die_writing)(*moment)
        train_math.main(arguments)
        os._exit(0)
    finally:
        os._exit(1)


def killed(pid):
    """Whether the process was killed, and its peak memory in MB."""
    _, status, usage = os.wait4(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, usage.ru_maxrss >> 10


def result(out):
    """What must be the same: the metrics, the adapter's bytes, the names of the files."""
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    compared = ("metrics.jsonl", "adapter/adapter_model.safetensors")
    return [(out / name).read_bytes() for name in compared], files


def soak(folder, steps=2000, kills=20, every=50):
    """Kill a run at random moments. Its result, its disk and its memory must not change."""
    out, disk, memory = folder / "killed", [], []
    arguments = [*ARGUMENTS, "--max-steps", str(steps), "--log-every", str(every)]
    arguments, log = [*arguments, "--out", str(out)], out / "metrics.jsonl"
    for kill in range(1, kills + 1):
        pid, target = start(arguments), kill * steps // (kills + 1) + random.randrange(every)
        while not log.exists() or log.read_text().count("\n") < min(target, steps - 1):
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        memory.append(killed(pid)[1])
        disk.append(sum(path.stat().st_size for path in out.rglob("*")) >> 20)
        print(f"kill {kill} in step {target}: {disk[-1]} MB of disk, {memory[-1]} MB of memory")
    train_math.main(arguments)
    train_math.main([*arguments, "--out", str(folder / "whole")])
    assert result(out) == result(folder / "whole")
    assert max(disk) <= 1.1 * disk[0] + 1 and max(memory) <= 1.1 * memory[0]


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if sys.argv[1:2] == ["soak"]:
            return soak(folder, *map(int, sys.argv[2:]))
        train_math.main([*ARGUMENTS, "--out", str(folder / "whole")])
        for number, (moment, when) in enumerate(MOMENTS.items()):
            out = folder / str(number)
            arguments = [*ARGUMENTS, "--out", str(out)]
            assert killed(start(arguments, when))[0], f"{moment}: never came"
            train_math.main(arguments)
            assert result(out) == result(folder / "whole"), f"{moment}: not the same"
            print(f"{moment}: the same", flush=True)


if __name__ == "__main__":
    main()
