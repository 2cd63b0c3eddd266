"""Fine-tune a language model on maths with FoLoRA, and show what it learned and what it kept.

    python train_math.py                              # the embedded model, on a CPU
    python train_math.py --model Qwen2.5-1.5B         # GSM8K from the hub, on a CUDA GPU
    torchrun --nproc-per-node 4 train_math.py --model Qwen2.5-1.5B           # on four GPUs
    python train_math.py --model DIR --data FILE.jsonl --tasks gsm8k=TEST.jsonl,drift        # local

The run is kept in --out: config.json (all options), metrics.jsonl, summary.json (scores),
adapter/ (for PEFT) and, with --merge 1, merged/ (a plain Hugging Face checkpoint). The same command
goes on with an interrupted run and ends with the same numbers. Of a finished one it prints the
table. Another run needs another --out. metrics.jsonl has a line for each step:

    step           optimiser steps done
    loss           mean NLL of the batch's response tokens before the step, in nat
    lr             learning rate of A at that step
    grad_norm      norm of all gradients together, before it is clipped at 1
    drift          KL(untouched || now) in nat per token, on four held-out texts that the untouched
                   model wrote; null between two measurements
"""
import argparse
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
# What --preset and --model tiny set, where the command line does not.
PRESETS = {"tuned": dict(lam=1.0, s_min=0.0, basis_rank=96, zero_start=1, calibration_samples=128),
           "paper": dict(lam=1.0, s_min=0.3, basis_rank=0, zero_start=0, calibration_samples=2000)}
TINY = dict(data=str(ev.TINY / "train.jsonl"), rank=32, epochs=2, max_samples=2000, batch_size=16,
            micro_batch_size=8, gradient_checkpointing=0, max_length=256, calibration_samples=256,
            calibration_max_tokens=224, eval_samples=200, compare="lora")
# --lr for any model, and for tiny.
LEARNING_RATES = {"tuned": (3e-3, 1.6e-2), "paper": (3e-4, 6e-3), "lora": (1e-3, 4e-3)}
RESUME_MAY_CHANGE = {"out", "device", "micro_batch_size", "gradient_checkpointing", "compare"}
STAGES = "held_out.json untouched.json calibration.json prepared.pt checkpoint.pt".split()


# ---- options -------------------------------------------------------------------------------------

def between(kind, low, high=1e9):
    """An argparse type: a number of this kind from `low` to `high`."""
    def number(text):
        if not low <= kind(text) <= high:            # also refuses nan
            raise argparse.ArgumentTypeError(f"must be from {low} to {high:g}, not {text}")
        return kind(text)
    return number


COUNT, NATURAL, SWITCH = between(int, 1), between(int, 0), between(int, 0, 1)
RATE, POSITIVE = between(float, 0), between(float, 1e-9)
OPTIONS = [       # flag, type or choices, default (None: see the end of --help), text, whose it is
    ("--model", str, "tiny", "directory, hub id or short name such as Qwen2.5-1.5B [ours]"),
    ("--method", ("folora", "lora"), "folora", "lora is plain LoRA [the paper's]"),
    ("--preset", tuple(PRESETS), "tuned", "FoLoRA's setting: tuned is ours, paper the paper's"),
    ("--compare", ("lora", "no"), "no", "lora: train LoRA after FoLoRA; so with tiny [ours]"),
    ("--target-modules", str, ",".join(folora.TARGET_MODULES), "or all-linear [the paper's]"),
    ("--data", str, "openai/gsm8k:main", "hub id or .jsonl of questions and answers [ours]"),
    ("--rank", COUNT, 128, "adapter rank [the paper's]"),
    ("--lr", RATE, None, "learning rate [ours; the paper has 2e-5, over 781 steps]"),
    ("--lam", POSITIVE, None, "lambda, the gamma of gate 1/2: more forgets less [the paper's]"),
    ("--s-min", between(float, 0, 1), None, "floor of the gate [ours]"),
    ("--basis-rank", NATURAL, None, "directions in which A may move, 0: all [ours]"),
    ("--zero-start", SWITCH, None, "1: B starts at 0; 0: at the paper's W0 A0ᵀ [ours]"),
    ("--kl", RATE, 0.0, "weight of KL(untouched || now) on 4 calibration texts a step [ours]"),
    ("--epochs", COUNT, 3, "passes over the data [ours; the paper has 1]"),
    ("--max-steps", COUNT, None, "so many steps instead of --epochs [ours]"),
    ("--max-samples", COUNT, 100_000, "the first so many examples [the paper's]"),
    ("--batch-size", COUNT, 128, "examples a step [the paper's]"),
    ("--micro-batch-size", COUNT, 16, "examples a forward pass: less memory [the paper's]"),
    ("--gradient-checkpointing", SWITCH, 1, "1: less memory, more time [ours]"),
    ("--max-length", COUNT, 512, "tokens an example [the paper's]"),
    ("--calibration", str, "self", "texts to keep: hub id, .jsonl, or self-written [the paper's]"),
    ("--calibration-samples", COUNT, None, "texts; enough: 4 tokens per column of C_pre [ours]"),
    ("--calibration-max-tokens", between(int, 32), 512, "tokens of a text, at most [the paper's]"),
    ("--task-samples", COUNT, 256, "prompts and responses behind C_task [the paper's]"),
    ("--tasks", str, None, "what to score, as for eval.py; none: its default [ours]"),
    ("--eval-samples", COUNT, 500, "rows a task [ours]"),
    ("--log-every", COUNT, 10, "steps between checkpoints and measurements of drift [ours]"),
    ("--merge", SWITCH, 0, "1: write the merged model too [ours]"),
    ("--seed", between(int, 0, 999), 0, "of calibration text, adapters, order of the data [ours]"),
    ("--dtype", ("auto", "float32", "bfloat16"), "auto", "auto: bfloat16 on a GPU [ours]"),
    ("--out", str, None, "the run's directory; none: runs/<model>-<method> [ours]")]


def parse_options(arguments=None):
    """What the command line says, else --model tiny, else the preset, else the default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="What is "
        f"None above: --preset sets {PRESETS}\n--lr is {LEARNING_RATES}, for any model and tiny\n"
        f"--model tiny sets {TINY}\n[ours], [the paper's]: whose default it is")
    parser.error = lambda message: ev.need(False, message)       # without the usage: one line
    for flag, kind, default, text in OPTIONS:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(flag, default=default, help=f"{text} (%(default)s)", **how)
    chosen = parser.parse_args(arguments)
    tiny, method = ev.is_tiny(chosen.model), chosen.method
    lr = LEARNING_RATES["lora" if method == "lora" else chosen.preset][tiny]
    parser.set_defaults(**PRESETS[chosen.preset] | (TINY if tiny else {}), lr=lr,
                        tasks=ev.default_tasks(chosen.model),
                        out=f"runs/{Path(chosen.model).name}-{method}")
    return parser.parse_args(arguments)


def resolve(options):
    """Replace "auto" by what it means here. Each process of torchrun takes its own GPU."""
    options.device, options.dtype = ev.pick_device(options.dtype)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if PROCESSES > 1:                                # gloo sums the loss, which is on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")


# ---- the run's directory -------------------------------------------------------------------------

def claim(out, options):
    """Make the run's directory and its config.json, or say in one line why not."""
    out.mkdir(parents=True, exist_ok=True)
    config, ours = out / "config.json", vars(options)
    if config.exists():
        theirs = read(config).get("options", {})
        differ = [n for n in sorted(ours.keys() - RESUME_MAY_CHANGE) if theirs.get(n) != ours[n]]
        ev.need(not differ, f"{out} holds a run with another {', '.join(differ)}: give what "
                f"{config} says, or another --out")
    once(config, lambda: {"torch": torch.__version__, "options": ours})


def save(value, path):
    """Write under another name and rename: an interruption leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    with ev.blame(f"cannot write {part} (is the disk full?)"):
        if path.suffix == ".pt":
            torch.save(value, part)
        else:
            indent = 1 if isinstance(value, dict) else None
            part.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent))
    part.replace(path)


def read(path):
    """What `save` has written."""
    with ev.blame(f"{path} is damaged: delete it (config.json: all of --out), to make it again"):
        return json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, "cpu")


def once(path, make):
    """make()'s value, by way of a file, so that an interrupted run does not make it twice. The
    first process makes it, and the others wait for the file."""
    if PROCESS == 0 and not path.exists():
        save(make(), path)
    while not path.exists():
        time.sleep(1)
    return read(path)


# ---- preparation ---------------------------------------------------------------------------------

def load(options):
    """(model, tokenizer, encoded examples, tasks). Mistakes in files show before the download."""
    ev.need(not ev.find_model(options.model)[1], "--model is an adapter: train it with --merge 1")
    tasks = ev.load_tasks(options.tasks, options.eval_samples)
    ev.need(tasks, "nothing to score: give --tasks")
    if options.calibration != "self":
        ev.load_tasks(f"prose={options.calibration}", options.calibration_samples)
    pairs = ev.to_pairs(ev.read_rows(options.data, limit=options.max_samples), options.data)
    model, tokenizer = ev.load_model(options.model, options.device, options.dtype)
    with ev.blame("--target-modules or --rank"):
        folora.find_targets(model, options.target_modules.split(","), options.rank)
    return model, tokenizer, ev.encode_all(tokenizer, pairs, options.max_length), tasks


def calibration_texts(options, model, tokenizer):
    """The token lists behind C_pre."""
    longest, count = options.calibration_max_tokens, options.calibration_samples
    if options.calibration != "self":
        texts = ev.load_tasks(f"prose={options.calibration}", count)["prose"]
        return [tokenizer(text)["input_ids"][:longest] for text in texts]
    with tqdm(total=count, desc="calibration text") as bar, ev.blame(options.model):
        texts = folora.sample_calibration(model, tokenizer, count, min(128, longest), longest,
                                          seed=options.seed, progress=bar.update)
    return [text.tolist() for text in texts]


def covariances(options, model, sequences, name):
    """C_pre or C_task over token lists, with a bar. Neither a loss nor most logits are needed."""
    batches = ev.by_length(sequences, options.micro_batch_size)
    how = {"labels": None, "use_cache": False, "logits_to_keep": 1}
    inputs = (ev.collate(batch, model.device) | how for batch in tqdm(batches, desc=name))
    return folora.collect_covariances(model, inputs, options.target_modules.split(","))


def solve(options, model, texts, examples):
    """FoLoRA's bases, as folora.prepare finds them, with bars."""
    C_pre = covariances(options, model, texts, "C_pre")
    task = [example["ids"] for example in examples[:options.task_samples]]
    C_task = covariances(options, model, task, "C_task")
    with tqdm(total=len({id(C) for C in C_pre.values()}), desc="eigenproblems") as bar:
        return folora.decompose(C_pre, C_task, options.rank, basis_rank=options.basis_rank,
                                progress=bar.update, device=model.device)


def add_adapters(options, model, bases=None):
    """Adapters in place; returns the optimiser. FoLoRA needs `bases` from solve."""
    if options.method == "folora":
        return folora.attach(model, bases, options.lr, None, options.lam, options.s_min,
                             options.zero_start)
    model.requires_grad_(False)
    targets = folora.find_targets(model, options.target_modules.split(","), options.rank)
    for name, base in targets.items():               # LoRA's start: A as in nn.Linear, B = 0
        A0 = torch.nn.Linear(base.in_features, options.rank, bias=False).weight.detach()
        B0 = A0.new_zeros(base.out_features, options.rank)
        model.set_submodule(name, folora.LoRALinear(base, A0, B0))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr,
                             weight_decay=0.0)


# ---- training ------------------------------------------------------------------------------------

def schedule(step, steps, warmup=0.03):
    """Appendix B: the learning rate rises over a share of the steps, then falls on a cosine."""
    rise = max(1, round(warmup * steps))
    fall = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    return (step + 1) / rise if step < rise else fall


def data_order(count, batch_size, epochs, max_steps, seed):
    """[indices of each step's batch]: permutations, one after another, cut into full batches."""
    generator = torch.Generator().manual_seed(seed)
    steps = max_steps or max(1, epochs * count // batch_size)
    epochs = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[:steps * batch_size].view(steps, batch_size).tolist()


def kl_from_untouched(model, texts):
    """KL(untouched || now), summed over the next-token positions of texts, in nat. The untouched
    model has B = 0 or, if W0 has become W_res, the start's A and B, up to W_res's rounding."""
    batch, start = ev.collate(texts, model.device), {}
    for name, m in model.named_modules():
        if isinstance(m, folora.LoRALinear):
            A, B = m.start or (m.lora_A, torch.zeros_like(m.lora_B))
            start |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    untouched = lambda **inputs: torch.func.functional_call(model, start, (), inputs)
    with torch.no_grad():
        log_p = ev.logits_of(untouched, batch)[0].log_softmax(-1)
    return ev.summed_kl(log_p, ev.logits_of(model, batch)[0])


@torch.no_grad()
def drift(model, texts):
    """KL(untouched || now) in nat per token of the texts, one text at a time to save memory."""
    total = sum(kl_from_untouched(model, [text]).item() for text in texts)
    return total / sum(len(text) - 1 for text in texts)


def gradients(model, optimizer, batch, micro_batch_size, weight=0.0, texts=()):
    """Leave the clipped gradient of a list of examples in the parameters: (loss, gradient norm).
    The loss is the mean over all labels of the batch, to which each process and each micro-batch
    adds its share. The gradient of weight * KL(untouched || now) on the texts is added."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    labels = sum(label != -100 for e in batch for label in e["labels"][1:])
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
    return total.item(), torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()


def recompute(model, on):
    """Gradient checkpointing. A layer does it only in training mode; what is inside it stays in
    evaluation mode, without dropout."""
    if on:              # the reentrant kind gives no gradient behind frozen embeddings
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.training = bool(on) and hasattr(module, "gradient_checkpointing")


def train(options, model, optimizer, examples, held_out, out, texts=()):
    """The loop. Every --log-every steps it measures the drift on the texts in `held_out`, and
    writes a checkpoint and metrics.jsonl. `texts` are those of --kl."""
    batches = data_order(len(examples), options.batch_size, options.epochs, options.max_steps,
                         options.seed)
    saved, done, lines = out / "checkpoint.pt", 0, []
    if saved.exists():
        state = read(saved)
        done, lines = state["step"], state["lines"]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"]})
        model.load_state_dict(state["adapters"], strict=False)
    recompute(model, options.gradient_checkpointing)
    bar = tqdm(range(done, len(batches)), f"train {options.method}", disable=PROCESS > 0)
    for step in bar:
        lr = options.lr * schedule(step, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [examples[i] for i in batches[step]]
        some = [texts[(4 * step + i) % len(texts)] for i in range(4) if options.kl]
        loss, norm = gradients(model, optimizer, batch, options.micro_batch_size, options.kl, some)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"step {step + 1}: loss {loss}, norm {norm}: lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        if PROCESS > 0:                                 # the first process writes the files
            continue
        due = (step + 1) % options.log_every == 0 or step + 1 == len(batches)
        lines.append({"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm,
                      "drift": drift(model, held_out) if due else None})
        bar.set_postfix(loss=f"{loss:.3f}")
        if due:                                      # the checkpoint last: it ends these steps
            save("".join(f"{json.dumps(line)}\n" for line in lines), out / "metrics.jsonl")
            adapters = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
            save({"step": step + 1, "lines": lines, "adapters": adapters,
                  "moments": optimizer.state_dict()["state"]}, saved)       # not the bases
    recompute(model, False)


# ---- the run -------------------------------------------------------------------------------------

def fine_tune(options, out, model, tokenizer, examples, tasks, before):
    """From the loaded model to summary.json, {"scores": {"untouched": ..., method: ...}}."""
    texts, bases, longest = (), None, min(256, options.calibration_max_tokens)
    write = lambda: [text.tolist() for text in ev.held_out(model, tokenizer, longest)]
    held_out = once(out / "held_out.json", write)
    before = once(out / "untouched.json", lambda: before or ev.evaluate(model, tokenizer, tasks))
    if options.method == "folora" or options.kl:
        texts = once(out / "calibration.json", lambda: calibration_texts(options, model, tokenizer))
    if options.method == "folora":
        bases = once(out / "prepared.pt", lambda: solve(options, model, texts, examples))
    torch.manual_seed(options.seed)
    train(options, model, add_adapters(options, model, bases), examples, held_out[:4], out, texts)
    if PROCESS > 0:
        return
    folora.save_adapter(model, out / "adapter")
    tokenizer.save_pretrained(out / "adapter")
    model = folora.merge(model)
    if options.merge:
        model.save_pretrained(out / "merged")
        tokenizer.save_pretrained(out / "merged")
    reference, _ = ev.load_model(options.model, model.device, model.dtype)
    after = ev.evaluate(model, tokenizer, tasks, reference, held_out)
    save({"scores": {"untouched": before | ev.summarise(before, before),
                     options.method: after | ev.summarise(after, before)}}, out / "summary.json")


def run(options, before=None):
    """One method, unless it is finished: its scores and the untouched model's, or `before`."""
    out = Path(options.out)
    summary = out / "summary.json"
    loaded = () if summary.exists() else load(options)       # mistakes show before out is made
    if PROCESS == 0:
        claim(out, options)
    if loaded:
        fine_tune(options, out, *loaded, before)
    if PROCESS > 0:
        return {}
    for name in STAGES:
        (out / name).unlink(missing_ok=True)
    return read(summary)["scores"]


@ev.one_line
def main(arguments=None):
    """The run, and with --compare lora the same with LoRA; the first process prints the table."""
    options = parse_options(arguments)
    resolve(options)
    scores = run(options)
    if options.method == "folora" and options.compare == "lora":
        lr, out = LEARNING_RATES["lora"][ev.is_tiny(options.model)], f"{options.out}/lora"
        lora = argparse.Namespace(**vars(options) | dict(method="lora", lr=lr, kl=0.0, out=out))
        scores |= run(lora, scores.get("untouched"))
    if PROCESS == 0:
        print(ev.table(scores))


if __name__ == "__main__":
    main()
