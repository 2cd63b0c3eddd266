"""Fine-tune a language model on maths with FoLoRA, and show what it learned and what it kept.

    python train_math.py                              # the embedded model, on a CPU
    python train_math.py --model Qwen2.5-1.5B         # GSM8K from the hub, on a CUDA GPU
    torchrun --nproc-per-node 4 train_math.py --model Qwen2.5-1.5B           # on four GPUs
    python train_math.py --model DIR --data FILE.jsonl --tasks gsm8k=TEST.jsonl,drift        # local

The run is kept in --out: config.json (all options, versions), metrics.jsonl, summary.json (scores,
seconds of each stage, peak memory) and merged/ (a plain Hugging Face checkpoint). The same command
with the same --out resumes an interrupted run and ends with the same numbers.
A line of metrics.jsonl:

    step           optimiser steps done
    loss           mean NLL of the batch's response tokens before the step, in nat
    lr             learning rate of A at that step
    grad_norm      norm of all gradients together, before it is clipped at 1
    tokens_per_s   tokens trained on, without padding
    drift          KL(untouched || now) in nat per token, at 256 positions spread over held-out text
                   that the untouched model wrote; measured every --log-every steps, else null
"""
import argparse
import errno
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

if int(os.environ.get("RANK", 0)):       # one bar for all processes: tqdm reads this when imported
    os.environ["TQDM_DISABLE"] = "1"

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import eval as ev
import folora

# What --preset and --model tiny set, where the command line does not.
PRESETS = {"tuned": dict(lam=1.0, s_min=0.0, basis_rank=128, zero_start=1, lr=3e-3,
                         calibration_samples=256),
           "paper": dict(lam=1.0, s_min=0.3, basis_rank=0, zero_start=0, lr=3e-4,
                         calibration_samples=2000)}
TINY = dict(data=str(ev.TINY / "train.jsonl"), rank=32, epochs=2, max_samples=3200, batch_size=32,
            micro_batch_size=8, max_length=256, calibration_samples=256, calibration_max_tokens=224,
            passes=1, eval_samples=200)
TINY_LR = {"tuned": 1.2e-2, "paper": 6e-3}
RESUME_MAY_CHANGE = {"out", "micro_batch_size", "gradient_checkpointing", "passes", "compare"}


# ---- options -------------------------------------------------------------------------------------

def at_least(kind, low):
    """An argparse type: a finite number of this kind that is not below `low`."""
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be finite and at least {low}, not {text}")
        return value
    return number


COUNT, NATURAL, RATE, POSITIVE = (at_least(kind, low) for kind, low in (
    (int, 1), (int, 0), (float, 0), (float, 1e-9)))
OPTIONS = [       # flag, type or choices, default, help and whose the default is
    ("--model", str, "tiny", "directory, hub id or short name such as Qwen2.5-1.5B [ours]"),
    ("--method", ("folora", "lora"), "folora", "lora is plain LoRA [the paper's]"),
    ("--preset", tuple(PRESETS), "tuned", "FoLoRA's setting: tuned is ours, paper the paper's"),
    ("--compare", ("lora", "no"), "no", "lora: train LoRA as well; so with tiny [ours]"),
    ("--data", str, "openai/gsm8k", "hub id or .jsonl of questions and answers [ours]"),
    ("--rank", COUNT, 128, "adapter rank [the paper's]"),
    ("--alpha", POSITIVE, None, "scaling alpha / rank, none: 1 [ours]"),
    ("--lr", RATE, None, "learning rate [ours; the paper has 2e-5, over 781 steps]"),
    ("--lam", POSITIVE, None, "lambda, sharpness of the gate: more forgets less [the paper's]"),
    ("--s-min", RATE, None, "floor of the gate [ours]"),
    ("--basis-rank", NATURAL, None, "directions in which A may move, 0: all [ours]"),
    ("--zero-start", NATURAL, None, "1: B starts at 0; 0: at the paper's residual [ours]"),
    ("--tau", POSITIVE, 0.01, "ridge, relative to C_pre's mean eigenvalue [ours]"),
    ("--epochs", COUNT, 3, "passes over the data [ours; the paper has 1]"),
    ("--max-steps", COUNT, None, "so many steps, whatever --epochs says [ours]"),
    ("--max-samples", COUNT, 100_000, "the first so many examples [the paper's]"),
    ("--batch-size", COUNT, 128, "examples a step [the paper's]"),
    ("--micro-batch-size", COUNT, 16, "examples a forward pass: less memory [the paper's]"),
    ("--max-length", COUNT, 512, "tokens an example [the paper's]"),
    ("--calibration", str, "self", "text not to forget: self, sampled from the model, or a hub "
     "id or .jsonl with a field text [the paper's]"),
    ("--calibration-samples", COUNT, None, "texts behind C_pre [ours]"),
    ("--calibration-max-tokens", COUNT, 512, "tokens of such a text, at most [the paper's]"),
    ("--calibration-model", str, None, "larger model that writes them [the paper's, on Qwen3]"),
    ("--task-samples", COUNT, 256, "training examples behind C_task [the paper's]"),
    ("--passes", COUNT, 2, "read these texts so often, each time for a share of the layers: less "
     "memory [ours]"),
    ("--gradient-checkpointing", NATURAL, None, "1: less memory, more time; so on a GPU [ours]"),
    ("--tasks", str, None, "what to score, as for eval.py; none: its default [ours]"),
    ("--eval-samples", COUNT, 500, "rows a task [ours]"),
    ("--log-every", COUNT, 10, "steps between checkpoints and measurements of drift [ours]"),
    ("--seed", NATURAL, 0, "of calibration text, adapters and the order of the data [ours]"),
    ("--dtype", ("auto", *ev.DTYPES), "auto", "auto: bfloat16 on a GPU, else float32 [ours]"),
    ("--device", str, "auto", "cuda, cpu, or auto: cuda if there is one [ours]"),
    ("--out", str, None, "the run's directory; none: runs/<model>-<method>-<time> [ours]")]


def lora_lr(options):
    """A good learning rate of plain LoRA, whatever FoLoRA's is."""
    return 4e-3 if ev.is_tiny(options.model) else 1e-3


def parse_options(arguments=None):
    """What the command line says, else what tiny says, else the preset, else the default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"--preset sets {PRESETS}\n--model tiny sets {TINY}, learning rates {TINY_LR}")
    for flag, kind, default, text in OPTIONS:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        by_preset = [f"{preset}: {values[flag[2:].replace('-', '_')]}"
                     for preset, values in PRESETS.items() if flag[2:].replace("-", "_") in values]
        shown = "; ".join(by_preset) or f"default {default}"
        parser.add_argument(flag, default=default, help=f"{text} ({shown})", **how)
    first = parser.parse_args(arguments)
    parser.set_defaults(**PRESETS[first.preset])
    if ev.is_tiny(first.model):
        parser.set_defaults(**TINY, lr=TINY_LR[first.preset], compare="lora")
    if first.method == "lora":
        parser.set_defaults(lr=lora_lr(first))
    options = parser.parse_args(arguments)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    options.out = options.out or f"runs/{Path(options.model).name}-{options.method}-{stamp}"
    if options.tasks is None:
        options.tasks = ev.default_tasks(options.model)
    if options.s_min > 1 or options.zero_start > 1:
        parser.error("--s-min and --zero-start are at most 1")
    if options.seed in (ev.HELD_OUT_SEED, ev.HELD_OUT_SEED + 1):
        parser.error(f"--seed {options.seed} is reserved for the held-out text: choose another")
    return options


# ---- the run's directory -------------------------------------------------------------------------

def check_run(options):
    """One clear line if the run's directory belongs to another run."""
    out, mine = Path(options.out), vars(options)
    if not (out / "config.json").exists():
        return
    theirs = json.loads((out / "config.json").read_text()).get("options")
    if theirs is None:
        sys.exit(f"{out} holds something else (a config.json that is no run's): give another --out")
    kind = lambda value: value.partition(":")[0] if isinstance(value, str) else value     # cuda:1
    differ = [f"--{name.replace('_', '-')} {theirs.get(name)}" for name in mine
              if name not in RESUME_MAY_CHANGE and kind(mine[name]) != kind(theirs.get(name))]
    if differ:
        sys.exit(f"{out} holds a run with {', '.join(differ)}: give the same options to resume it, "
                 "or another --out")


def open_run(options):
    """The run's directory, new or to be resumed; config.json written."""
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        sys.exit(f"--out {out} cannot be made: {error.strerror}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    config = {"options": vars(options), "versions": versions}
    (out / "config.json").write_text(json.dumps(config, indent=1))


def save(value, path):
    """torch.save that leaves either the old file or the new one, whenever it is interrupted."""
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def check_disk(options, model, bases):
    """Stop now rather than hours later: the run writes its bases, checkpoints, and the model."""
    widths = [m.in_features for m in folora.find_targets(model, rank=options.rank).values()]
    size = sum(4 * d * min(d, options.basis_rank or d) for d in widths) if bases else 0   # at most
    size += sum(p.numel() * p.element_size() for p in model.parameters())
    need, free = size + 48 * options.rank * sum(widths), shutil.disk_usage(options.out).free
    if free < need:
        sys.exit(f"{options.out}: the run writes about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                 "are free: give an --out on a larger disk")


# ---- preparation ---------------------------------------------------------------------------------

@contextmanager
def stage(seconds, name):
    """Time a stage into seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 2)


def calibration_texts(options, model, tokenizer):
    """This process's share of the token lists behind C_pre."""
    longest = options.calibration_max_tokens
    if options.calibration != "self":
        texts = ev.given_texts(options.calibration, options.calibration_samples)
        return [tokenizer(text)["input_ids"][:longest] for text in ev.share(texts)]
    if options.calibration_model:
        model, theirs = ev.load_model(options.calibration_model, model.device, model.dtype)
        if theirs.get_vocab() != tokenizer.get_vocab():
            sys.exit(f"--calibration-model {options.calibration_model} has another tokenizer than "
                     f"{options.model}: its text would not be the model's")
    count = len(ev.share(range(options.calibration_samples)))
    bar = tqdm(total=count, desc="calibration text", unit="text")
    seed = options.seed + 10 ** 6 * ev.process()[0]                  # each process writes its own
    texts = folora.sample_calibration(model, tokenizer, count, min(128, longest), longest,
                                      seed=seed, progress=bar.update)
    return [text.tolist() for text in texts]


def covariances(options, model, sequences, name, targets=folora.TARGET_MODULES):
    """Covariances over token lists, with a bar; for C_pre and C_task alike."""
    batches = ev.by_length(sequences, options.micro_batch_size)
    inputs = (ev.collate(batch, model.device) for batch in tqdm(batches, desc=name))
    return folora.collect_covariances(
        model, ({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"],
                 "use_cache": False, "logits_to_keep": 1} for b in inputs), targets)


def solve(options, model, texts, examples, seconds):
    """FoLoRA's bases, on the host: folora.prepare in --passes parts, to hold fewer covariances."""
    names, bases = list(folora.find_targets(model)), []
    size = -(-len(names) // options.passes)                          # neighbours share an input
    task = [example["ids"] for example in ev.share(examples[:options.task_samples])]
    for some in (names[i:i + size] for i in range(0, len(names), size)):
        with stage(seconds, "covariances"):
            C_pre = covariances(options, model, texts, "C_pre", some)
            C_task = covariances(options, model, task, "C_task", some)
        with stage(seconds, "eigenproblems"):
            bar = tqdm(total=len({id(C) for C in C_pre.values()}), desc="eigenproblems")
            solved = folora.decompose(C_pre, C_task, options.rank, options.tau,
                                      options.basis_rank or None, progress=bar.update)
        bases += [{key: t.cpu() if torch.is_tensor(t) else t for key, t in basis.items()}
                  for basis in solved]
        del solved                                                   # the next part needs the room
    return bases


def add_adapters(options, model, bases=None):
    """Adapters in place; returns the optimiser. FoLoRA needs `bases` from solve."""
    if options.method == "folora":
        return folora.attach(model, bases, options.lr, options.alpha, options.lam, options.s_min,
                             bool(options.zero_start))
    model.requires_grad_(False)
    for name, base in folora.find_targets(model, rank=options.rank).items():
        model.set_submodule(name, folora.LoRALinear(base, options.rank, options.alpha))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr,
                             weight_decay=0.0)


# ---- training ------------------------------------------------------------------------------------

def schedule(step, steps, warmup=0.03):
    """Appendix B: the learning rate rises over a share of the steps, then falls on a cosine."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def data_order(count, batch_size, epochs, max_steps, seed):
    """[indices of each step's batch]; every epoch is a permutation, without an incomplete batch."""
    generator = torch.Generator().manual_seed(seed)
    steps = max_steps or max(1, epochs * count // batch_size)
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[:steps * batch_size].view(steps, batch_size).tolist()


class SummedNLL(torch.nn.Module):
    """A forward pass that ends in the loss: what DistributedDataParallel can wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, examples):
        return ev.summed_nll(self.model, ev.collate(examples, self.model.device))


def train_step(summed_nll, optimizer, batch, micro_batch_size):
    """One step on a list of examples: (loss, gradient norm, tokens). The loss is the mean over all
    labels of the batch, of which each process and each micro-batch has a part."""
    labels, world = sum(label != -100 for e in batch for label in e["labels"][1:]), ev.process()[1]
    micros, total = ev.by_length(ev.share(batch), micro_batch_size, lambda e: len(e["ids"])), 0.0
    for micro in micros:
        last = micro is micros[-1]
        with nullcontext() if world == 1 or last else summed_nll.no_sync():
            loss = summed_nll(micro) / labels
            (loss * world).backward()                # DDP averages over processes; we want the sum
        total += loss.item()
    total = ev.mean(total, 1 / world)                # the sum over processes
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    if not math.isfinite(total) or not math.isfinite(norm):
        raise FloatingPointError(f"loss {total}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return total, norm, sum(len(e["ids"]) for e in batch)


class Probe:
    """Drift while training: KL from the untouched model, whose log-probabilities are kept."""

    @torch.inference_mode()
    def __init__(self, model, texts, positions=256):
        self.batch = ev.collate([t.tolist() for t in texts], model.device)
        for labels, text in zip(self.batch["labels"], texts):
            kept = torch.linspace(1, len(text) - 1, positions // len(texts)).long()     # not BOS
            labels[~torch.isin(torch.arange(len(labels)), kept).to(labels.device)] = -100
        self.before = ev.logits_of(model, ev.label_states(model, self.batch)[0]).log_softmax(-1)

    @torch.inference_mode()
    def __call__(self, model):
        states, _ = ev.label_states(model, self.batch)
        return ev.summed_kl(self.before, model, states) / len(self.before)


def checkpoint(optimizer, model, step):
    """What a resumed run needs beside prepared.pt, which has the bases."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k not in ("basis", "gate")}
              for g in state["param_groups"]]
    adapters = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    return {"step": step, "adapters": adapters,
            "optimizer": {"state": state["state"], "param_groups": groups}}


def restore(optimizer, model, saved):
    """Inverse of checkpoint; returns the number of steps that were done."""
    kept = [{key: group[key] for key in ("basis", "gate") if key in group}
            for group in optimizer.param_groups]
    torch.optim.Optimizer.load_state_dict(optimizer, saved["optimizer"])         # moments only
    for group, bases in zip(optimizer.param_groups, kept):
        group.update(bases)
    model.load_state_dict(saved["adapters"], strict=False)
    return saved["step"]


def recompute(model, on):
    """Gradient checkpointing. Layers take `training` for their sign; what is inside them stays in
    evaluation mode, without dropout."""
    if on:                                           # reentrant, frozen embeddings cut the gradient
        model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = bool(on) and hasattr(module, "gradient_checkpointing")


def train(options, model, optimizer, examples, probe, out):
    """The loop: metrics.jsonl, checkpoints, and a bar."""
    batches = data_order(len(examples), options.batch_size, options.epochs, options.max_steps,
                         options.seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    saved, log, (process, world) = out / "checkpoint.pt", out / "metrics.jsonl", ev.process()
    done = 0
    if saved.exists():
        done = restore(optimizer, model, torch.load(saved, map_location=model.device))
    if process == 0:                                 # lines after the checkpoint are written again
        lines = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
        log.write_text("".join(lines))
    recompute(model, options.gradient_checkpointing)
    loss_of = SummedNLL(model)
    if world > 1:
        loss_of = torch.nn.parallel.DistributedDataParallel(loss_of)
    bar = tqdm(range(done, len(batches)), desc=f"train {options.method}", initial=done,
               total=len(batches))
    for step in bar:
        start = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step, len(batches))
        batch = [examples[i] for i in batches[step]]
        loss, norm, tokens = train_step(loss_of, optimizer, batch, options.micro_batch_size)
        if process:
            continue                                 # the first process keeps the books
        speed = tokens / (time.perf_counter() - start)
        due = (step + 1) % options.log_every == 0 or step + 1 == len(batches)
        line = {"step": step + 1, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
                "grad_norm": norm, "tokens_per_s": round(speed),
                "drift": probe(model) if due else None}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{loss:.3f}")
        if due:
            save(checkpoint(optimizer, model, step + 1), saved)
    recompute(model, False)


# ---- the run -------------------------------------------------------------------------------------

def resolve(options):
    """What "auto" means here; one clear line if --out belongs to another run."""
    device, dtype = ev.pick_device(options.device, options.dtype)
    options.device, options.dtype = str(device), str(dtype).removeprefix("torch.")
    if options.gradient_checkpointing is None:
        options.gradient_checkpointing = int(device.type == "cuda")
    check_run(options)


def load(options):
    """(model, tokenizer, encoded examples, tasks); what needs no download is checked first."""
    ev.resolve_model(options.model)
    tasks = ev.load_tasks(options.tasks, options.eval_samples)
    if options.calibration != "self":
        ev.given_texts(options.calibration, options.calibration_samples)
    config = "main" if options.data == "openai/gsm8k" else None
    rows = ev.read_rows(options.data, config, limit=options.max_samples)
    pairs = ev.to_pairs(rows, options.data)
    device = torch.device(options.device)
    model, tokenizer = ev.load_model(options.model, device, ev.DTYPES[options.dtype])
    folora.find_targets(model, rank=options.rank)
    return model, tokenizer, ev.encode_all(tokenizer, pairs, options.max_length), tasks


def start_processes(options):
    """Join torchrun's processes: each with its own GPU, all with one --out."""
    # DDP imports it. After the group is made, gloo's threads may then abort at exit.
    import torch.distributed.nn  # noqa: F401
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))      # one may sample for longer
    world, local = ev.process()[1], int(os.environ["LOCAL_RANK"])
    for name in ("batch_size", "calibration_samples", "task_samples", "eval_samples"):
        if getattr(options, name) < world:
            sys.exit(f"--{name.replace('_', '-')} must be at least {world}, one for each process")
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        options.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    out = [options.out]                              # it may hold the time
    dist.broadcast_object_list(out)
    options.out, = out


def prepared(options, model, tokenizer, examples, tasks, before, seconds):
    """{"before": the untouched model's scores, "bases"}, from prepared.pt or written to it."""
    path = Path(options.out) / "prepared.pt"
    exists = path.exists()
    ev.mean(0, 1)                                    # all wait for all: one will write that file
    if exists:
        state = torch.load(path, map_location="cpu")
        seconds.update(state["seconds"])
        return state
    with stage(seconds, "score untouched"):
        before = before or ev.evaluate(model, tokenizer, tasks)
    bases = None
    if options.method == "folora":
        with stage(seconds, "calibration text"):
            texts = calibration_texts(options, model, tokenizer)
        bases = solve(options, model, texts, examples, seconds)
    state = {"before": before, "bases": bases, "seconds": seconds}
    if ev.process()[0] == 0:
        save(state, path)
    return state


def run(options, before=None):
    """One method, all stages: {"untouched": its scores, or `before`, method: scores}."""
    out, first, seconds = Path(options.out), ev.process()[0] == 0, {}
    resolve(options)
    if (out / "summary.json").exists():
        return json.loads((out / "summary.json").read_text())["scores"]
    model, tokenizer, examples, tasks = load(options)
    if first:
        open_run(options)
        check_disk(options, model, options.method == "folora")
    with stage(seconds, "held-out text"):
        texts = ev.held_out(model, tokenizer, min(256, options.calibration_max_tokens))
    state = prepared(options, model, tokenizer, examples, tasks, before, seconds)
    probe = Probe(model, texts)
    torch.manual_seed(options.seed)
    optimizer, before = add_adapters(options, model, state.pop("bases")), state["before"]
    with stage(seconds, "train"):
        train(options, model, optimizer, examples, probe, out)
    model = folora.merge(model)
    if first:
        model.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    with stage(seconds, "score tuned"):
        untouched = None
        if "drift" in tasks:
            untouched, _ = ev.load_model(options.model, model.device, model.dtype)
        after = ev.evaluate(model, tokenizer, tasks, untouched, texts)
    scores = {"untouched": {**before, **ev.summarise(before, before)},
              options.method: {**after, **ev.summarise(after, before)}}
    if first:
        finish(out, scores, seconds, peak_memory(model.device))
    return scores


def finish(out, scores, seconds, peak):
    """summary.json; what only a resumed run would need goes."""
    summary = {"scores": scores, "seconds": seconds, "peak_memory_gb": round(peak, 3)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    for name in ("prepared.pt", "checkpoint.pt"):
        (out / name).unlink(missing_ok=True)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"{out}: {spent}; peak memory {peak:.1f} GB")


def peak_memory(device):
    """GB: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def whole_run(options, arguments):
    """The run, and with --compare lora the same with LoRA; the first process prints the table."""
    if "LOCAL_RANK" in os.environ:
        start_processes(options)
    scores = run(options)
    if options.compare == "lora" and options.method == "folora":
        lora = ["--method", "lora", "--lr", str(lora_lr(options)), "--out", f"{options.out}/lora"]
        scores.update(run(parse_options([*arguments, *lora]), scores["untouched"]))
    if ev.process()[0] == 0:
        print(ev.table(scores))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments)
    out, again = Path(options.out), f"the same command with --out {options.out} goes on"
    try:
        whole_run(options, arguments)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {again} from where it was last saved")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("out of memory: lower --micro-batch-size, then --max-length or --rank")
    except FloatingPointError as error:
        sys.exit(f"not a finite number: {error}; {out} keeps the last checkpoint; lower --lr")
    except ValueError as error:                      # folora's own messages: one line each
        sys.exit(str(error))
    except (OSError, RuntimeError) as error:         # torch.save and safetensors have own types
        if "the screen rejects" in str(error):       # sample_calibration gave up
            sys.exit(str(error))
        free = shutil.disk_usage(out if out.exists() else ".").free
        if getattr(error, "errno", 0) != errno.ENOSPC and free > 2 ** 20:
            raise
        sys.exit(f"the disk of {out} is full: free some space, then {again}")


if __name__ == "__main__":
    main()
