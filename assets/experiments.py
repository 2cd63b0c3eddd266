"""The README's measurements. A run is a command line of train_math.py, or a baseline in its loop.

    python assets/experiments.py smollm2 --model DIR --data TRAIN.jsonl --test TEST.jsonl
    python assets/experiments.py report                   # tables and a figure from the JSON files
    python assets/experiments.py gpu --model Qwen2.5-1.5B --harness ifeval,mmlu

The searches (smollm2, gemma3, tiny) run every setting once, with seed 0. From them, smollm2-fresh
and gemma3-fresh take each method's undominated settings: those that no other setting of the same
method beats in both NLL and KL. They run these with three other seeds, other test solutions and
other held-out text. smollm2-long trains ten times as long. A suite writes assets/<suite>.json; an
interrupted one goes on where it was. Each trained update is also scored after a scaling by 0.7,
0.5 and 0.35. Runs share texts, covariances and bases on disk.
"""
import argparse
import copy
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import baselines  # noqa: E402

import eval as ev  # noqa: E402
import folora  # noqa: E402
import train_math  # noqa: E402

CACHE = HERE.parent / "runs" / "experiments"
QUESTIONS = {"nq_open": "Answer these questions:\n\nQ: {}?\nA:", "webqs": "Question: {}\nAnswer:"}
# What the texts behind the covariances, and what the bases depend on.
TEXTS = ("model", "data", "seed", "dtype", "calibration", "calibration_samples",
         "calibration_max_tokens", "task_samples", "max_samples", "max_length")
BASES = (*TEXTS, "rank", "tau", "basis_rank")
REAL = ("--rank 32 --max-steps 40 --batch-size 8 --micro-batch-size 4 --calibration-samples 80 "
        "--calibration-max-tokens 160 --task-samples 128 --dtype bfloat16 --log-every 1000 "
        "--compare no --gradient-checkpointing 0 --eval-samples ")
SUITES = {"tiny": "--max-steps 160 --batch-size 8 --eval-samples 100 --log-every 1000 --compare no "
                  "--tasks gsm8k=tiny/test.jsonl,nll=tiny/test.jsonl,facts,sort,reverse,sums,drift",
          "smollm2": REAL + "64", "smollm2-fresh": REAL + "250",
          "smollm2-long": REAL.replace("steps 40", "steps 400") + "250",
          "gemma3": REAL + "64", "gemma3-fresh": REAL + "250"}
FRESH_TEST, FRESH_TEXT = slice(64, 192), dict(samples=32, seed=ev.HELD_OUT_SEED + 1)
SCALES = (1.0, 0.7, 0.5, 0.35)


# ---- changes to FoLoRA that no option of train_math.py makes: (optimizer, options) -> None -------

def spectral(optimizer):
    return [group for group in optimizer.param_groups if group["basis"] is not None]


def frozen_A(optimizer, options):
    """A stays at its start."""
    for group in spectral(optimizer):
        group["scale"] = 0.0


def plain_A(optimizer, options):
    """A is trained by plain Adam in its own coordinates."""
    for group in spectral(optimizer):
        group["basis"] = group["gate"] = None


def slow_A(optimizer, options):
    """A's learning rate is a third of B's."""
    for group in optimizer.param_groups:
        if group["params"][0].shape[0] == options.rank:
            group["scale"] = 1 / 3


def one_lr(optimizer, options):
    """A and B have the same learning rate, as in the paper, also from B = 0."""
    for group in optimizer.param_groups:
        group["scale"] = 1.0


CHANGES = {"A frozen": frozen_A, "plain Adam": plain_A, "A slow": slow_A, "one lr": one_lr}


# ---- runs ----------------------------------------------------------------------------------------

def options_of(suite, flags, seed, method="folora"):
    base = [] if method == "folora" else ["--method", "lora"]
    options = train_math.parse_options([*suite, *base, *flags, "--seed", str(seed)])
    train_math.resolve(options)
    return options


@functools.lru_cache(maxsize=1)
def loaded(suite, fresh):
    """What all runs of a suite share."""
    options = options_of(suite, [], 0)
    model, tokenizer, examples, tasks = train_math.load(options)
    if fresh:
        tasks["nll"] = tasks["nll"][FRESH_TEST]
    answers = {name: [with_answer(tokenizer, form, *pair) for pair in tasks.pop(name)]
               for name, form in QUESTIONS.items() if name in tasks}
    length, more = min(256, options.calibration_max_tokens), FRESH_TEXT if fresh else {}
    texts = cached(options, TEXTS, "fresh text" if fresh else "held-out text",
                   lambda: ev.held_out(model, tokenizer, length, **more))
    batches = [{"input_ids": text[None], "use_cache": False} for text in texts]
    return SimpleNamespace(model=model, tokenizer=tokenizer, examples=examples, tasks=tasks,
                           texts=texts, answers=answers,
                           C=folora.collect_covariances(model, batches))


def with_answer(tokenizer, form, question, answers):
    """{"ids", "labels"} of a question and its first answer, which bears the loss. A small model has
    almost no exact answer to lose, but the loss of the right answers can rise."""
    question = form.format(question)
    prompt, ids = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answers[0]}"))
    return {"ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]}


@torch.inference_mode()
def hidden_cka(shared, model):
    """Linear CKA of the last hidden states of the untouched model and of `model`, on held-out text:
    |Xᵀ Y|² / (|Xᵀ X| |Yᵀ Y|), where X and Y (tokens, d) have columns of mean 0. 1: alike."""
    batch = ev.collate([text.tolist() for text in shared.texts], model.device)
    real, ids = batch["attention_mask"].bool(), batch["input_ids"]
    X, Y = (m.get_decoder()(ids)[0][real].double() for m in (shared.model, model))
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return ((X.mT @ Y).norm() ** 2 / ((X.mT @ X).norm() * (Y.mT @ Y).norm())).item()


@torch.no_grad()
def penalty(shared, model):
    """E|ΔW x|² / E|W0 x|² on held-out text, the forgetting penalty, as a mean over the layers."""
    shares = []
    for name, C in shared.C.items():
        W0, W = (m.get_submodule(name).weight.float() for m in (shared.model, model))
        energies = [((M @ C.to(M.device)) * M).sum() for M in (W - W0, W0)]     # tr(M C Mᵀ)
        shares.append((energies[0] / energies[1]).item())
    return statistics.mean(shares)


@torch.no_grad()
def scaled(shared, exact, factor):
    """The untouched model plus a factor times the update in `exact`, rounded to the dtype."""
    model = copy.deepcopy(shared.model)
    for name in shared.C:
        W0, W = (m.get_submodule(name).weight for m in (model, exact))
        W0.copy_(W0 + factor * (W - W0))
    return model


def scores_of(shared, model, whole=True):
    """The scores of a model, or the few that take little time."""
    tasks = {name: pairs for name, pairs in shared.tasks.items()
             if whole or name in ("nll", "drift", "prose")}
    scores = ev.evaluate(model, shared.tokenizer, tasks, shared.model, shared.texts)
    scores |= ev.summarise(scores)
    scores |= {"penalty": penalty(shared, model), "cka": hidden_cka(shared, model)}
    if whole:
        scores |= {f"{n} answers": ev.mean_nll(model, some) for n, some in shared.answers.items()}
    return {name: float(f"{score:.5g}") for name, score in scores.items()}


def cached(options, names, kind, make):
    """make()'s value, kept on disk under the options that it depends on. Other processes wait."""
    key = json.dumps([kind, *(getattr(options, name) for name in names)])
    path = CACHE / f"{kind}-{hashlib.sha1(key.encode()).hexdigest()[:12]}.pt"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            train_math.save(make(), path)
    return torch.load(path)


def texts_of(shared, options):
    """The calibration texts."""
    make = lambda: train_math.calibration_texts(options, shared.model, shared.tokenizer)
    return cached(options, TEXTS, "texts", make)


def covariances(shared, options):
    """(C_pre, C_task)"""
    def make():
        texts = texts_of(shared, options)
        task = [example["ids"] for example in shared.examples[:options.task_samples]]
        return [train_math.covariances(options, shared.model, some, name)
                for name, some in (("C_pre", texts), ("C_task", task))]
    return cached(options, TEXTS, "covariances", make)


def bases(shared, options):
    make = lambda: folora.decompose(*covariances(shared, options), options.rank, options.tau,
                                    options.basis_rank or None)
    return cached(options, BASES, "bases", make)


def trained(shared, options, method, change):
    """One training run: (the merged model in float32, seconds a step)."""
    model = copy.deepcopy(shared.model)
    if method in baselines.STARTS:
        C_pre = covariances(shared, options)[0] if method in baselines.NEEDS_C_PRE else None
        torch.manual_seed(options.seed)
        optimizer = baselines.add_adapters(method, model, options, C_pre)
    else:
        solved = bases(shared, options) if method == "folora" else None
        torch.manual_seed(options.seed)
        optimizer = train_math.add_adapters(options, model, solved)
    for name in (change or "").split(", "):
        if name in CHANGES:
            CHANGES[name](optimizer, options)
    texts = texts_of(shared, options) if options.kl else ()
    # Replay takes the place of the KL penalty in the loop: a loss on old texts, with a weight.
    loss = baselines.replay if change == "replay" else train_math.kl_from_untouched
    start, probe = time.time(), lambda model: None
    with tempfile.TemporaryDirectory() as out, \
            mock.patch.object(train_math, "kl_from_untouched", loss):
        train_math.train(options, model, optimizer, shared.examples, probe, Path(out), texts)
    return folora.merge(model.float()), (time.time() - start) / (options.max_steps or 1)


def run(suite, fresh, method, flags, change, seed):
    """One training run and its scores, as a row of the JSON."""
    shared, options = loaded(suite, fresh), options_of(suite, flags, seed, method)
    exact, seconds = trained(shared, options, method, change)
    scores = {str(s): scores_of(shared, scaled(shared, exact, s), s == 1.0) for s in SCALES}
    return {"method": method, "flags": list(flags), "change": change, "seed": seed,
            "seconds_a_step": round(seconds, 2), "scores": scores.pop("1.0"), "scaled": scores}


def untouched(suite, fresh):
    shared = loaded(suite, fresh)
    return scores_of(shared, shared.model)


def key(row):
    return json.dumps([row[name] for name in ("method", "flags", "change", "seed")])


def read(name):
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def write(results, name):
    """JSON with one line a run, replaced as a whole."""
    part = HERE / f"{name}.part"
    part.write_text(json.dumps(results, ensure_ascii=False).replace('{"method"', '\n{"method"'))
    part.replace(HERE / f"{name}.json")


def run_all(name, suite, wanted, workers):
    """Run what assets/<name>.json lacks of `wanted`, [(method, flags, change, seed)]."""
    results, fresh, failed = read(name), "-" in name, None
    done = {key(row) for row in results["runs"]}
    wanted = [w for w in wanted if json.dumps(w) not in done]
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        if "untouched" not in results:
            results["untouched"] = pool.submit(untouched, suite, fresh).result()
        futures = [pool.submit(run, suite, fresh, *w) for w in wanted]
        for future in tqdm(as_completed(futures), total=len(futures), desc=name):
            failed = future.exception() or failed
            results["runs"] += [] if future.exception() else [future.result()]
            write(results, name)
    if failed:                                             # only now: what the others found is kept
        raise failed


def gpu(options):
    """A larger model, one epoch, by the scripts alone: LoRA, LoRA + KL, FoLoRA as the paper's and
    as ours. It prints and keeps what eval.py prints."""
    kinds = {"lora": ["--method", "lora"], "lora-kl": ["--method", "lora", "--kl", "1"],
             "paper": ["--preset", "paper"], "folora": []}
    outs = [str(CACHE / "gpu" / kind) for kind in kinds]
    given = ["--epochs", "1", "--compare", "no", "--data", options.data, *options.more]
    for out, flags in zip(outs, kinds.values()):
        train_math.main(["--model", options.model, "--out", out, *given, *flags])
    harness = ["--harness", options.harness] if options.harness else []
    ev.main([options.model, *outs, *harness])


# ---- what is run ---------------------------------------------------------------------------------

def grid(method, change=None, **swept):
    """[(method, flags, change)] of all combinations: grid("lora", lr="1e-3 2e-3", kl="1")."""
    flags = [f"--{name.replace('_', '-')}" for name in swept]
    return [(method, [part for pair in zip(flags, values) for part in pair], change)
            for values in itertools.product(*(texts.split() for texts in swept.values()))]


MLP = "gate_proj,up_proj,down_proj"
METHODS = {                       # {label: settings of the searches on SmolLM2 and Gemma}
    "LoRA": grid("lora", lr="3e-4 5e-4 1e-3 2e-3 4e-3"),
    "LoRA, rank 8": grid("lora", rank="8", lr="5e-4 1e-3 2e-3 4e-3"),
    "LoRA, MLP alone": grid("lora", target_modules=MLP, lr="5e-4 1e-3 2e-3 4e-3"),
    "LoRA + replay": grid("lora", "replay", lr="1e-3 2e-3 4e-3", kl="0.3 1 3"),
    "LoRA + KL": grid("lora", lr="1e-3 2e-3 4e-3", kl="0.3 1 3 10 30")
    + grid("lora", lr="2e-3", kl="1 3", kl_texts="2 8"),
    "MiLoRA": grid("milora", lr="1e-4 3e-4 5e-4 1e-3"),
    "CorDA": grid("corda", lr="1e-4 2e-4 3e-4 1e-3"),
    "OPLoRA": grid("oplora", lr="3e-4 1e-3 2e-3 4e-3"),
    "LoRA-Null": grid("lora-null", lr="1e-4 2e-4 3e-4 1e-3"),
    "LoRA-Null v2": grid("lora-null-v2", lr="1e-3 3e-3 6e-3 1.2e-2"),
    "FoLoRA, the paper's": grid("folora", preset="paper", lr="1e-4 3e-4 6e-4 1e-3"),
    "FoLoRA": grid("folora", basis_rank="32 64 128 256", lam="1", lr="3e-3")
    + grid("folora", basis_rank="128", lam="1", lr="1.5e-3 6e-3 1.2e-2"),
    "FoLoRA + KL": grid("folora", basis_rank="128 256 0", lam="1", lr="3e-3", kl="1 3 10")
    + grid("folora", basis_rank="256", lam="1", lr="6e-3", kl="1 3 10")}
TINY = {
    "LoRA": grid("lora", lr="1e-3 2e-3 4e-3 8e-3"),
    "LoRA + KL": grid("lora", lr="2e-3 4e-3", kl="0.3 1 3 10"),
    "MiLoRA": grid("milora", lr="1e-3 2e-3 4e-3 8e-3"),
    "CorDA": grid("corda", lr="1e-3 2e-3 4e-3 8e-3"),
    "OPLoRA": grid("oplora", lr="2e-3 4e-3 8e-3 1.6e-2"),
    "LoRA-Null": grid("lora-null", lr="1e-3 2e-3 4e-3 8e-3"),
    "LoRA-Null v2": grid("lora-null-v2", lr="4e-3 8e-3 1.6e-2 3.2e-2"),
    "FoLoRA, the paper's": grid("folora", preset="paper", lr="2e-3 4e-3 8e-3 1.6e-2"),
    "FoLoRA": grid("folora", basis_rank="128", lam="1", lr="1.5e-3 3e-3 6e-3 1.2e-2 2.4e-2"),
    "FoLoRA + KL": grid("folora", basis_rank="128", lam="1", lr="1.2e-2 2.4e-2", kl="0.3 1 3 10")}
LONG = {
    "LoRA": grid("lora", lr="5e-4 1e-3"),
    "LoRA + KL": grid("lora", lr="5e-4 1e-3", kl="1 3"),
    "A frozen": grid("folora", "A frozen", basis_rank="128", lam="1", lr="1e-3 3e-3"),
    "FoLoRA": grid("folora", basis_rank="64 128", lam="1", lr="1.5e-3 3e-3"),
    "FoLoRA + KL": grid("folora", basis_rank="128 256", lam="1", lr="3e-3", kl="1 3")}
# Settings outside the fronts, which answer a question each.
ONE_LR, OURS = dict(preset="paper", zero_start="1"), dict(lam="1", lr="3e-3")
PARTS = {
    "tiny": grid("folora", basis_rank="64", lam="1", lr="1.2e-2")
    + grid("folora", basis_rank="128", lam="10", lr="1.2e-2")
    + grid("folora", basis_rank="128", lam="1", lr="1.2e-2", zero_start="0"),
    "smollm2": grid("folora", "one lr", **ONE_LR, lam="1 3 10 30", s_min="0", lr="3e-3")
    + grid("folora", "one lr", **ONE_LR, lr="3e-3")
    + grid("folora", "one lr, A slow", **ONE_LR, lam="30", s_min="1", lr="3e-3")
    + grid("folora", "one lr, A slow, plain Adam", **ONE_LR, lam="30", s_min="0", lr="3e-3")
    + grid("folora", "one lr, A frozen", **ONE_LR, lam="30", s_min="0", lr="3e-3")
    + grid("folora", preset="paper", lam="30", s_min="0", lr="3e-3")
    + grid("folora", basis_rank="256", lam="3", lr="3e-3")
    + grid("folora", basis_rank="256", lam="1", lr="1.5e-3 6e-3")
    + grid("folora", basis_rank="128", **OURS, s_min="0.3")
    + grid("folora", basis_rank="128", **OURS, calibration_samples="10 20")
    + grid("folora", basis_rank="128", **OURS, task_samples="16"),
    "smollm2-fresh": grid("folora", basis_rank="16 32 64 128 256", lam="1 3 30", lr="3e-3")
    + grid("folora", "one lr", **ONE_LR, lam="1 3 30", s_min="0", lr="3e-3")
    + grid("folora", basis_rank="64", **OURS, s_min="0.3")
    + grid("folora", basis_rank="128", **OURS, calibration_samples="10 20 40 160")
    + grid("folora", basis_rank="128", **OURS, task_samples="8 16 32 64")}


def settings(name):
    """{label: [(method, flags, change)]} of a suite's fronts."""
    if name.endswith("-fresh"):
        return {label: [p["setting"] for p in undominated([p for p in some if p["scale"] == 1.0])]
                for label, some in fronts(name.removesuffix("-fresh")).items()}
    return {"tiny": TINY, "smollm2-long": LONG}.get(name, METHODS)


def wanted(name):
    """Every run of a suite, each once."""
    seeds = (3, 4, 5) if name.endswith("-fresh") else (0,)
    every = [*itertools.chain(*settings(name).values()), *PARTS.get(name, [])]
    runs = [(method, list(flags), change, seed) for seed in seeds for method, flags, change in every]
    return list({json.dumps(one): one for one in runs}.values())


# ---- tables and figures --------------------------------------------------------------------------

def points(results, setting):
    """One setting at each scale: [{"setting", "scale", "scores": {name: {seed: score}}}]. A setting
    that has not been run has none."""
    method, flags, change = setting
    rows = [row for row in results["runs"]
            if (row["method"], row["flags"], row["change"]) == (method, list(flags), change)]
    found = []
    for scale in map(str, SCALES):
        some = {row["seed"]: {"1.0": row["scores"], **row.get("scaled", {})} for row in rows}
        some = {seed: scores[scale] for seed, scores in some.items() if scale in scores}
        names = list(next(iter(some.values()), ()))
        found.append({"setting": (method, flags, change), "scale": float(scale), "scores": {
            name: {seed: scores[name] for seed, scores in some.items()} for name in names}})
    return [p for p in found if p["scores"]]


def fronts(name):
    """{label: points of all its settings}, as far as they have been run."""
    results = read(name)
    found = {label: [p for setting in some for p in points(results, setting)]
             for label, some in settings(name).items()}
    return {label: some for label, some in found.items() if some}


def at(point, name="nll", seed=None):
    """A point's score: of one seed, or the mean over all."""
    values = point["scores"][name]
    return statistics.mean(values.values()) if seed is None else values[seed]


def undominated(some, seed=None):
    """The points that no other one beats in both NLL and KL, by descending NLL."""
    pairs = [(at(p, "nll", seed), at(p, "drift", seed)) for p in some]
    kept = [p for p, (x, y) in zip(some, pairs) if not any(
        u <= x and v <= y and (u, v) != (x, y) for u, v in pairs)]
    return sorted(kept, key=lambda p: -at(p, "nll", seed))


def kl_at(some, nll, seed=None):
    """The KL of a front at this NLL, on straight lines between its undominated points. Above that
    range it is the first point's; None if the front never learns so much."""
    line = [(at(p, "nll", seed), at(p, "drift", seed)) for p in undominated(some, seed)]
    if nll >= line[0][0]:
        return line[0][1]
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x1 <= nll <= x0:
            return y0 + (y1 - y0) * (x0 - nll) / (x0 - x1)
    return None


def shown(values):
    """Mean and standard deviation over the seeds."""
    if not values or None in values:
        return "-"
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    digits = 1 if mean > 3 else 3 if mean > 0.1 else 4
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def print_equal_nll(name, excesses=(0.03, 0.01, 0.005, 0.0)):
    """Each method's KL where its NLL is LoRA's lowest of the same seed, plus an excess."""
    found = fronts(name)
    seeds = sorted(set.intersection(*(set(p["scores"]["nll"]) for p in found["LoRA"])))
    lowest = {seed: min(at(p, "nll", seed) for p in found["LoRA"]) for seed in seeds}
    print(f"\n{name}: KL at LoRA's lowest NLL, {shown(list(lowest.values()))}, plus\n\n| method | "
          + " | ".join(map(str, excesses)) + " |\n" + "|---" * (len(excesses) + 1) + "|")
    for label, some in found.items():
        some = [p for p in some if set(p["scores"]["nll"]) >= set(seeds)]
        cells = [shown([kl_at(some, lowest[seed] + excess, seed) for seed in seeds if some])
                 for excess in excesses]
        print(f"| {label} | " + " | ".join(cells) + " |")


def print_settings(name):
    """The undominated points of every front, and the settings outside the fronts."""
    results, names = read(name), list(read(name)["untouched"])
    names = [n for n in names if n not in ("Avg2", "GM")]
    print(f"\n{name}: NLL and KL (drift) in nat per token\n\n| method | setting | scale | "
          + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|")
    rows = [(label, p) for label, some in fronts(name).items() for p in undominated(some)]
    rows += [("", p) for setting in PARTS.get(name, []) for p in points(results, setting)[:1]]
    for label, p in rows:
        flags = " ".join(p["setting"][1]).replace("--", "")
        cells = [shown(list(p["scores"].get(n, {}).values())) for n in names]
        print(f"| {label} | {flags} {p['setting'][2] or ''} | {p['scale']:g} | "
              + " | ".join(cells) + " |")


def print_correlations(name):
    """Spearman's rank correlation of each measure of drift with what was lost."""
    from scipy.stats import spearmanr
    rows = [scores for row in read(name)["runs"] if "scaled" in row
            for scores in (row["scores"], *row["scaled"].values())]
    for lost in ("prose", "Avg1"):
        some = [scores for scores in rows if lost in scores]
        for measure in ("drift", "penalty", "cka") if len(some) > 9 else ():
            rho = spearmanr([s[measure] for s in some], [s[lost] for s in some])[0]
            print(f"{name}, {len(some)} points, rank correlation of {measure} and {lost}: "
                  f"{rho:.2f}")


def draw(suites):
    """assets/tradeoff.png: KL against NLL, a panel a model, a line a method."""
    from matplotlib import pyplot
    colors = {"FoLoRA": "C3", "FoLoRA + KL": "C0", "LoRA + KL": "black"}
    figure, axes = pyplot.subplots(1, len(suites), figsize=(5 * len(suites), 4), squeeze=False,
                                   layout="constrained", sharey=True)
    axes[0][0].set_ylabel("KL from the untouched model, nat/token")
    for axis, (name, title) in zip(axes[0], suites.items()):
        for label, some in fronts(name).items():
            color, width = colors.get(label, "0.6"), 2.5 if label in colors else 1
            x, y = zip(*((at(p), at(p, "drift")) for p in undominated(some)))
            axis.plot(x, y, "o-", color=color, linewidth=width, markersize=2 + width)
            axis.annotate(label, (x[-1], y[-1]), color=color, fontsize=8, xytext=(2, 5),
                          textcoords="offset points")
        axis.set(title=title, xlabel="NLL of GSM8K test solutions, nat/token", yscale="log")
        axis.margins(0.12)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    figure.suptitle("lower: forgets less; further right: learns more", fontsize=9)
    figure.savefig(HERE / "tradeoff.png", dpi=130)


def report():
    run = [name for name in SUITES if read(name)["runs"]]
    for name in run:
        print_equal_nll(name)
        print_settings(name)
        print_correlations(name)
    titles = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
    draw({name: title for name, title in titles.items() if name in run})


def suite_flags(name, options):
    """The flags that all runs of a suite have."""
    if name == "tiny":
        return tuple(SUITES[name].split())
    files = {"nll": options.test, "nq_open": options.nq, "webqs": options.webqs}
    tasks = [f"{task}={path}" if path else task for task, path in files.items()
             if task == "nll" or "-" in name]
    tasks += ["drift"] + ([f"prose={options.prose}"] if options.prose else [])
    return (*SUITES[name].split(), "--model", options.model, "--data", options.data,
            "--tasks", ",".join(tasks))


@ev.one_line
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=(*SUITES, "gpu", "report"))
    parser.add_argument("--model", help="hub id or directory, for every suite but tiny")
    parser.add_argument("--data", default="openai/gsm8k", help="GSM8K's training set")
    parser.add_argument("--test", help="GSM8K's test set, .jsonl (default: the hub's)")
    parser.add_argument("--nq", help="NQ-Open's validation set, .jsonl (default: the hub's)")
    parser.add_argument("--webqs", help="WebQuestions' test set, .jsonl (default: the hub's)")
    parser.add_argument("--prose", help="100 texts that no model wrote, .jsonl with `text`")
    parser.add_argument("--harness", help="gpu: lm-eval's tasks, as for eval.py")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    options, options.more = parser.parse_known_args(arguments)
    if options.suite == "report":
        return report()
    ev.need(options.suite in ("tiny", "gpu") or options.model, f"{options.suite} needs a --model")
    for name in ("model", "data", "test", "nq", "webqs", "prose"):
        path = getattr(options, name)
        setattr(options, name, str(Path(path).resolve()) if path and Path(path).exists() else path)
    os.chdir(HERE.parent)
    CACHE.mkdir(parents=True, exist_ok=True)
    if options.suite == "gpu":
        return gpu(options)
    ev.need(not options.more, f"unknown options: {options.more}")
    run_all(options.suite, suite_flags(options.suite, options), wanted(options.suite),
            options.workers)


if __name__ == "__main__":
    main()
