"""What FoLoRA costs beside LoRA in training: the time of a step, and the optimiser's memory.

    python assets/bench.py --model SMOLLM2_DIR
    python assets/bench.py --model tiny --quick      # small and once: does the script run?

The methods' runs alternate. assets/bench.json keeps the median, the least and the greatest of the
repetitions. Times belong to their machine; the ratios are what to compare.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as ev  # noqa: E402
import folora  # noqa: E402
import train_math  # noqa: E402

METHODS = {"LoRA": None, "FoLoRA, k = 64": 64, "FoLoRA, k = 128": 128, "FoLoRA, k = all": 0}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Each of Qwen3-1.7B's 28 blocks has four inputs: their widths, and those of what reads them.
QWEN3 = [(2048, (2048, 1024, 1024)), (2048, (2048,)), (2048, (6144, 6144)), (6144, (2048,))] * 28


def row(what, values, paper=None, bar=None):
    """One row: measured values, the paper's value, and the bar that FoLoRA should reach."""
    return {"row": what, "median": statistics.median(values), "least": min(values),
            "greatest": max(values), "n": len(values), "paper": paper, "bar": bar}


def seconds(work):
    """The time that work() takes, including what it leaves in a GPU's queue."""
    start = time.perf_counter()
    work()
    torch.get_device_module(DEVICE).synchronize()
    return time.perf_counter() - start


def alternate(works, repetitions):
    """[[seconds of each repetition] of each work], run as A B A B, after a round that does not
    count."""
    rounds = [[seconds(work) for work in works] for _ in tqdm(range(1 + repetitions))]
    return list(zip(*rounds[1:]))


def adapted(model, k, rank, batch, length, micro):
    """(a function that trains one step, its optimiser). Tokens are random, since the cost does not
    depend on them. LoRA (k None) gets the fastest AdamW that torch has for the device."""
    ids = torch.randint(10, model.config.vocab_size, (batch, length))
    if k is None:
        options = train_math.parse_options(["--method", "lora", "--rank", str(rank)])
        trained = train_math.add_adapters(options, model).param_groups[0]["params"]
        optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0, foreach=not CUDA, fused=CUDA)
    else:
        inputs = [{"input_ids": ids[:8].to(DEVICE)}]
        optimizer = folora.prepare(model, inputs, inputs, 1e-4, rank, basis_rank=k or None)
    half = length // 2
    texts = [{"ids": text, "labels": [-100] * half + text[half:]} for text in ids.tolist()]

    def step():
        train_math.gradients(model, optimizer, texts, micro)
        optimizer.step()
        optimizer.zero_grad()
    return step, optimizer


def step_rows(load, name, repetitions, rank, batch, length, micro=8):
    """The whole training step, and the optimiser's part of it. `load` returns a new model."""
    steps, optimizers = zip(*(adapted(load(), k, rank, batch, length, micro)
                              for k in METHODS.values()))
    lora, *whole = alternate(steps, repetitions)
    for p in (p for o in optimizers for group in o.param_groups for p in group["params"]):
        p.grad = torch.randn_like(p)
    adam, *own = alternate([optimizer.step for optimizer in optimizers], repetitions)
    what = f"step, {name}, rank {rank}, {batch} x {length} tokens"
    yield row(f"training {what}: LoRA, s", lora)
    for method, times, parts in zip(list(METHODS)[1:], whole, own):
        ratios = [a / b for a, b in zip(times, lora)]
        shares = [(a - b) / statistics.median(lora) for a, b in zip(parts, adam)]
        yield row(f"training {what}: {method} / LoRA", ratios, 1.016, 1.003)
        yield row(f"optimiser {what}: {method} - LoRA as share of LoRA's training step", shares)


def memory_rows(rank=128):
    """Bases in bfloat16 and the two moments in float32, computed from the layers' shapes."""
    for method, k in METHODS.items():
        size = 0
        for d_in, outputs in QWEN3:
            moved = min(k or d_in, d_in)                   # a moment of A is (rank, moved)
            size += 0 if k is None else 2 * moved * d_in   # V is (d_in, moved)
            size += sum(2 * 4 * rank * (moved + d_out) for d_out in outputs)
        yield row(f"bases and moments by formula, Qwen3-1.7B, r={rank}: {method}, GB", [size / 1e9])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="small, once, nothing written")
    options = parser.parse_args()
    name, size = Path(options.model).name, (1, 8, 4, 32) if options.quick else (3, 64, 16, 200)
    load = lambda: ev.load_model(options.model, DEVICE, torch.bfloat16)[0]
    rows = [*step_rows(load, name, *size), *memory_rows()]
    print("| what | median (least to greatest, n) | paper | bar |\n|---|---|---|---|")
    for r in rows:
        spread = f"{r['median']:.4g} ({r['least']:.4g} to {r['greatest']:.4g}, {r['n']})"
        print(f"| {r['row']} | {spread} | {r['paper'] or ''} | {r['bar'] or ''} |")
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    results = {"model": name, "torch": torch.__version__, "device": device, "rows": rows}
    if not options.quick:
        Path(__file__).with_name("bench.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
