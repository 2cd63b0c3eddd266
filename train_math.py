"""Fine-tune a language model on maths with FoLoRA, and show what it learned and what it kept.

    python train_math.py                              # the embedded model, on a CPU
    python train_math.py --model Qwen2.5-1.5B         # GSM8K from the hub, on a CUDA GPU
    torchrun --nproc-per-node 4 train_math.py --model Qwen2.5-1.5B           # on four GPUs
    python train_math.py --model DIR --data FILE.jsonl --tasks gsm8k=TEST.jsonl,drift        # local

The run is kept in --out: config.json (all options, versions), metrics.jsonl, summary.json (scores),
adapter/ (for PEFT) and, with --merge 1, merged/ (a plain Hugging Face checkpoint). The same command
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
import fcntl
import functools
import json
import math
import os
import pickle
import sys
import time
from contextlib import contextmanager
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

ev.process, ev.share, ev.mean = (lambda: (0, 1)), list, lambda total, count: total / count   # TODO

# What --preset and --model tiny set, where the command line does not.
PRESETS = {"tuned": dict(lam=1.0, s_min=0.0, basis_rank=128, zero_start=1, lr=3e-3,
                         calibration_samples=256),
           "paper": dict(lam=1.0, s_min=0.3, basis_rank=0, zero_start=0, lr=3e-4,
                         calibration_samples=2000)}
TINY = dict(data=str(ev.TINY / "train.jsonl"), rank=32, epochs=2, max_samples=3200, batch_size=32,
            micro_batch_size=8, max_length=256, calibration_samples=256, calibration_max_tokens=224,
            passes=1, eval_samples=200, compare="lora")
TINY_LR = {"tuned": 1.2e-2, "paper": 6e-3}
LORA_LR = {True: 4e-3, False: 1e-3}      # of plain LoRA, for tiny and for other models
RESUME_MAY_CHANGE = {"out", "micro_batch_size", "gradient_checkpointing", "passes", "compare"}
FOLORA_ONLY = {"preset", "compare", "lam", "s_min", "basis_rank", "zero_start", "tau", "passes",
               "task_samples"}
WITH_TEXTS = {"calibration", "calibration_samples", "calibration_model"}       # or with --kl
# The files of an unfinished run, and what has to be done again without them.
STAGES = {"held_out.jsonl": "the sampling of held-out text",
          "untouched.json": "the scoring of the untouched model",
          "calibration.jsonl": "the sampling of calibration text",
          "prepared.pt": "the preparation and training", "checkpoint.pt": "the training"}


# ---- options -------------------------------------------------------------------------------------

def between(kind, low, high=1e9):
    """An argparse type: a number of this kind from `low` to `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:                 # also refuses nan
            raise argparse.ArgumentTypeError(f"must be from {low} to {high:g}, not {text}")
        return value
    return number


COUNT, NATURAL, SWITCH = between(int, 1), between(int, 0), between(int, 0, 1)
RATE, POSITIVE = between(float, 0), between(float, 1e-9)
TARGETS = ",".join(folora.TARGET_MODULES)
OPTIONS = [       # flag, type or choices, default (None: see the end of --help), help, whose it is
    ("--model", str, "tiny", "directory, hub id or short name such as Qwen2.5-1.5B [ours]"),
    ("--method", ("folora", "lora"), "folora", "lora is plain LoRA [the paper's]"),
    ("--preset", tuple(PRESETS), "tuned", "FoLoRA's setting: tuned is ours, paper the paper's"),
    ("--compare", ("lora", "no"), "no", "lora: train LoRA as well; so with tiny [ours]"),
    ("--target-modules", str, TARGETS, "or all-linear: all but the output layer [the paper's]"),
    ("--data", str, "openai/gsm8k", "hub id or .jsonl of questions and answers [ours]"),
    ("--rank", COUNT, 128, "adapter rank [the paper's]"),
    ("--alpha", POSITIVE, None, "scaling alpha / rank, none: 1 [ours]"),
    ("--lr", RATE, None, "learning rate [ours; the paper has 2e-5, over 781 steps]"),
    ("--lam", POSITIVE, None, "lambda, sharpness of the gate: more forgets less [the paper's]"),
    ("--s-min", between(float, 0, 1), None, "floor of the gate [ours]"),
    ("--basis-rank", NATURAL, None, "directions in which A may move, 0: all [ours]"),
    ("--zero-start", SWITCH, None, "1: B starts at 0; 0: at the paper's residual [ours]"),
    ("--kl", RATE, 0.0, "weight of KL(untouched || now) on calibration texts in the loss [ours]"),
    ("--kl-texts", COUNT, 4, "texts a step for --kl [ours]"),
    ("--tau", POSITIVE, 0.01, "ridge, relative to C_pre's mean eigenvalue [ours]"),
    ("--epochs", COUNT, 3, "passes over the data [ours; the paper has 1]"),
    ("--max-steps", COUNT, None, "so many steps instead of --epochs [ours]"),
    ("--max-samples", COUNT, 100_000, "the first so many examples [the paper's]"),
    ("--batch-size", COUNT, 128, "examples a step [the paper's]"),
    ("--micro-batch-size", COUNT, 16, "examples a forward pass: less memory [the paper's]"),
    ("--max-length", COUNT, 512, "tokens an example [the paper's]"),
    ("--calibration", str, "self", "what not to forget: a hub id or .jsonl of texts, or self, "
     "sampled from the model [the paper's]"),
    ("--calibration-samples", COUNT, None, "texts behind C_pre [ours]"),
    ("--calibration-max-tokens", COUNT, 512, "tokens of such a text, at most [the paper's]"),
    ("--calibration-model", str, None, "larger model that writes them [the paper's, on Qwen3]"),
    ("--task-samples", COUNT, 256, "training examples behind C_task [the paper's]"),
    ("--passes", COUNT, 2, "over these texts, each for a share of the layers: less memory [ours]"),
    ("--gradient-checkpointing", SWITCH, None, "1: less memory, more time; so on a GPU [ours]"),
    ("--tasks", str, None, "what to score, as for eval.py; none: its default [ours]"),
    ("--eval-samples", COUNT, 500, "rows a task [ours]"),
    ("--log-every", COUNT, 10, "steps between checkpoints and measurements of drift [ours]"),
    ("--merge", SWITCH, 0, "1: write the merged model too [ours]"),
    ("--seed", NATURAL, 0, "of calibration text, adapters and the order of the data [ours]"),
    ("--dtype", ("auto", *ev.DTYPES), "auto", "auto: bfloat16 on a GPU, else float32 [ours]"),
    ("--device", str, "auto", "cuda, cpu, or auto: cuda if there is one [ours]"),
    ("--out", str, None, "the run's directory; none: runs/<model>-<method>-<time> [ours]")]


def parse_options(arguments=None, strict=False):
    """What the command line says, else what tiny says, else the preset, else the default. If
    `strict`, an option that the method ignores is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        epilog=f"--preset sets {PRESETS}\n--model tiny sets {TINY}, learning rates {TINY_LR}")
    parser.error = lambda message: ev.need(False, message)       # without the usage: one line
    for flag, kind, default, text in OPTIONS:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        shown = "see below" if default is None else default
        parser.add_argument(flag, help=f"{text} ({shown})", **how)
    given = vars(parser.parse_args(arguments))
    options = {flag[2:].replace("-", "_"): default for flag, _, default, _ in OPTIONS} | given
    model, method, preset = (options[name] for name in ("model", "method", "preset"))
    options |= PRESETS[preset] | {"tasks": ev.default_tasks(model)}
    options["out"] = f"runs/{Path(model).name}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    if ev.is_tiny(model):
        options |= {**TINY, "lr": TINY_LR[preset]}
    if method == "lora":
        options |= {"lr": LORA_LR[ev.is_tiny(model)], "compare": "no"}
    options = argparse.Namespace(**options | given)
    ignored = FOLORA_ONLY | (set() if options.kl else WITH_TEXTS) if method == "lora" else set()
    ignored = sorted((ignored | (set() if options.kl else {"kl_texts"})) & given.keys())
    if ignored and strict:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        parser.error(f"{flags} would be ignored here: leave it out")
    if options.seed in (ev.HELD_OUT_SEED, ev.HELD_OUT_SEED + 1):
        parser.error(f"--seed {options.seed} is reserved for the held-out text: choose another")
    return options


def resolve(options):
    """What "auto" means on this machine."""
    device, dtype = ev.pick_device(options.device, options.dtype)
    if device.index is not None:                     # a resumed run may get another GPU
        torch.cuda.set_device(device)
    options.device, options.dtype = device.type, str(dtype).removeprefix("torch.")
    if options.gradient_checkpointing is None:
        options.gradient_checkpointing = int(device.type == "cuda")


# ---- the run's directory -------------------------------------------------------------------------

def check_run(options):
    """One clear line if the run's directory cannot be made, is in use, or belongs to another."""
    out = Path(options.out)
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    ev.need(parent.is_dir() and os.access(parent, os.W_OK), f"--out {out} cannot be made: {parent} "
            "is a file or may not be written to")
    if out.exists() and ev.process()[0] == 0:
        lock(out)
    others = [path.name for path in out.glob("*") if path.suffix != ".part"]
    if not others:
        return
    ev.need("config.json" in others, f"{out} holds {others[0]} and no run: give another --out")
    try:
        theirs = dict(json.loads((out / "config.json").read_text())["options"])
    except (LookupError, TypeError, ValueError):
        raise ev.UserError(f"{out} holds no run's config.json: give another --out") from None
    differ = [f"--{name.replace('_', '-')} {theirs.get(name)}" for name, mine in
              vars(options).items() if name not in RESUME_MAY_CHANGE and mine != theirs.get(name)]
    ev.need(not differ, f"{out} holds a run with {', '.join(differ)}: give the same options to "
            "resume it, or another --out")


@functools.cache
def handle(out):
    return os.open(out, os.O_RDONLY)


def lock(out):
    """Keep other processes out of the run's directory for as long as this process lives."""
    try:
        fcntl.flock(handle(out.absolute()), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ev.UserError(f"{out}: another process is at work on this run") from None


def save(value, path):
    """Write under another name and rename: an interruption leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".pt":
        with ev.blame(f"cannot write {part} (is the disk full?)"):
            torch.save(value, part)
    elif path.suffix == ".jsonl":
        part.write_text("".join(f"{json.dumps(line)}\n" for line in value))
    else:
        part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def read(path):
    """What `save` has written. A damaged file ends in a line that says what to do."""
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu")
        if path.suffix == ".jsonl":
            lines = path.read_text().splitlines() or [""]        # an empty file is a damaged one
            return [json.loads(line) for line in lines]
        return json.loads(path.read_text())
    except (EOFError, LookupError, RuntimeError, ValueError, pickle.UnpicklingError):
        again = STAGES.get(path.name, "the whole run")
        raise ev.UserError(f"{path} is damaged: delete it, and {again} is done again") from None


def once(path, make):
    """make()'s value, kept in a file so that an interrupted run does not make it twice."""
    exists = path.exists()
    wait_for_all()                                   # one process will write that file
    if exists:
        return read(path)
    value = make()
    if ev.process()[0] == 0:
        save(value, path)
    return value


def wait_for_all():
    if ev.process()[1] > 1:
        dist.barrier()


# ---- preparation ---------------------------------------------------------------------------------

def targets_of(options, model):
    """The names of the layers to adapt, as folora.find_targets takes them."""
    if options.target_modules != "all-linear":
        return options.target_modules.split(",")
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head]


def load(options):
    """(model, tokenizer, encoded examples, tasks). Mistakes in files show before the download."""
    ev.resolve_model(options.model)
    tasks = ev.load_tasks(options.tasks, options.eval_samples)
    if options.calibration != "self":
        ev.given_texts(options.calibration, options.calibration_samples)
    config = "main" if options.data == "openai/gsm8k" else None
    rows = ev.read_rows(options.data, config, limit=options.max_samples)
    pairs = ev.to_pairs(rows, options.data)
    device = torch.device(options.device)
    model, tokenizer = ev.load_model(options.model, device, ev.DTYPES[options.dtype])
    folora.find_targets(model, targets_of(options, model), options.rank)
    longest = max(options.max_length, options.calibration_max_tokens + 1)
    ev.need(longest <= ev.positions(model), "--max-length or --calibration-max-tokens is beyond "
            f"the {ev.positions(model)} positions of {options.model}")
    if options.calibration_model:                    # its text is used as token ids
        where = ev.resolve_model(options.calibration_model)
        theirs = transformers.AutoTokenizer.from_pretrained(where)
        ev.need(theirs.get_vocab() == tokenizer.get_vocab(), "--calibration-model "
                f"{options.calibration_model} has another tokenizer than {options.model}")
    return model, tokenizer, ev.encode_all(tokenizer, pairs, options.max_length), tasks


def calibration_texts(options, model, tokenizer):
    """The token lists behind C_pre. Each process samples its share and gets all of them."""
    longest = options.calibration_max_tokens
    if options.calibration != "self":
        texts = ev.given_texts(options.calibration, options.calibration_samples)
        return [tokenizer(text)["input_ids"][:longest] for text in texts]
    if options.calibration_model:
        model, _ = ev.load_model(options.calibration_model, model.device, model.dtype)
    count = len(ev.share(range(options.calibration_samples)))
    bar = tqdm(total=count, desc="calibration text", unit="text")
    process, world = ev.process()
    texts = folora.sample_calibration(model, tokenizer, count, min(128, longest), longest,
                                      seed=options.seed + 10 ** 6 * process, progress=bar.update)
    shares = [[text.tolist() for text in texts]] * world
    if world > 1:
        dist.all_gather_object(shares, shares[0])
    return sum(shares, [])


def covariances(options, model, sequences, name, targets=folora.TARGET_MODULES):
    """Covariances over token lists, with a bar; for C_pre and C_task alike."""
    batches = ev.by_length(ev.share(sequences), options.micro_batch_size)
    inputs = (ev.collate(batch, model.device) for batch in tqdm(batches, desc=name))
    return folora.collect_covariances(
        model, ({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"],
                 "use_cache": False, "logits_to_keep": 1} for b in inputs), targets)


def solve(options, model, texts, examples):
    """FoLoRA's bases, on the host: folora.prepare in --passes parts, to hold fewer covariances."""
    targets, tokens = folora.find_targets(model, targets_of(options, model)), sum(map(len, texts))
    names, bases, widest = list(targets), [], max(m.in_features for m in targets.values())
    if tokens < 2 * widest or len(set(map(tuple, texts))) == 1:
        tqdm.write(f"warning: {len(texts)} calibration texts, {tokens} tokens. Use texts that "
                   f"differ, and at least {2 * widest} tokens (--calibration-samples)", sys.stderr)
    size = -(-len(names) // options.passes)                          # neighbours share an input
    task = [example["ids"] for example in examples[:options.task_samples]]
    for some in (names[i:i + size] for i in range(0, len(names), size)):
        C_pre = covariances(options, model, texts, "C_pre", some)
        C_task = covariances(options, model, task, "C_task", some)
        bar = tqdm(total=len({id(C) for C in C_pre.values()}), desc="eigenproblems")
        bases += [{key: t.cpu() if torch.is_tensor(t) else t for key, t in basis.items()}
                  for basis in folora.decompose(C_pre, C_task, options.rank, options.tau,
                                                options.basis_rank or None, progress=bar.update)]
    return bases


def add_adapters(options, model, bases=None):
    """Adapters in place; returns the optimiser. FoLoRA needs `bases` from solve."""
    if options.method == "folora":
        return folora.attach(model, bases, options.lr, options.alpha, options.lam, options.s_min,
                             bool(options.zero_start))
    model.requires_grad_(False)
    for name, base in folora.find_targets(model, targets_of(options, model), options.rank).items():
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


@contextmanager
def untouched(model):
    """The pretrained model, from the same weights: with B = 0 or, where W0 has become W_res, with
    the start's A0 and B0."""
    layers = [m for m in model.modules() if isinstance(m, folora.LoRALinear)]
    trained = [(m.lora_A.data, m.lora_B.data) for m in layers]
    for m in layers:
        m.lora_A.data, m.lora_B.data = m.start or (m.lora_A.data, torch.zeros_like(m.lora_B))
    try:
        yield
    finally:
        for m, (A, B) in zip(layers, trained):
            m.lora_A.data, m.lora_B.data = A, B


def kl_from_untouched(model, text):
    """KL(untouched || now), summed over the next-token positions of one text, in nat."""
    batch = ev.collate([text], model.device)
    with torch.no_grad(), untouched(model):
        log_p = ev.logits_of(model, batch)[0].log_softmax(-1)
    return ev.summed_kl(log_p, ev.logits_of(model, batch)[0])


def gradients(model, optimizer, batch, micro_batch_size, weight=0.0, texts=()):
    """Leave the clipped gradient of a list of examples in the parameters: (loss, gradient norm).
    The loss is the mean over all labels of the batch, of which each process and each micro-batch
    has a part. The gradient of weight * KL(untouched || now) on the texts is added."""
    labels = sum(label != -100 for e in batch for label in e["labels"][1:])
    parameters, total = [p for group in optimizer.param_groups for p in group["params"]], 0.0
    for micro in ev.by_length(ev.share(batch), micro_batch_size, lambda e: len(e["ids"])):
        loss = ev.summed_nll(model, ev.collate(micro, model.device)) / labels
        loss.backward()
        total += loss.item()
    positions = sum(len(text) - 1 for text in texts)
    for text in ev.share(texts) if weight else ():
        (weight / positions * kl_from_untouched(model, text)).backward()
    processes = ev.process()[1]
    for p in parameters if processes > 1 else ():
        dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    return ev.mean(total, 1 / processes), norm       # the sum over processes


class Probe:
    """Drift while training: KL from the untouched model, whose log-probabilities are kept."""

    @torch.inference_mode()
    def __init__(self, model, texts, positions=256):
        self.batch = ev.collate([t.tolist() for t in texts], model.device)
        for labels, text in zip(self.batch["labels"], texts):
            kept = torch.linspace(1, len(text) - 1, positions // len(texts)).long()     # not BOS
            labels[~torch.isin(torch.arange(len(labels)), kept).to(labels.device)] = -100
        self.before = ev.logits_of(model, self.batch)[0].log_softmax(-1)

    @torch.inference_mode()
    def __call__(self, model):
        logits, _ = ev.logits_of(model, self.batch)
        return ev.summed_kl(self.before, logits).item() / len(self.before)


def recompute(model, on):
    """Gradient checkpointing. A layer does it only in training mode; what is inside it stays in
    evaluation mode, without dropout."""
    if on:              # the reentrant kind gives no gradient behind frozen embeddings
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = bool(on) and hasattr(module, "gradient_checkpointing")


def check_finite(step, kept, **values):
    """End the run, before the next step or checkpoint, if a value is not a finite number."""
    if not all(map(math.isfinite, values.values())):
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        raise FloatingPointError(f"step {step}: {shown}; the checkpoint of step {kept} is kept. "
                                 "Start again with a lower --lr and another --out")


def train(options, model, optimizer, examples, probe, out, texts=()):
    """The loop: a line of metrics.jsonl for every step, a checkpoint every --log-every steps."""
    batches = data_order(len(examples), options.batch_size, options.epochs, options.max_steps,
                         options.seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    saved, log, process = out / "checkpoint.pt", out / "metrics.jsonl", ev.process()[0]
    done, lines = 0, []
    if saved.exists():
        state = read(saved)
        done, lines = state["step"], state["lines"]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"]})
        model.load_state_dict(state["adapters"], strict=False)
    if process == 0:                                 # lines after the checkpoint are written again
        save(lines, log)
    recompute(model, options.gradient_checkpointing)
    bar = tqdm(range(done, len(batches)), f"train {options.method}", len(batches), initial=done)
    for step in bar:
        start = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step, len(batches))
        batch = [examples[i] for i in batches[step]]
        some = [texts[(step * options.kl_texts + i) % len(texts)]
                for i in range(options.kl_texts if options.kl else 0)]
        loss, norm = gradients(model, optimizer, batch, options.micro_batch_size, options.kl, some)
        check_finite(step + 1, done, loss=loss, gradient_norm=norm)
        optimizer.step()
        optimizer.zero_grad()
        if process:
            continue                                 # the first process keeps the books
        speed = sum(len(e["ids"]) for e in batch) / (time.perf_counter() - start)
        due = (step + 1) % options.log_every == 0 or step + 1 == len(batches)
        drift = probe(model) if due else None
        check_finite(step + 1, done, drift=drift or 0.0)
        lines.append({"step": step + 1, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
                      "grad_norm": norm, "tokens_per_s": round(speed), "drift": drift})
        with log.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        bar.set_postfix(loss=f"{loss:.3f}")
        if due:
            adapters = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
            save({"step": step + 1, "lines": lines, "adapters": adapters,
                  "moments": optimizer.state_dict()["state"]}, saved)       # not the bases
            done = step + 1
    recompute(model, False)


# ---- the run -------------------------------------------------------------------------------------

def start_processes(options):
    """Join torchrun's processes: each with its own GPU, all with one --out."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))      # one may sample for longer
    for name in ("batch_size", "calibration_samples", "task_samples", "eval_samples"):
        ev.need(getattr(options, name) >= ev.process()[1], f"--{name.replace('_', '-')} must be at "
                f"least {ev.process()[1]}, one for each process")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    out = [options.out]                              # it may hold the time
    dist.broadcast_object_list(out)
    options.out, = out


def stages(options, model, tokenizer, examples, tasks, before):
    """The scores of `run`, computed."""
    out, first = Path(options.out), ev.process()[0] == 0
    length = min(256, options.calibration_max_tokens)
    texts = once(out / "held_out.jsonl",
                 lambda: [text.tolist() for text in ev.held_out(model, tokenizer, length)])
    texts = [torch.tensor(text) for text in texts]
    before = once(out / "untouched.json",
                  lambda: before or ev.evaluate(model, tokenizer, tasks))
    bases, own = None, ()
    if options.method == "folora" or options.kl:
        own = once(out / "calibration.jsonl", lambda: calibration_texts(options, model, tokenizer))
    if options.method == "folora":
        if not (out / "prepared.pt").exists():       # moments belong to the bases that they had
            (out / "checkpoint.pt").unlink(missing_ok=True)
        bases = once(out / "prepared.pt", lambda: solve(options, model, own, examples))
    probe = Probe(model, texts)
    torch.manual_seed(options.seed)
    optimizer = add_adapters(options, model, bases)
    train(options, model, optimizer, examples, probe, out, own)
    if first:
        folora.save_adapter(model, out / "adapter")
        tokenizer.save_pretrained(out / "adapter")
    model, reference = folora.merge(model), None
    if first and options.merge:
        model.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    if "drift" in tasks:
        reference, _ = ev.load_model(options.model, model.device, model.dtype)
    after = ev.evaluate(model, tokenizer, tasks, reference, texts)
    return {"untouched": {**before, **ev.summarise(before, before)},
            options.method: {**after, **ev.summarise(after, before)}}


def run(options, before=None):
    """One method, all stages: {"untouched": its scores, or `before`, method: scores}. summary.json
    is what makes a run finished; the files of STAGES are deleted after that."""
    out, first = Path(options.out), ev.process()[0] == 0
    if not (out / "summary.json").exists():
        loaded = load(options)
        if first:
            out.mkdir(parents=True, exist_ok=True)
            check_run(options)                       # another run may have been faster
            if not (out / "config.json").exists():
                versions = {m.__name__: m.__version__ for m in (torch, transformers)}
                save({"options": vars(options), "versions": versions}, out / "config.json")
        scores = stages(options, *loaded, before)
        if first:
            save({"scores": scores}, out / "summary.json")
    wait_for_all()
    scores = read(out / "summary.json")["scores"]
    for name in STAGES:
        (out / name).unlink(missing_ok=True)
    return scores


@ev.one_line
def main(arguments=None):
    """The run, and with --compare lora the same with LoRA; the first process prints the table."""
    options, scores = parse_options(arguments, strict=True), {}
    if "LOCAL_RANK" in os.environ:
        start_processes(options)
    runs = [options]
    if options.compare == "lora":
        lr, out = LORA_LR[ev.is_tiny(options.model)], f"{options.out}/lora"
        runs.append(argparse.Namespace(**vars(options) | dict(method="lora", lr=lr, out=out)))
    for each in runs:                                # before the first has run for hours
        resolve(each)
        check_run(each)
    try:
        for each in runs:
            scores |= run(each, scores.get("untouched"))
    except KeyboardInterrupt:
        ev.need(False, f"interrupted: the same command with --out {options.out} goes on")
    except (torch.OutOfMemoryError, MemoryError):
        ev.need(False, "out of memory: lower --micro-batch-size, then --max-length or --rank")
    if ev.process()[0] == 0:
        print(ev.table(scores))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
