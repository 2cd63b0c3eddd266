"""Fine-tune a language model on maths with FoLoRA, and show what it learned and what it kept.

    python train_math.py                              # the embedded model, on a CPU
    python train_math.py --model Qwen2.5-1.5B         # GSM8K from the hub, on a CUDA GPU
    torchrun --nproc-per-node 4 train_math.py --model Qwen2.5-1.5B           # on four GPUs
    python train_math.py --model DIR --data FILE.jsonl --tasks gsm8k=TEST.jsonl,drift        # local

The run is kept in --out: config.json (all options, and a digest of each file that it reads),
metrics.jsonl, summary.json (scores), adapter/ (for PEFT) and, with --merge 1, merged/ (a plain
Hugging Face checkpoint). The same command goes on with an interrupted run and ends with the same
numbers. Of a finished one it prints the table. Another run needs another --out, new or empty. It
samples and decomposes anew, unless it takes what a run has prepared for the same model (a larger
--rank or --basis-rank cannot be served):

    python train_math.py --model Qwen2.5-1.5B --lr 1e-3 --prepared runs/Qwen2.5-1.5B-folora --out b

For this, prepared.pt (4 (k + r) bytes for each input dimension: 0.3 GB for Qwen2.5-1.5B) and the
small calibration.json, held_out.json and untouched.json stay in --out; delete them as you like.
metrics.jsonl has a line for each step:

    step           optimiser steps done
    loss           mean NLL of the batch's response tokens before the step, in nat
    lr             learning rate of A at that step
    grad_norm      norm of all gradients together, before it is clipped at 1
    forgetting     mean over the layers of E|ΔW x|² / E|W0 x|² on calibration text after the step,
                   from SAdam.forgetting, without a forward pass; null with --method lora
    drift          KL(untouched || now) in nat per token, on four held-out texts that the untouched
                   model wrote; null between two measurements
"""
import argparse
import functools
import hashlib
import inspect
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import eval as ev
import folora

# torchrun starts PROCESSES processes. They share the training; all else is the work of the first.
PROCESS, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ==================================================================================================
# The experiment
# ==================================================================================================

@ev.one_line
def main(arguments=None):
    """The run, and with --compare lora plain LoRA at its own learning rate, without --kl. The first
    process prints the table."""
    options = parse_options(arguments)
    check_combination(options, names_given(arguments))
    resolve(options)
    compared = options.compare == "lora" and options.method == "folora"
    if compared:                                     # no refusal after the first run
        judge_directory(options)
        judge_directory(lora_options(options))
    scores = experiment(options)
    if compared:
        scores |= experiment(lora_options(options), scores.get("untouched"))
    if PROCESS == 0:
        print(ev.table(scores))


def experiment(options, before=None):
    """Train and score by one method: {"untouched": {task: score}, method: {task: score}}.

    `before` are the untouched model's scores, if they are known. Each stage's result is kept in the
    run's directory by `once`, so that an interrupted run does not repeat it."""
    out = Path(options.out)
    judge_directory(options)
    if (out / "summary.json").exists():              # a finished run
        return finish(out, options)

    # Load. Mistakes in options and files show here, before there is a directory.
    model, tokenizer, examples, tasks = load(options)
    claim(out, options)

    # What the untouched model writes and scores: what forgetting is measured by.
    longest = min(256, options.calibration_max_tokens)
    held_out = once(out / "held_out.json", lambda: borrowed(options, "held_out.json")
                    or as_lists(ev.held_out(model, tokenizer, longest)))
    before = once(out / "untouched.json", lambda: before or borrowed(options, "untouched.json")
                  or ev.evaluate(model, tokenizer, tasks))

    # Sample: text that must not be forgotten, the model's own (3.4) or that of --calibration.
    texts, needs_bases = (), options.method == "folora" and not options.prepared
    if needs_bases or options.kl or options.method == "lora" and options.penalty:
        texts = once(out / "calibration.json", lambda: sample(options, model, tokenizer))

    # Covariances and basis (3.1, 3.2). folora.prepare does these and the adapters in one call. They
    # are apart here so that each has a bar and the bases are kept.
    bases, penalty = None, None
    if options.method == "folora":
        bases = once(out / "prepared.pt", lambda: packed(options, model, texts, examples))["bases"]
    elif options.penalty:
        C_pre = once(out / "prepared.pt", lambda: covariances(options, model, texts, "C_pre"))

    # Adapters and their optimiser (B.3, 3.3).
    torch.manual_seed(options.seed)
    optimizer = add_adapters(options, model, bases)
    if options.method == "lora" and options.penalty:
        penalty = dense_penalty(options, model, C_pre)

    # Train. One process goes on to save and score.
    train(options, model, optimizer, examples, held_out[:4], out, texts, penalty)
    if PROCESS > 0:
        return {}

    # Save: the adapter alone, and if wanted the whole model.
    folora.save_adapter(model, out / "adapter")
    tokenizer.save_pretrained(out / "adapter")
    model = folora.merge(model)
    if options.merge:
        model.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")

    # Score, with the untouched model beside it for the drift.
    reference, _ = ev.load_model(options.model, model.device, model.dtype)
    after = ev.evaluate(model, tokenizer, tasks, reference, held_out)
    scores = {"untouched": before | ev.summarise(before, before),
              options.method: after | ev.summarise(after, before)}
    save({"run": identity(out), "scores": scores}, out / "summary.json")
    return finish(out, options)


# ---- The stages ----------------------------------------------------------------------------------

def load(options):
    """(model, tokenizer, encoded examples, tasks). Mistakes in files show before the
    model is downloaded."""
    _, adapter, _ = ev.find_model(options.model)
    ev.need(not adapter, "--model is an adapter: train it with --merge 1")
    tasks = ev.load_tasks(options.tasks, options.eval_samples)
    if options.calibration != "self":
        given_texts(options)
    if options.prepared:
        prepared_file(options)
    rows = ev.read_rows(options.data, limit=options.max_samples)
    pairs = ev.to_pairs(rows, options.data)
    check_size(options, len(pairs))
    check_lengths(options, tasks)
    model, tokenizer = ev.load_model(options.model, options.device, options.dtype)
    with ev.blame("--target-modules or --rank"):
        layers = folora.find_targets(model, targets(options), options.rank)
        folora.check_peft_loads(model, layers)       # save_adapter would refuse after training
    if options.prepared:
        prepared_bases(options, model)
    return model, tokenizer, ev.encode_all(tokenizer, pairs, options.max_length), tasks


def targets(options):
    return options.target_modules.split(",")


def is_calibration_of_a_run(source):
    return Path(source).name == "calibration.json" and Path(source).exists()


def given_texts(options):
    """The texts that --calibration names."""
    if is_calibration_of_a_run(options.calibration):
        return read(Path(options.calibration))["value"]
    return ev.load_tasks(f"prose={options.calibration}", options.calibration_samples)["prose"]


def as_lists(texts):
    return [text.tolist() for text in texts]


def sample(options, model, tokenizer):
    """The token lists behind C_pre: the model's own text, or those of --calibration."""
    longest, count = options.calibration_max_tokens, options.calibration_samples
    if is_calibration_of_a_run(options.calibration):
        texts = read(Path(options.calibration))["value"][:count]
        return [ids[:longest + 1] for ids in texts]  # the token that begins a text comes on top
    if options.calibration != "self":
        return ev.encode_texts(tokenizer, given_texts(options), longest, options.calibration)
    with tqdm(total=count, desc="calibration text") as bar, ev.blame(options.model):
        return as_lists(folora.sample_calibration(
            model, tokenizer, count, min(128, longest), longest, seed=options.seed,
            progress=bar.update))


def covariances(options, model, sequences, name, layers=None):
    """C_pre or C_task over token lists, with a bar, of all adapted layers or of some."""
    def inputs():
        for batch in tqdm(ev.by_length(sequences, options.micro_batch_size), desc=name):
            batch = ev.collate(batch, model.device)
            del batch["labels"]                      # no loss is needed, and one position's logits
            yield batch | {"use_cache": False, "logits_to_keep": 1}

    return folora.collect_covariances(model, inputs(), layers or targets(options))


def solve(options, model, texts, examples):
    """FoLoRA's directions for each input of the adapted layers, on the CPU."""
    task = [example["ids"] for example in examples[:options.task_samples]]
    bases = []
    for layers in folora.parts(model, targets(options), options.passes):
        C_pre = covariances(options, model, texts, "C_pre", layers)
        C_task = covariances(options, model, task, "C_task", layers)
        inputs = len({id(C) for C in C_pre.values()})                # q, k and v share one
        with tqdm(total=inputs, desc="eigenproblems") as bar:
            bases += folora.decompose(model, C_pre, C_task, options.rank,
                                      basis_rank=options.basis_rank, progress=bar.update,
                                      device=model.device)
    return bases


def packed(options, model, texts, examples):
    """The directions, and what they were made for: of --prepared, or found here."""
    if options.prepared:
        bases, tokens = prepared_bases(options, model), None
    else:
        bases = solve(options, model, texts, examples)
        task = examples[:options.task_samples]
        tokens = [sum(map(len, texts)), sum(len(example["ids"]) for example in task)]
    return folora.pack_prepared(model, bases, TAU, options.basis_rank, tokens)


def prepared_file(options):
    """The file of --prepared, a run's directory or a file of folora.prepare's cache."""
    path = Path(options.prepared)
    if path.is_dir():
        path /= "prepared.pt"
    ev.need(path.is_file(), f"--prepared: there is no {path}: name a run of FoLoRA or a file")
    return path


def prepared_bases(options, model):
    """The directions in --prepared."""
    path = prepared_file(options)
    found = read(path)
    if isinstance(found, dict) and "value" in found:                 # a run's
        found = found["value"]
    names = folora.find_targets(model, targets(options))
    with ev.blame("--prepared"):
        return folora.unpack_prepared(found, path, model, names, options.rank, TAU,
                                      options.basis_rank)


def borrowed(options, name):
    """What the run in --prepared knows of the same untouched model, or None: its held-out text or
    its scores, which would take longer than what was prepared saves."""
    run = Path(options.prepared or "")
    if not options.prepared or not (run / name).exists():
        return None
    theirs = read(run / "config.json")
    depends = ["model", "dtype", "device", "calibration_max_tokens"]
    if name == "untouched.json":
        depends += ["tasks", "eval_samples"]
    files = digests(options)
    if (any(theirs["options"].get(key) != getattr(options, key) for key in depends)
            or any(theirs["files"].get(file, digest) != digest for file, digest in files.items())):
        return None
    return kept(run / name)


def add_adapters(options, model, bases=None):
    """Put adapters on the model, in place, and return their optimiser. FoLoRA needs bases."""
    if options.method == "folora":
        return folora.attach(model, bases, options.lr, lam=options.lam, s_min=options.s_min,
                             zero_start=options.zero_start, scale_lr_B=options.scale_lr_B,
                             penalty=options.penalty)
    # Plain LoRA: A starts as nn.Linear's weight does, B at 0, and both get AdamW.
    model.requires_grad_(False)
    for name, layer in folora.find_targets(model, targets(options), options.rank).items():
        A0 = torch.nn.Linear(layer.in_features, options.rank, bias=False).weight.detach()
        model.set_submodule(name, folora.LoRALinear(layer, A0))
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, options.lr, weight_decay=0.0)


def dense_penalty(options, model, C_pre):
    """P, the penalty of SAdam, by its definition and for plain LoRA, whose A moves everywhere: a
    function that returns its value. It keeps H (d_in, d_in) for each input of a layer."""
    layers = []
    H = {id(C): folora.with_ridge(folora.unit_energy(C), TAU).to(model.device)
         for C in C_pre.values()}
    for name, C in C_pre.items():
        layer = model.get_submodule(name)
        energy = folora.energy(layer.weight.float(), H[id(C)])               # R(W0)
        layers.append((layer, H[id(C)], energy))

    def penalty():
        shares = [folora.energy(layer.scaling * layer.lora_B @ layer.lora_A, H) / energy
                  for layer, H, energy in layers]
        return 0.5 * options.penalty * sum(shares)

    return penalty


# ---- Training ------------------------------------------------------------------------------------

def train(options, model, optimizer, examples, held_out, out, texts=(), penalty=None):
    """The loop. Every --log-every steps it measures the drift on the texts in `held_out`, and
    writes a checkpoint and metrics.jsonl. `texts` are those of --kl. `penalty` is dense_penalty's:
    SAdam has its own."""
    batches = data_order(len(examples), options.batch_size, options.epochs, options.max_steps,
                         options.seed)
    done, lines = resume(out, model, optimizer)
    recompute(model, options.gradient_checkpointing)
    bar = tqdm(range(done, len(batches)), f"train {options.method}", disable=PROCESS > 0)
    for step in bar:
        # The learning rate of this step.
        lr = options.lr * schedule(step, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The gradient of the loss on one batch, and with --kl of the KL on four old texts.
        batch = [examples[i] for i in batches[step]]
        old = []
        if options.kl:
            old = [texts[(4 * step + i) % len(texts)] for i in range(4)]
        loss, norm = gradients(model, optimizer, batch, options.micro_batch_size, options.kl, old)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"step {step + 1}: loss {loss}, norm {norm}: lower --lr")

        # The step. Like SAdam's, the gradient of the penalty is not clipped.
        if penalty:
            penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
        forgetting, shown = None, {"loss": f"{loss:.3f}"}
        if isinstance(optimizer, folora.SAdam):
            forgetting = optimizer.forgetting()
            shown["forgetting"] = f"{forgetting:.1e}"
        bar.set_postfix(shown)

        # What is written, by the first process.
        if PROCESS > 0:
            continue
        due = (step + 1) % options.log_every == 0 or step + 1 == len(batches)
        drift = None
        if due:                                      # one text at a time, to save memory
            drift = ev.drift(model, untouched(model), held_out, batch_size=1)
        lines.append({"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm,
                      "forgetting": forgetting, "drift": drift})
        if due:
            checkpoint(out, model, optimizer, lines)
    recompute(model, False)


def schedule(step, steps, warmup=0.03):
    """Appendix B: the learning rate rises over a share of the steps, then falls on a cosine. Unlike
    transformers' schedule, it does not waste the first step on a rate of 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def data_order(count, batch_size, epochs, max_steps, seed):
    """[indices of each step's batch]: permutations, one after another, cut into full batches."""
    generator = torch.Generator().manual_seed(seed)
    steps = max_steps or max(1, epochs * count // batch_size)
    passes = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return order[:steps * batch_size].view(steps, batch_size).tolist()


def gradients(model, optimizer, batch, micro_batch_size, weight=0.0, texts=()):
    """Leave the clipped gradient of a list of examples in the parameters: (loss, gradient norm).

    The loss is the mean over all labels of the batch, to which each process and each micro-batch
    adds its share. The gradient of weight * KL(untouched || now) on the texts is added."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    labels = ev.count_labels(batch)
    total = torch.zeros((), dtype=torch.float64)
    for micro in ev.by_length(batch[PROCESS::PROCESSES], micro_batch_size):
        loss = ev.summed_nll(model, ev.collate(micro, model.device)) / labels
        loss.backward()
        total += loss.item()
    positions = max(1, sum(len(text) - 1 for text in texts))
    for some in ev.by_length(texts[PROCESS::PROCESSES], micro_batch_size):
        (weight / positions * kl_from_untouched(model, some)).backward()
    if PROCESSES > 1:
        for part in (total, *(p.grad for p in parameters)):
            dist.all_reduce(part)                    # the sum over processes
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)           # Appendix B
    return total.item(), norm.item()


def untouched(model):
    """The model before training, as a function of the same inputs: every adapter at its start. That
    is B = 0 or, where W0 has become W_res, the paper's A0 and B0, up to W_res's rounding."""
    start = {}
    for name, module in model.named_modules():
        if not isinstance(module, folora.LoRALinear):
            continue
        if module.start_A is not None:
            start[f"{name}.lora_A"] = module.start_A
            start[f"{name}.lora_B"] = module.start_B
            continue
        for part, p in module.named_parameters():    # B has a longer name where it is parametrised
            if "lora_B" in part:
                start[f"{name}.{part}"] = torch.zeros_like(p)
    return lambda **inputs: torch.func.functional_call(model, start, (), inputs)


def kl_from_untouched(model, texts):
    """KL(untouched || now), summed over the next-token positions of texts, in nat."""
    return ev.summed_kl(untouched(model), model, texts, model.device)


def recompute(model, on):
    """Gradient checkpointing: activations are computed again in the backward pass instead of being
    kept. A block does so only in training mode; what is inside it stays in evaluation mode, without
    dropout (Appendix B)."""
    if on:              # the reentrant kind gives no gradient behind frozen embeddings
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = bool(on) and hasattr(module, "gradient_checkpointing")


# ==================================================================================================
# What is not the method: options, processes, the run's directory
# ==================================================================================================

# ---- Options -------------------------------------------------------------------------------------

# What --preset sets where the command line does not. "tuned" is folora.prepare's defaults.
_PREPARE = inspect.signature(folora.prepare).parameters
TAU = _PREPARE["tau"].default
PRESETS = {
    "tuned": {name: _PREPARE[name].default for name in folora.PAPER} | {"calibration_samples": 128},
    "paper": folora.PAPER | {"calibration_samples": 2000},
}
# What --model tiny sets.
TINY = dict(data=str(ev.TINY / "train.jsonl"), rank=32, epochs=2, max_samples=2000, batch_size=16,
            micro_batch_size=8, gradient_checkpointing=0, max_length=256, calibration_samples=256,
            calibration_max_tokens=224, eval_samples=200, compare="lora")
# --lr where it is not given. tiny has to learn a task from nothing, in few steps.
LEARNING_RATES = {"tuned": 3e-3, "paper": 3e-4, "lora": 1e-3}
TINY_LEARNING_RATES = {"tuned": 2.4e-2, "paper": 6e-3, "lora": 4e-3}
# The tuned preset's --penalty with tiny.
TINY_PENALTY = 0.3
# Another value of these makes no other run.
RESUME_MAY_CHANGE = {"out", "device", "micro_batch_size", "gradient_checkpointing", "compare"}


between = ev.between                                 # an argparse type: (kind, least, greatest)
COUNT, NATURAL = between(int, 1), between(int, 0)
RATE, POSITIVE = between(float, 0), between(float, 1e-9)
FEW = between(int, 1, 100_000)                       # more texts than that are never sampled


def name(text):
    """An argparse type: "" would be the working directory, or a default."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def switch(text):
    return bool(between(int, 0, 1)(text))


def directions(text):
    return NATURAL(text) or None                     # 0: all


OPTIONS = [       # flag, type or choices, default (None: see the end of --help), text, whose it is
    ("--model", name, "tiny", "directory, hub id or short name such as Qwen2.5-1.5B [ours]"),
    ("--method", ("folora", "lora"), "folora", "lora is plain LoRA [the paper's]"),
    ("--preset", tuple(PRESETS), "tuned", "FoLoRA's setting: tuned is ours, paper the paper's"),
    ("--compare", ("lora", "no"), "no", "lora: train LoRA after FoLoRA; so with tiny [ours]"),
    ("--target-modules", name, ",".join(folora.TARGET_MODULES), "or all-linear [the paper's]"),
    ("--data", name, "openai/gsm8k:main", "hub id or .jsonl of questions and answers [ours]"),
    ("--rank", COUNT, 128, "adapter rank [the paper's]"),
    ("--lr", POSITIVE, None, "learning rate [ours; the paper has 2e-5, over 781 steps]"),
    ("--lam", POSITIVE, None, "lambda, the gamma of gate 1/2: more forgets less [the paper's]"),
    ("--s-min", between(float, 0, 1), None, "floor of the gate [ours]"),
    ("--basis-rank", directions, None, "directions in which A may move, 0: all [ours]"),
    ("--zero-start", switch, None, "1: B starts at 0; 0: at the paper's W0 A0ᵀ [ours]"),
    ("--scale-lr-B", switch, None, "1: B's learning rate follows W0's size; 0: it is A's [ours]"),
    ("--penalty", RATE, None, "weight of the penalty on the whole update; lora: 0 [ours]"),
    ("--kl", RATE, 0.0, "weight of KL(untouched || now) on 4 calibration texts a step [ours]"),
    ("--epochs", COUNT, 3, "passes over the data [ours; the paper has 1]"),
    ("--max-steps", COUNT, None, "so many steps instead of --epochs [ours]"),
    ("--max-samples", COUNT, 100_000, "the first so many examples [the paper's]"),
    ("--batch-size", COUNT, 128, "examples a step [the paper's]"),
    ("--micro-batch-size", COUNT, 16, "examples a forward pass: less memory [the paper's]"),
    ("--gradient-checkpointing", switch, True, "1: less memory, more time [ours]"),
    ("--max-length", COUNT, 512, "tokens an example [the paper's]"),
    ("--calibration", name, "self", "texts to keep: hub id, .jsonl, or self-written [the paper's]"),
    ("--calibration-samples", FEW, None, "texts; enough: 4 tokens per column of C_pre [ours]"),
    ("--calibration-max-tokens", between(int, 32), 512, "tokens of a text, at most [the paper's]"),
    ("--prepared", str, None, "run or cache of folora.prepare to take the directions from [ours]"),
    ("--passes", COUNT, 1, "parts of the layers to prepare one after another: less memory [ours]"),
    ("--task-samples", COUNT, 256, "prompts and responses behind C_task [the paper's]"),
    ("--tasks", str, None, "what to score, as for eval.py; none: its default [ours]"),
    ("--eval-samples", COUNT, 500, "rows a task [ours]"),
    ("--log-every", COUNT, 10, "steps between checkpoints and measurements of drift [ours]"),
    ("--merge", switch, False, "1: write the merged model too [ours]"),
    ("--seed", between(int, 0, 999), 0, "of calibration text, adapters, order of the data [ours]"),
    ("--dtype", ("auto", "float32", "bfloat16"), "auto", "auto: bfloat16 on a GPU [ours]"),
    ("--out", name, None, "the run's directory; none: runs/<model>-<method> [ours]"),
]


def settings_table():
    """The end of --help: what the presets and --model tiny set, an option a line."""
    columns = {preset: PRESETS[preset] | {"lr": LEARNING_RATES[preset]} for preset in PRESETS}
    columns["lora"] = {"lr": LEARNING_RATES["lora"], "penalty": 0.0}
    columns["tiny"] = TINY | {"data": "tiny/train.jsonl", "lr": TINY_LEARNING_RATES["tuned"],
                              "penalty": TINY_PENALTY}
    lines = ["what --preset, --method lora and --model tiny set:",
             " " * 26 + "".join(f"{name:>10}" for name in columns)]
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = []
        for column in columns.values():
            value = column.get(name, "")
            if value is None:
                value = "all"
            cells.append(f"{int(value) if isinstance(value, bool) else value:>10}")
        lines.append(f"  --{name.replace('_', '-'):22}" + "".join(cells))
    paper, lora = TINY_LEARNING_RATES["paper"], TINY_LEARNING_RATES["lora"]
    lines.append(f"  with tiny, --preset paper has --lr {paper}, and --method lora {lora}")
    lines.append("[ours], [the paper's]: whose default it is")
    return "\n".join(lines)


def parse_options(arguments=None):
    """What the command line says, else --model tiny, else the preset, else the default."""
    parser = ev.one_line_parser(__doc__)
    parser.epilog = settings_table()
    for flag, kind, default, text in OPTIONS:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        shown = "see below" if default is None else "%(default)s"
        if flag in ("--max-steps", "--tasks", "--out", "--prepared"):
            shown = "none"
        if isinstance(default, bool):
            shown = int(default)
        parser.add_argument(flag, default=default, help=f"{text} ({shown})", **how)
    # The model, method and preset decide on defaults of other options: parse them first.
    chosen = parser.parse_args(arguments)
    is_tiny = ev.is_tiny(chosen.model)
    rates = TINY_LEARNING_RATES if is_tiny else LEARNING_RATES
    lr = rates["lora" if chosen.method == "lora" else chosen.preset]
    parser.set_defaults(**PRESETS[chosen.preset])
    if is_tiny:
        parser.set_defaults(**TINY)
        if chosen.preset == "tuned":
            parser.set_defaults(penalty=TINY_PENALTY)
    if chosen.method == "lora":
        parser.set_defaults(penalty=0.0)             # plain LoRA has none
    parser.set_defaults(lr=lr, tasks=ev.default_tasks(chosen.model),
                        out=f"runs/{Path(chosen.model).resolve().name}-{chosen.method}")
    return parser.parse_args(arguments)


def lora_options(options):
    """The same run with plain LoRA, at LoRA's learning rate, in a directory of its own."""
    rates = TINY_LEARNING_RATES if ev.is_tiny(options.model) else LEARNING_RATES
    changed = dict(method="lora", lr=rates["lora"], kl=0.0, penalty=0.0, prepared=None,
                   out=f"{options.out}/lora")
    return argparse.Namespace(**vars(options) | changed)


def names_given(arguments=None):
    """The options that stand on the command line."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for flag, *_ in OPTIONS:
        parser.add_argument(flag)
    return vars(parser.parse_args(arguments)).keys()


# Where the first option stands, the others would do nothing.
IDLE = {
    "--method lora": ("preset", "lam", "s_min", "basis_rank", "zero_start", "scale_lr_B",
                      "task_samples", "prepared", "passes"),
    "--method lora and neither --kl nor --penalty": ("calibration", "calibration_samples"),
    "--max-steps": ("epochs",),
}


def check_combination(options, given):
    """Refuse what stands on the command line (`given`) and would do nothing: its user believes that
    it does something."""
    lora = options.method == "lora"
    here = {"--method lora": lora, "--max-steps": options.max_steps,
            "--method lora and neither --kl nor --penalty":
                lora and not options.kl and not options.penalty}
    for reason, names in IDLE.items():
        idle = [f"--{name.replace('_', '-')}" for name in names if here[reason] and name in given]
        ev.need(not idle, f"{', '.join(idle)} would do nothing with {reason}: leave it out")
    ev.need(not (lora and "compare" in given and options.compare == "lora"),
            "--compare lora needs --method folora")


def check_size(options, count):
    """Refuse a batch that has an example twice, and an order of the data that fills the memory."""
    ev.need(options.batch_size <= count, f"--batch-size {options.batch_size} exceeds the {count} "
            f"examples of {options.data}: give a lower one")
    steps = options.max_steps or options.epochs * count // options.batch_size
    ev.need(steps * options.batch_size <= 1e7, f"{steps} steps of --batch-size "
            f"{options.batch_size} exceed 1e7 examples: give a lower --max-steps or --epochs")


def check_lengths(options, tasks):
    """Refuse texts that are longer than what the model was made for, before it is loaded."""
    tokenizer, config = ev.judge(options.model)
    ev.check_prompts(tasks, tokenizer, config)
    positions = ev.positions(config)
    ev.need(options.max_length <= positions,
            f"--max-length {options.max_length} exceeds the model's {positions} positions")
    ev.need(options.calibration_max_tokens < positions,          # a token that begins a text, too
            f"--calibration-max-tokens {options.calibration_max_tokens} must be below the model's "
            f"{positions} positions")


def resolve(options):
    """Replace "auto" by what it means here. Each process of torchrun takes its own GPU."""
    options.device, options.dtype = ev.pick_device(options.dtype)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if PROCESSES > 1:                                # gloo sums the loss, which is on the CPU
        backend = "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend)


# ---- The run's directory -------------------------------------------------------------------------

# A finished run needs these no longer.
LEFT_OVER = ("checkpoint.pt",)


def judge_directory(options):
    """Say in one line why this run may not be kept in --out, before any work. It may where nothing
    is yet, or where an earlier part of this run is. All else is the user's, or another run's: it
    would be overwritten, or taken for a part of this one."""
    out = Path(options.out)
    config = out / "config.json"
    if PROCESS > 0:
        return
    if not config.exists():
        above = next(path for path in (out, *out.absolute().parents) if path.exists())
        ev.need(above.is_dir() and os.access(above, os.W_OK),
                f"cannot make {out}: {above} is no directory that can be written to")
        # An interruption may have left half of a config.json under its temporary name.
        there = {path.name for path in out.glob("*")} - {"config.json.part"}
        ev.need(not there, f"{out} has no config.json of a run, and other files ({', '.join(there)}"
                "): give an empty or another --out")
        return
    with ev.blame(f"{config} is not that of a run of train_math.py: give another --out"):
        theirs = json.loads(config.read_text())
        old_options, old_files = dict(**theirs["options"]), dict(**theirs["files"])
    ours = vars(options)
    names = sorted(ours.keys() - RESUME_MAY_CHANGE)
    differ = [name for name in names if old_options.get(name) != ours[name]]
    ev.need(not differ, f"{out} holds a run with another {', '.join(differ)}: give what "
            f"{config} says, or another --out")
    changed = [name for name, was in digests(options).items() if old_files.get(name) != was]
    ev.need(not changed, f"{', '.join(changed)} has changed since {out} was begun: put back what "
            "was there, or give another --out")


def digests(options):
    """{file that the run reads: its SHA-256}. Scores of an old file must not stand beside those of
    a new one. What has been deleted since has none: a finished run does not need it."""
    sources = {options.data, options.calibration, *ev.sources_of(options.tasks).values()}
    weights = Path(ev.find_model(options.model)[0])
    files = [Path(source) for source in sources] + sorted(weights.glob("*"))
    kinds = (".json", ".jsonl", ".safetensors", ".bin", ".model", ".txt")
    return {str(file): sha256(file, file.stat().st_size, file.stat().st_mtime_ns)
            for file in files if file.is_file() and file.suffix.lower() in kinds}


@functools.cache                                     # two runs read one model
def sha256(path, size, time):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(folder):
    """What a run's files are signed with, a digest of its config.json, or None: no run is here."""
    config = folder / "config.json"
    return hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else None


def claim(out, options):
    """Make the run's directory and its config.json."""
    if PROCESS > 0:
        return
    judge_directory(options)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        save({"torch": torch.__version__, "options": vars(options), "files": digests(options)},
             out / "config.json")


def finish(out, options):
    """Remove what a finished run needs no longer, and return its scores. What this run has not
    made is not removed."""
    if PROCESS > 0:
        return {}
    path = out / "summary.json"
    summary = read(path)
    ev.need(isinstance(summary, dict) and summary.get("run") == identity(out),
            f"{path} is not this run's: delete it")
    for name in LEFT_OVER:
        if (out / name).exists() and is_ours(out / name):
            (out / name).unlink()
    return summary["scores"]


def once(path, make):
    """make()'s value, by way of a file, so that an interrupted run does not make it twice. The
    first process makes it, and the others wait for the file."""
    if PROCESS == 0 and not path.exists():
        keep(make(), path)
    while not path.exists():
        time.sleep(1)
    return kept(path)


def keep(value, path):
    """Save a value that belongs to the run in this folder, signed, if a run is there."""
    run = identity(path.parent)
    if run:
        value = {"run": run, "value": value}
    save(json.dumps(value) if path.suffix == ".json" else value, path)


def kept(path):
    """What `keep` has saved. Another run's texts, bases or weights would be used in silence."""
    value, run = read(path), identity(path.parent)
    if run is None:
        return value
    ev.need(signed(value, run), f"{path} is not this run's: delete it, to make it again")
    return value["value"]


def signed(value, run):
    return isinstance(value, dict) and value.get("run") == run


def is_ours(path):
    """Whether this run has made a file, which it may then remove."""
    try:
        return signed(read(path, mmap=True), identity(path.parent))
    except ev.UserError:                             # it cannot even be read
        return False


def save(value, path):
    """Write under another name and rename: an interruption leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    with ev.blame(f"cannot write {part} (is the disk full?)"):
        if path.suffix == ".pt":
            torch.save(value, part)
        elif isinstance(value, str):
            part.write_text(value)
        else:
            part.write_text(json.dumps(value, indent=1 if isinstance(value, dict) else None))
    part.replace(path)


def read(path, mmap=False):
    """What `save` has written. mmap: tensors stay on the disk until they are used."""
    with ev.blame(f"{path} is damaged: delete it, to make it again"):
        if path.suffix == ".json":
            return json.loads(path.read_text())
        return torch.load(path, "cpu", mmap=mmap)


def checkpoint(out, model, optimizer, lines):
    """Keep the run as it is after len(lines) steps. The checkpoint is written last: it is what
    makes these steps done."""
    save("".join(f"{json.dumps(line)}\n" for line in lines), out / "metrics.jsonl")
    adapters = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    moments = optimizer.state_dict()["state"]        # without the bases: prepared.pt has them
    keep({"step": len(lines), "lines": lines, "adapters": adapters, "moments": moments},
         out / "checkpoint.pt")


def resume(out, model, optimizer):
    """(steps done, metrics so far). Puts a checkpoint's adapters and moments in place."""
    if not (out / "checkpoint.pt").exists():
        return 0, []
    state = kept(out / "checkpoint.pt")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"]})
    model.load_state_dict(state["adapters"], strict=False)
    return state["step"], state["lines"]


if __name__ == "__main__":
    main()
