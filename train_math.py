"""Fine-tune a language model on maths with FoLoRA, and show what it learned and what it kept.

    python train_math.py                                   # the embedded model, on CPU: under three minutes
    python train_math.py --method lora                     # the same with plain LoRA
    python train_math.py --model Qwen2.5-1.5B              # GSM8K from the hub, on a CUDA GPU
    torchrun --nproc-per-node 4 train_math.py --model Qwen2.5-1.5B     # the same on four GPUs
    python train_math.py --model DIR --data FILE.jsonl --tasks gsm8k=TEST.jsonl,nq_open=NQ.jsonl,drift      # everything local

The run is kept in --out: config.json (every option as resolved, versions), metrics.jsonl, summary.json (scores, seconds of each
stage, peak memory), merged/ (a plain Hugging Face checkpoint). The same command with the same --out goes on where an interrupted
run was last saved, and ends with the same numbers (on a GPU: up to rounding). A line of metrics.jsonl:

    step             optimiser steps done             loss        mean NLL of the batch's response tokens before the step, nat
    lr               of B, at that step               grad_norm   of all gradients together, before clipping at 1
    tokens_per_s     tokens trained on (no padding)   drift       KL(untouched || now), nat per token, at 256 positions spread
                                                                  over the held-out text; every --log-every steps, else null
"""
import argparse
import errno
import functools
import json
import math
import os
import platform
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

if int(os.environ.get("RANK", 0)):                         # one bar for all processes: tqdm reads this when it, or torch, is imported
    os.environ["TQDM_DISABLE"] = "1"

import torch
import torch.nn.utils.parametrize
import transformers
from tqdm import tqdm

import eval as ev
import folora

try:
    import resource
except ImportError:                                        # Windows has none: no peak memory on a CPU there
    resource = None


# ---- the baselines of the paper: starts A0 (r, d_in), B0 (d_out, r) from W (d_out, d_in) and C_pre (d_in, d_in), κ = alpha / r ----------

def balanced(U, S, Vh, kappa):
    """A0 = √(S/κ) Vᵀ and B0 = U √(S/κ): κ B0 A0 = U S Vᵀ, its singular values shared evenly."""
    root = (S / kappa).sqrt()
    return root[:, None] * Vh, U * root


def milora(W, C, rank, kappa):
    """MiLoRA: W = U S Vᵀ, the r smallest singular values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return balanced(U[:, -rank:], S[-rank:], Vh[-rank:], kappa)


def corda(W, C, rank, kappa, damping=0.01):
    """CorDA, knowledge-preserving: C̃ = C + damping · mean(diag C) I, W C̃ = U S Vᵀ, the r smallest; A0 = √(S/κ) Vᵀ C̃⁻¹."""
    C = C + damping * C.diagonal().mean() * torch.eye(len(C), device=C.device)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    return balanced(U[:, -rank:], S[-rank:], torch.linalg.solve(C, Vh[-rank:], left=False), kappa)


def lora_null(W, C, rank, kappa):
    """LoRA-Null: U0 = the r eigenvectors of C with the least energy, no ridge; W U0 U0ᵀ = U S Vᵀ."""
    U0 = least_energy(C, rank).mT                          # (d_in, r)
    U, S, Vh = torch.linalg.svd(W @ U0, full_matrices=False)                 # (d_out, d_in) @ (d_in, r); its Vᵀ is Vh U0ᵀ
    return balanced(U, S, Vh @ U0.mT, kappa)


least_energy = functools.lru_cache(maxsize=1)(folora.null_space)             # q, k, v share one C: solved once


class Complement(torch.nn.Module):
    """OPLoRA: ΔW = (I - U_k U_kᵀ) B A (I - V_k V_kᵀ). Given Q (d, k) with orthonormal columns, this takes Q's span out of the columns of B
    (dim 0) or out of the rows of A (dim 1); as a parametrization it does so wherever the factor is read."""

    def __init__(self, Q, dim):
        super().__init__()
        self.dim = dim
        self.register_buffer("Q", Q.clone())               # Q is a view of all of U or V

    def forward(self, factor):
        return factor - self.Q @ (self.Q.mT @ factor) if self.dim == 0 else factor - (factor @ self.Q) @ self.Q.mT


def baseline_adapter(options, base, C_pre):
    """The LoRALinear of a baseline on the nn.Linear `base`."""
    start, rank, W = METHODS[options.method][0], options.rank, base.weight.detach().float()
    factors = start(W, C_pre, rank, options.alpha / rank if options.alpha else 1.0) if start else ()
    adapter = folora.LoRALinear(base, rank, options.alpha, *factors)
    if options.method == "oplora":                         # k = r: the paper has 128 for both
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        torch.nn.utils.parametrize.register_parametrization(adapter, "lora_A", Complement(Vh[:rank].mT, 1))
        torch.nn.utils.parametrize.register_parametrization(adapter, "lora_B", Complement(U[:, :rank], 0))
    return adapter


# method: (its start, None: LoRA's or FoLoRA's; what it needs of the preparation; how A moves)
METHODS = {
    "folora": (None, "sites", "gated"),
    "lora": (None, None, "plain"),
    "lora-null": (lora_null, "C_pre", "plain"),
    "lora-null-v2": (lora_null, "C_pre", "frozen"),
    "milora": (milora, None, "plain"),
    "corda": (corda, "C_pre", "plain"),
    "oplora": (None, None, "plain"),
}


# ---- options --------------------------------------------------------------------------------------------------------

# option: (default, the default with --model tiny or None, whose value, help). --preset tuned replaces some: TUNED.
OPTIONS = {
    "model": ("tiny", None, "ours", "directory, hub id or short name (Qwen2.5-1.5B, Llama-2-7b, SmolLM2-135M); tiny is the embedded one"),
    "method": ("folora", None, "paper", "folora, or a baseline of the paper, all on the same footing: " + ", ".join(list(METHODS)[1:])),
    "update_a": (None, None, "paper", "how A moves; gated: SAdam; plain: Adam; frozen; none: as the method has it"),
    "preset": ("paper", None, "paper", "paper, or tuned: a sharper gate, no floor, B = 0 at the start"),
    "data": ("openai/gsm8k", "tiny/train.jsonl", "ours", "hub id or .jsonl with question/answer, query/response or instruction/output"),
    "rank": (128, 32, "paper", "adapter rank"),
    "alpha": (None, None, "ours", "scaling alpha / rank; none: 1"),
    "lr": (3e-4, 6e-3, "ours", "learning rate of B and A (paper: 2e-5, over 781 steps of MetaMathQA)"),
    "lr_a": (None, None, "ours", "learning rate of A; none: the same"),
    "lam": (1.0, None, "paper", "lambda, the gate's sharpness"),
    "s_min": (0.3, None, "paper", "the gate's floor"),
    "tau": (0.01, None, "ours", "ridge, relative to the mean eigenvalue of C_pre"),
    "zero_start": (0, None, "paper", "1: B starts at zero and W0 stays; 0: the paper's residual start"),
    "epochs": (3, 2, "ours", "passes over the data (paper: 1)"),
    "warmup": (0.03, None, "paper", "share of the steps in which the learning rate rises; then cosine to zero"),
    "max_steps": (None, None, "ours", "so many steps, whatever --epochs says; the cosine ends there"),
    "max_samples": (100_000, 3200, "paper", "the first N examples of the data"),
    "batch_size": (128, 32, "paper", "examples a step"),
    "micro_batch_size": (16, 8, "paper", "examples a forward pass: lower it if memory runs out"),
    "max_length": (512, 256, "paper", "tokens an example"),
    "calibration": ("self", None, "paper", "text that must not move: self (sampled from the model), or a hub id or .jsonl with text"),
    "calibration_samples": (2000, 256, "paper", "sequences for C_pre"),
    "calibration_max_tokens": (512, 224, "paper", "tokens of a sampled sequence, at most (at least: 128)"),
    "calibration_model": (None, None, "paper", "another model to sample from, with the same tokenizer; none: the model itself"),
    "gradient_checkpointing": (None, None, "ours", "1: keep one activation a layer and compute the others again: less memory, up to a third more time; 0: keep all; none: 1 on a GPU"),
    "passes": (2, 1, "ours", "read the text so often, each time for a share of the layers: less memory for covariances"),
    "offload_bases": (0, None, "ours", "1: keep the bases on the host, and send them at every step: less memory on a GPU"),
    "task_samples": (256, None, "paper", "training examples for C_task"),
    "tasks": (None, None, "ours", "what to score, as for eval.py; none: its default; empty: nothing"),
    "eval_samples": (500, 200, "ours", "rows a task"),
    "log_every": (10, None, "ours", "steps between two measurements of drift, and between two checkpoints"),
    "seed": (0, None, "ours", "of the calibration text, the adapters and the order of the data"),
    "dtype": ("auto", None, "ours", "of the base model: auto (bfloat16 on a GPU, float32 on a CPU), bfloat16, float32 or float16"),
    "device": ("auto", None, "ours", "cuda, cpu, or auto: cuda if there is one"),
    "out": (None, None, "ours", "the run's directory; none: runs/<model>-<method>-<date and time>"),
}
TUNED = {"lam": 30.0, "s_min": 0.0, "zero_start": 1, "lr": 3e-3}
CHOICES = {"method": tuple(METHODS), "update_a": ("gated", "plain", "frozen"), "preset": ("paper", "tuned"), "dtype": ("auto", *ev.DTYPES), "zero_start": (0, 1), "gradient_checkpointing": (0, 1), "offload_bases": (0, 1)}
PLACES = {"out", "micro_batch_size", "gradient_checkpointing", "passes", "offload_bases"}                       # a resumed run may change these; another device has other singular vectors


def parse_options(arguments=None):
    """The resolved options: what the command line says, else the preset's value, else tiny's, else the default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, tiny, source, text) in OPTIONS.items():
        columns = {source: default, "tiny": tiny, "tuned": TUNED.get(name)}
        notes = [f"{whose}: {value}" for whose, value in columns.items() if value is not None] or [source]
        kind = type(default) if default is not None else {"max_steps": int, "gradient_checkpointing": int, "alpha": float, "lr_a": float}.get(name, str)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, choices=CHOICES.get(name), help=f"{text} [{'; '.join(notes)}]".replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    options = {name: default for name, (default, *_) in OPTIONS.items()}
    if ev.is_tiny(given.get("model", "tiny")):
        options.update({name: tiny for name, (_, tiny, *_) in OPTIONS.items() if tiny is not None}, data=str(ev.TINY / "train.jsonl"))
    if given.get("preset") == "tuned":
        options.update(TUNED)
    options.update(given)
    options["out"] = options["out"] or f"runs/{Path(options['model']).name}-{options['method']}-{time.strftime('%Y%m%d-%H%M%S')}"
    options["tasks"] = ev.default_tasks(options["model"]) if options["tasks"] is None else options["tasks"]
    if options["method"] != "folora" and (options["update_a"] == "gated" or options["preset"] != "paper"):
        parser.error(f"--update-a gated and --preset tuned are FoLoRA's, not --method {options['method']}'s")
    check_ranges(parser, options)
    return argparse.Namespace(**options)


def check_ranges(parser, options):
    """One line for the first number that is out of range."""
    least = {**dict.fromkeys(("lr", "lr_a", "tau"), 0), "alpha": math.ulp(0), "warmup": 0}
    least.update((name, 1) for name, value in options.items() if isinstance(value, int) and name not in (*least, *CHOICES, "seed"))
    for name, low in least.items():
        if options[name] is not None and not options[name] >= low:
            parser.error(f"--{name.replace('_', '-')} must be {'above 0' if name == 'alpha' else f'at least {low}'}, not {options[name]}")
    if options["seed"] in (ev.HELD_OUT_SEED, ev.HELD_OUT_SEED + 1):
        parser.error(f"--seed {options['seed']} is reserved for the held-out text: choose another")
    if options["warmup"] > 1:
        parser.error(f"--warmup is a share of the steps, from 0 to 1, not {options['warmup']}")


# ---- the run's directory --------------------------------------------------------------------------------------------

def check_run(options):
    """One clear line if the run's directory belongs to another run."""
    out, mine = Path(options.out), vars(options)
    config = out / "config.json"
    if (out / "summary.json").exists():
        sys.exit(f"{out} holds a finished run: give another --out, or delete it")
    if config.exists():
        theirs = json.loads(config.read_text()).get("options")
        if theirs is None:
            sys.exit(f"{out} holds something else (a config.json that is no run's): give another --out")
        differ = [f"--{k.replace('_', '-')} {theirs.get(k)}" for k in mine if k not in PLACES and mine[k] != theirs.get(k)]
        if differ:
            sys.exit(f"{out} holds an unfinished run with {', '.join(differ)}: give the same options to go on with it, or another --out")


def open_run(options):
    """The run's directory, new or to be resumed; config.json written."""
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        sys.exit(f"--out {out} cannot be made: {error.strerror}")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    (out / "config.json").write_text(json.dumps({"options": vars(options), "versions": versions}, indent=1))


def save(value, path):
    """torch.save that leaves either the old file or the new one, whenever it is interrupted."""
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def check_disk(out, model, rank, bases):
    """Stop now, with one line, rather than hours later: the run writes the bases (at most one a layer), checkpoints, and the merged model."""
    widths = [m.in_features for m in folora.find_targets(model, rank=rank).values()]
    need = sum(p.numel() * p.element_size() for p in model.parameters()) + 48 * rank * sum(widths) + 4 * bool(bases) * sum(d * d for d in widths)
    free = shutil.disk_usage(out).free
    if free < need:
        sys.exit(f"{out}: the run writes about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: give an --out on a larger disk")


# ---- the stages -----------------------------------------------------------------------------------------------------

@contextmanager
def stage(seconds, name):
    """Time a stage into seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 2)


def given_texts(options):
    """The texts of a --calibration that is not self."""
    rows = ev.read_rows(options.calibration, limit=options.calibration_samples)
    texts = [ev.field(row, ("text", "question"), options.calibration, n) for n, row in enumerate(rows, 1)]
    if not all(isinstance(text, str) for text in texts):
        sys.exit(f"{options.calibration}: every row needs a text, not a {next(type(t).__name__ for t in texts if not isinstance(t, str))}")
    return texts


def calibration_texts(options, model, tokenizer):
    """This process's share of the token lists behind C_pre: sampled by B.4 from the model (or from --calibration-model), or read from a data set."""
    if options.calibration != "self":
        return [tokenizer(text)["input_ids"][:options.calibration_max_tokens] for text in ev.share(given_texts(options))]
    if options.calibration_model:
        model, theirs = ev.load_model(options.calibration_model, model.device, model.dtype)
        if theirs.get_vocab() != tokenizer.get_vocab():
            sys.exit(f"--calibration-model {options.calibration_model} has another tokenizer than {options.model}: its text would not be the model's")
    longest, count = options.calibration_max_tokens, len(ev.share(range(options.calibration_samples)))
    bar = tqdm(total=count, desc="calibration text", unit="text")
    seed = options.seed + 10 ** 6 * folora.processes()[0]                       # each process writes its own
    texts = folora.sample_calibration(model, tokenizer, count, min(128, longest), longest, seed=seed, progress=bar.update)
    return [text.tolist() for text in texts]


def covariances(options, model, sequences, name, targets=folora.TARGET_MODULES):
    """Covariances over `sequences` (token lists), with a bar; for C_pre and C_task alike."""
    batches = ev.by_length(sequences, options.micro_batch_size)
    inputs = (ev.collate(batch, model.device) for batch in tqdm(batches, desc=name))
    return folora.collect_covariances(
        model, ({"input_ids": b["input_ids"], "attention_mask": b["attention_mask"], "use_cache": False, "logits_to_keep": 1} for b in inputs), targets)


def solve(options, model, texts, examples, seconds):
    """FoLoRA's sites: both covariances and the eigenproblems, for a share of the layers in each of --passes."""
    sites = []
    for names in folora.split_layers(folora.find_targets(model), options.passes):
        with stage(seconds, "covariances"):
            C_pre = covariances(options, model, texts, "C_pre", names)
            C_task = covariances(options, model, [e["ids"] for e in ev.share(examples[:options.task_samples])], "C_task", names)
        with stage(seconds, "eigenproblems"):
            bar = tqdm(total=len({id(C) for C in C_pre.values()}), desc="eigenproblems")
            sites += [{key: value.cpu() if torch.is_tensor(value) else value for key, value in site.items()}         # attach moves them back
                      for site in folora.decompose(C_pre, C_task, options.rank, options.tau, progress=bar.update)]    # in no variable: the next pass needs the room
    return sites


def add_adapters(options, model, sites=None, C_pre=None, targets=folora.TARGET_MODULES):
    """Adapters in place; the optimiser of the method, which needs what METHODS says: `sites` from solve, C_pre, or nothing."""
    update = options.update_a or METHODS[options.method][2]
    if options.method == "folora":
        optimizer = folora.attach(model, sites, options.lr, options.lr_a, options.alpha, options.lam, options.s_min, bool(options.zero_start),
                                  bool(options.offload_bases))
        for group in optimizer.param_groups if update != "gated" else ():
            group["basis"] = group["gate"] = None          # a group without a basis is plain Adam
    else:
        model.requires_grad_(False)
        for name, base in folora.find_targets(model, targets, options.rank).items():
            model.set_submodule(name, baseline_adapter(options, base, C_pre and C_pre[name]))
        A, B = ([p for name, p in model.named_parameters() if key in name] for key in ("lora_A", "lora_B"))
        lr_a = options.lr if options.lr_a is None else options.lr_a
        optimizer = torch.optim.AdamW([{"params": A, "lr": lr_a}, {"params": B}], lr=options.lr, weight_decay=0.0)
    for name, p in model.named_parameters():
        if update == "frozen" and "lora_A" in name:
            p.requires_grad_(False)
    return optimizer


def schedule(step, steps, warmup):
    """Linear warm-up over a share of the steps, then a cosine to zero (Appendix B)."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def data_order(count, batch_size, epochs, max_steps, seed):
    """[indices of the batch of step 0, 1, ...]: every epoch a new permutation, the incomplete last batch dropped."""
    generator = torch.Generator().manual_seed(seed)
    steps = max_steps or max(1, epochs * count // batch_size)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-steps * batch_size // count))])
    return order[:steps * batch_size].view(steps, batch_size).tolist()


class SummedNLL(torch.nn.Module):
    """A forward pass that ends in the loss: what DistributedDataParallel can wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, examples):
        return ev.summed_nll(self.model, ev.collate(examples, self.model.device))


def train_step(summed_nll, optimizer, batch, micro_batch_size):
    """One step on a list of examples, in micro-batches: (loss, gradient norm, tokens). The loss is a mean over the batch's labels,
    of which each process has its share."""
    labels, world = sum(label != -100 for e in batch for label in e["labels"][1:]), folora.processes()[1]
    micros, total = ev.by_length(ev.share(batch), micro_batch_size, lambda e: len(e["ids"])), 0.0
    for micro in micros:
        with summed_nll.no_sync() if world > 1 and micro is not micros[-1] else nullcontext():
            loss = summed_nll(micro) / labels
            (loss * world).backward()                      # DDP takes the mean over processes of the gradients; we want their sum
        total += loss.item()
    total = ev.mean(total, 1 / world)                      # the sum over processes
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return total, norm, sum(len(e["ids"]) for e in batch)


class Probe:
    """Drift while training: the untouched model's log-probabilities at some positions of each held-out text, kept, and KL against them."""

    @torch.inference_mode()
    def __init__(self, model, texts, positions=256):
        self.batch = ev.collate([t.tolist() for t in texts], model.device)
        for labels, text in zip(self.batch["labels"], texts):
            kept = torch.linspace(1, len(text) - 1, positions // len(texts)).long()     # from 1: nothing predicts BOS
            labels[~torch.isin(torch.arange(len(labels)), kept).to(labels.device)] = -100
        self.before = ev.logits_of(model, ev.label_states(model, self.batch)[0]).log_softmax(-1)

    @torch.inference_mode()
    def __call__(self, model):
        return ev.summed_kl(self.before, model, ev.label_states(model, self.batch)[0]) / len(self.before)


def checkpoint(optimizer, model, step):
    """What a resumed run needs beside prepared.pt: adapters, moments, step. The bases are in prepared.pt and not written again."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k not in ("basis", "gate")} for group in state["param_groups"]]
    adapters = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    return {"step": step, "adapters": adapters, "optimizer": {"state": state["state"], "param_groups": groups}}


def restore(optimizer, model, saved):
    """Inverse of checkpoint; returns the number of steps that were done."""
    kept = [{key: group[key] for key in ("basis", "gate") if key in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])          # it copies what is in a group: the bases must not be there
    for group, bases in zip(optimizer.param_groups, kept):
        group.update(bases)
    model.load_state_dict(saved["adapters"], strict=False)
    return saved["step"]


def train(options, model, optimizer, examples, probe, out):
    """The loop: metrics.jsonl, checkpoints, and a bar."""
    batches = data_order(len(examples), options.batch_size, options.epochs, options.max_steps, options.seed)
    first = [group["lr"] for group in optimizer.param_groups]
    saved, log, (process, world) = out / "checkpoint.pt", out / "metrics.jsonl", folora.processes()
    done = restore(optimizer, model, torch.load(saved, map_location=model.device)) if saved.exists() else 0
    if process == 0:
        lines = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
        log.write_text("".join(lines))                     # lines of steps after the checkpoint will be written again
    recompute(model, options.gradient_checkpointing)
    summed_nll = SummedNLL(model) if world == 1 else torch.nn.parallel.DistributedDataParallel(SummedNLL(model))
    bar = tqdm(range(done, len(batches)), desc="train", initial=done, total=len(batches))
    for step in bar:
        start = time.perf_counter()
        for group, lr in zip(optimizer.param_groups, first):
            group["lr"] = lr * schedule(step, len(batches), options.warmup)
        loss, norm, tokens = train_step(summed_nll, optimizer, [examples[i] for i in batches[step]], options.micro_batch_size)
        if process:
            continue                                       # the first process keeps the books
        speed, due = tokens / (time.perf_counter() - start), (step + 1) % options.log_every == 0 or step + 1 == len(batches)
        line = {"step": step + 1, "loss": loss, "lr": optimizer.param_groups[-1]["lr"], "grad_norm": norm, "tokens_per_s": round(speed),
                "drift": probe(model) if due else None}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{loss:.3f}", **({"drift": f"{line['drift']:.4f}"} if due else {}))
        if due:
            save(checkpoint(optimizer, model, step + 1), saved)
    recompute(model, False)


def recompute(model, on):
    """Gradient checkpointing. The layers take `training` for their sign; what is inside them stays in evaluation mode: no dropout."""
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})         # reentrant, frozen embeddings would cut the gradient
    for module in model.modules():
        module.training = bool(on) and hasattr(module, "gradient_checkpointing")


def load(options):
    """(model, tokenizer, encoded examples, tasks), everything checked that can be checked before any long work."""
    device, dtype = ev.pick_device(options.device, options.dtype)
    options.device, options.dtype = str(device), str(dtype).removeprefix("torch.")       # config.json says what "auto" came to
    if options.gradient_checkpointing is None:
        options.gradient_checkpointing = int(device.type == "cuda")
    check_run(options)                                     # what needs no download is looked at first
    ev.resolve_model(options.model)
    folora.spectral_gate(torch.ones(1), options.lam, options.s_min)
    tasks = ev.load_tasks(options.tasks, options.eval_samples)
    if options.calibration != "self":
        given_texts(options)
    pairs = ev.to_pairs(ev.read_rows(options.data, "main" if options.data == "openai/gsm8k" else None, limit=options.max_samples), options.data)
    model, tokenizer = ev.load_model(options.model, device, dtype)
    sides = [min(m.weight.shape) for m in folora.find_targets(model, rank=options.rank).values()]
    if options.method not in ("folora", "lora") and options.rank > min(sides):
        sys.exit(f"--method {options.method} needs a rank of at most {min(sides)}, the smallest side of a target, not {options.rank}")
    return model, tokenizer, ev.encode_all(tokenizer, pairs, options.max_length), tasks


def start_processes(options):
    """Join torchrun's processes: each with its own GPU, all with one --out."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"      # sums of scores are on the CPU
    from torch.distributed import nn as _                  # DDP imports it: after the group, it would hold on to it, and gloo's threads may abort at exit
    torch.distributed.init_process_group(backend, timeout=timedelta(days=1))     # one process may write text for longer than another
    world, local = folora.processes()[1], int(os.environ["LOCAL_RANK"])
    for name in ("batch_size", "calibration_samples", "task_samples", "eval_samples"):
        if getattr(options, name) < world:
            sys.exit(f"--{name.replace('_', '-')} {getattr(options, name)}: {world} processes need at least {world}")
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        options.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    out = [options.out]                                    # it may hold the time
    torch.distributed.broadcast_object_list(out)
    options.out, = out


def run(options):
    """All stages, in order; prints the table."""
    model, tokenizer, examples, tasks = load(options)
    seconds, needs, out, process = {}, METHODS[options.method][1], Path(options.out), folora.processes()[0]
    if process == 0:
        open_run(options)
        check_disk(out, model, options.rank, needs and not (out / "prepared.pt").exists())
    prepared = out / "prepared.pt"
    resumed = prepared.exists()
    ev.mean(0, 1)                                          # all wait for all: the first process will write that file
    with stage(seconds, "held-out text"):
        texts = ev.held_out(model, tokenizer, min(256, options.calibration_max_tokens))
    if resumed:
        state = torch.load(prepared, map_location="cpu" if needs == "sites" else model.device)
        seconds.update(state["seconds"])                   # of the stages; "train" counts from here
    else:
        with stage(seconds, "score untouched"):
            before = ev.evaluate(model, tokenizer, tasks)
        with stage(seconds, "calibration text"):
            calibration = calibration_texts(options, model, tokenizer) if needs else None
        state = {"before": before, "seconds": seconds, "sites": solve(options, model, calibration, examples, seconds) if needs == "sites" else None,
                 "C_pre": covariances(options, model, calibration, "C_pre") if needs == "C_pre" else None}
        if process == 0:
            save(state, prepared)
    probe = Probe(model, texts)
    torch.manual_seed(options.seed)
    optimizer, before = add_adapters(options, model, state["sites"], state["C_pre"]), state["before"]
    del state                                              # the optimiser keeps the bases; the rest is memory
    with stage(seconds, "train"):
        train(options, model, optimizer, examples, probe, out)
    model = folora.merge(model)
    if process == 0:
        model.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    with stage(seconds, "score tuned"):
        reference = ev.load_model(options.model, model.device, model.dtype)[0] if "drift" in tasks else None
        after = ev.evaluate(model, tokenizer, tasks, reference, texts)
    if process == 0:
        finish(options, out, seconds, before, after, peak_memory(model.device))


def finish(options, out, seconds, before, after, peak):
    """summary.json and the table; what a resumed run would have needed goes."""
    scores = {"untouched": {**before, **ev.summarise(before, before)}, "tuned": {**after, **ev.summarise(after, before)}}
    (out / "summary.json").write_text(json.dumps({"scores": scores, "seconds": seconds, "peak_memory_gb": round(peak, 3)}, indent=1))
    for name in ("prepared.pt", "checkpoint.pt"):
        (out / name).unlink()
    if before:
        print(ev.table({"untouched": before, options.method: after}))
    print(f"{out}: {', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())}; peak memory {peak:.1f} GB")


def peak_memory(device):
    """GB: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6) if resource else 0.0


def main(arguments=None):
    options = parse_options(arguments)
    try:
        if "LOCAL_RANK" in os.environ:
            start_processes(options)
        run(options)
        if folora.processes()[1] > 1:
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        goes_on = (Path(options.out) / "prepared.pt").exists()
        sys.exit(f"interrupted: the same command with --out {options.out} goes on from the last checkpoint" if goes_on else "interrupted; nothing to go on from yet")
    except (torch.OutOfMemoryError, MemoryError) as error:
        sys.exit(f"out of memory ({str(error).splitlines()[0] if str(error) else 'on the CPU'}): lower --micro-batch-size, then --max-length or --rank")
    except ValueError as error:                            # folora's own messages: one line each
        sys.exit(str(error))
    except (OSError, RuntimeError) as error:               # torch.save and safetensors have their own types for a full disk
        where = Path(options.out)
        if "the screen rejects" in str(error):             # sample_calibration gave up
            sys.exit(str(error))
        if getattr(error, "errno", 0) != errno.ENOSPC and shutil.disk_usage(where if where.exists() else ".").free > 2 ** 20:
            raise
        sys.exit(f"the disk of {where} is full: free some space and run again with --out {where}, it goes on from the last checkpoint")


if __name__ == "__main__":
    main()
