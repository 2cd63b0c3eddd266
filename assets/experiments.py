"""The README's measurements. A run is a command line of train_math.py, or a baseline in its loop.

    python assets/experiments.py tiny                     # what assets/tiny.json lacks is run
    python assets/experiments.py smollm2 --model DIR --data TRAIN.jsonl --test TEST.jsonl
    python assets/experiments.py report                   # tables and a figure from the JSON files

Suites: tiny; smollm2 and gemma3, 40 steps of GSM8K, where settings are searched for; and fresh, the
best of smollm2 with three other seeds, other test solutions and other held-out text. Each writes
assets/<suite>.json: {"untouched": scores, "runs": [{"method", "flags", "change", "seed", ...}]}. An
interrupted suite goes on where it was. Runs share texts, covariances and bases on disk.
"""
import argparse
import copy
import functools
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

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
        "--calibration-max-tokens 160 --task-samples 128 --passes 1 --dtype bfloat16 "
        "--eval-samples 64 --log-every 1000 --compare no")
SUITES = {"tiny": "--max-steps 160 --batch-size 8 --eval-samples 100 --log-every 1000 --compare no "
                  "--tasks gsm8k=tiny/test.jsonl,nll=tiny/test.jsonl,facts,sort,reverse,sums,drift",
          "smollm2": REAL, "gemma3": REAL, "fresh": REAL.replace("samples 64", "samples 250")}
FRESH_TEST, FRESH_TEXT = slice(64, 192), dict(samples=32, seed=ev.HELD_OUT_SEED + 1)


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
    """What all runs of a suite share: model, tokenizer, examples, tasks, held-out text, answers."""
    options = options_of(suite, [], 0)
    model, tokenizer, examples, tasks = train_math.load(options)
    if fresh:
        tasks["nll"] = tasks["nll"][FRESH_TEST]
    answers = {name: [with_answer(tokenizer, form, *pair) for pair in tasks.pop(name)]
               for name, form in QUESTIONS.items() if name in tasks}
    texts = ev.held_out(model, tokenizer, min(256, options.calibration_max_tokens),
                        **(FRESH_TEXT if fresh else {}))
    return model, tokenizer, examples, tasks, texts, answers


def with_answer(tokenizer, form, question, answers):
    """{"ids", "labels"} of a question and its first answer, which bears the loss. A small model has
    almost no exact answer to lose, but the loss of the right answers can rise."""
    question = form.format(question)
    prompt, ids = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answers[0]}"))
    return {"ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]}


def scores_of(suite, fresh, model):
    reference, tokenizer, _, tasks, texts, answers = loaded(suite, fresh)
    scores = ev.evaluate(model, tokenizer, tasks, reference, texts)
    scores.update(ev.summarise(scores))
    scores.update({f"{name} answers": ev.mean_nll(model, rows) for name, rows in answers.items()})
    return {name: round(score, 5) for name, score in scores.items()}


def cached(options, names, kind, make):
    """make()'s value, kept on disk under the options that it depends on."""
    key = json.dumps([kind, *(getattr(options, name) for name in names)])
    path = CACHE / f"{kind}-{hashlib.sha1(key.encode()).hexdigest()[:12]}.pt"
    if not path.exists():
        train_math.save(make(), path)
    return torch.load(path)


def texts_of(suite, fresh, options):
    """The calibration texts."""
    model, tokenizer, *_ = loaded(suite, fresh)
    make = lambda: train_math.calibration_texts(options, model, tokenizer)
    return cached(options, TEXTS, "texts", make)


def covariances(suite, fresh, options):
    """(C_pre, C_task)"""
    model, _, examples, *_ = loaded(suite, fresh)

    def make():
        texts = texts_of(suite, fresh, options)
        task = [example["ids"] for example in examples[:options.task_samples]]
        return [train_math.covariances(options, model, some, name)
                for name, some in (("C_pre", texts), ("C_task", task))]
    return cached(options, TEXTS, "covariances", make)


def bases(suite, fresh, options):
    make = lambda: folora.decompose(*covariances(suite, fresh, options), options.rank, options.tau,
                                    options.basis_rank or None)
    return cached(options, BASES, "bases", make)


def trained(suite, fresh, method, flags, change, seed):
    """One training run: (the merged model, seconds a step)."""
    options = options_of(suite, flags, seed, method)
    reference, _, examples, _, texts, _ = loaded(suite, fresh)
    model = copy.deepcopy(reference)
    if method not in ("folora", "lora"):
        C_pre = covariances(suite, fresh, options)[0] if method in baselines.NEEDS_C_PRE else None
        torch.manual_seed(seed)
        optimizer = baselines.add_adapters(method, model, options, C_pre)
    else:
        solved = bases(suite, fresh, options) if method == "folora" else None
        torch.manual_seed(seed)
        optimizer = train_math.add_adapters(options, model, solved)
        for name in filter(None, (change or "").split(", ")):
            CHANGES[name](optimizer, options)
    kl_texts = texts_of(suite, fresh, options) if options.kl else ()
    start = time.time()
    with tempfile.TemporaryDirectory() as out:
        probe = train_math.Probe(reference, texts)
        train_math.train(options, model, optimizer, examples, probe, Path(out), kl_texts)
    return folora.merge(model), (time.time() - start) / (options.max_steps or 1)


def run(suite, fresh, method, flags, change, seed):
    """One training run and its scores, as a row of the JSON."""
    model, seconds = trained(suite, fresh, method, flags, change, seed)
    return {"method": method, "flags": list(flags), "change": change, "seed": seed,
            "seconds_a_step": round(seconds, 2), "scores": scores_of(suite, fresh, model)}


def key(row):
    return json.dumps([row[name] for name in ("method", "flags", "change", "seed")])


def read(suite):
    path = HERE / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def write(results, suite):
    """JSON with one line a run, replaced as a whole."""
    part = HERE / f"{suite}.part"
    part.write_text(json.dumps(results, ensure_ascii=False).replace('{"method"', '\n{"method"'))
    part.replace(HERE / f"{suite}.json")


def run_all(name, suite, wanted, workers):
    """Run what assets/<name>.json lacks of `wanted`, [(method, flags, change, seed)]."""
    results, fresh = read(name), name == "fresh"
    done = {key(row) for row in results["runs"]}
    wanted = [w for w in wanted if json.dumps(w) not in done]
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        if "untouched" not in results:
            results["untouched"] = pool.submit(untouched, suite, fresh).result()
        first = {}                                         # one run of each preparation goes first
        for w in wanted:
            first.setdefault((str(w[3]), *(f for f in w[1] if "samples" in f or "tau" in f)), w)
        for jobs in (list(first.values()), [w for w in wanted if w not in first.values()]):
            futures, failed = [pool.submit(run, suite, fresh, *w) for w in jobs], None
            for future in tqdm(as_completed(futures), total=len(futures), desc=name):
                failed = future.exception() or failed
                results["runs"] += [] if future.exception() else [future.result()]
                write(results, name)
            if failed:                                     # only now: what the others found is kept
                raise failed
    return results


def untouched(suite, fresh):
    return scores_of(suite, fresh, loaded(suite, fresh)[0])


# ---- what is run ---------------------------------------------------------------------------------

FOLORA, RATES = "FoLoRA", "1.5e-3 3e-3 6e-3 1.2e-2"
# label: (method, the flags before the value that is swept, change, {suite: values})
FRONTS = {
    "LoRA": ("lora", ["--lr"], None, {"tiny": "1e-3 2e-3 4e-3 8e-3", "gemma3": "1e-3 2e-3",
                                      "smollm2": "3e-4 1e-3 2e-3 4e-3", "fresh": "2e-3"}),
    "MiLoRA": ("milora", ["--lr"], None, {"tiny": "1e-3 2e-3 4e-3 8e-3", "fresh": "5e-4",
                                          "smollm2": "1e-4 3e-4 5e-4 1e-3"}),
    "CorDA": ("corda", ["--lr"], None, {"tiny": "1e-3 2e-3 4e-3 8e-3", "fresh": "1e-4 3e-4",
                                        "smollm2": "1e-4 2e-4 3e-4 1e-3"}),
    "OPLoRA": ("oplora", ["--lr"], None, {"tiny": "2e-3 4e-3 8e-3 1.6e-2", "fresh": "2e-3",
                                          "smollm2": "3e-4 1e-3 2e-3 4e-3"}),
    "LoRA-Null": ("lora-null", ["--lr"], None, {"tiny": "1e-3 2e-3 4e-3 8e-3", "fresh": "1e-3",
                                                "smollm2": "1e-4 2e-4 3e-4 1e-3"}),
    "LoRA-Null v2": ("lora-null-v2", ["--lr"], None, {
        "tiny": "4e-3 8e-3 1.6e-2 3.2e-2", "smollm2": "1e-3 3e-3 6e-3 1.2e-2",
        "fresh": "1e-3 3e-3"}),
    "FoLoRA, the paper's": ("folora", ["--preset", "paper", "--lr"], None, {
        "tiny": "2e-3 4e-3 8e-3 1.6e-2", "smollm2": "1e-4 3e-4 6e-4 1e-3", "fresh": "3e-4 6e-4"}),
    "FoLoRA, lr": ("folora", ["--basis-rank", "128", "--lr"], None, {
        "tiny": RATES + " 2.4e-2", "smollm2": RATES, "gemma3": RATES}),
    FOLORA: ("folora", ["--lr", "3e-3", "--basis-rank"], None, {
        "smollm2": "64 128 256", "gemma3": "64 128 256", "fresh": "16 32 64 128 256"}),
    "LoRA + KL": ("lora", ["--lr", "2e-3", "--kl"], None, {"smollm2": "1 3 10"}),
    "FoLoRA + KL": ("folora", ["--basis-rank", "256", "--kl"], None, {"smollm2": "1 3"}),
}
ONE_LR = ["--preset", "paper", "--zero-start", "1"]       # B = 0, all directions, one learning rate
# {suite: {label: (method, flags, change)}}
ABLATIONS = {"tiny": {
    "k = 64, lr 1.2e-2": ("folora", ["--basis-rank", "64", "--lr", "1.2e-2"], None),
    "k = 128, lr 1.2e-2, λ = 10": ("folora", [
        "--basis-rank", "128", "--lr", "1.2e-2", "--lam", "10"], None),
    "k = 128, lr 1.2e-2, the paper's start": ("folora", [
        "--basis-rank", "128", "--lr", "1.2e-2", "--zero-start", "0"], None),
}, "smollm2": {
    "all directions, λ = 1, s_min = 0, one lr": ("folora", [
        *ONE_LR, "--lam", "1", "--s-min", "0", "--lr", "3e-3"], "one lr"),
    "the same, λ = 3": ("folora", [
        *ONE_LR, "--lam", "3", "--s-min", "0", "--lr", "3e-3"], "one lr"),
    "the same, λ = 10": ("folora", [
        *ONE_LR, "--lam", "10", "--s-min", "0", "--lr", "3e-3"], "one lr"),
    "the same, λ = 30": ("folora", [
        *ONE_LR, "--lam", "30", "--s-min", "0", "--lr", "3e-3"], "one lr"),
    "the same, λ = 1, s_min = 0.3 (the paper's gate)": ("folora", [
        *ONE_LR, "--lr", "3e-3"], "one lr"),
    "the same, gate off, A's lr a third": ("folora", [
        *ONE_LR, "--lam", "30", "--s-min", "1", "--lr", "3e-3"], "one lr, A slow"),
    "the same, A under plain Adam, A's lr a third": ("folora", [
        *ONE_LR, "--lam", "30", "--s-min", "0", "--lr", "3e-3"], "one lr, A slow, plain Adam"),
    "the same, A frozen": ("folora", [
        *ONE_LR, "--lam", "30", "--s-min", "0", "--lr", "3e-3"], "one lr, A frozen"),
    "the paper's start, λ = 30, s_min = 0": ("folora", [
        "--preset", "paper", "--lam", "30", "--s-min", "0", "--lr", "3e-3"], None),
    "k = 256, λ = 3": ("folora", ["--basis-rank", "256", "--lam", "3", "--lr", "3e-3"], None),
    "k = 256, lr 1.5e-3": ("folora", ["--basis-rank", "256", "--lr", "1.5e-3"], None),
    "k = 256, lr 6e-3": ("folora", ["--basis-rank", "256", "--lr", "6e-3"], None),
    "k = 32": ("folora", ["--basis-rank", "32", "--lr", "3e-3"], None),
    "k = 128, s_min = 0.3": ("folora", [
        "--basis-rank", "128", "--s-min", "0.3", "--lr", "3e-3"], None),
    "k = 128, 10 texts behind C_pre": ("folora", [
        "--basis-rank", "128", "--lr", "3e-3", "--calibration-samples", "10"], None),
    "k = 128, 20 texts behind C_pre": ("folora", [
        "--basis-rank", "128", "--lr", "3e-3", "--calibration-samples", "20"], None),
    "k = 128, 16 examples behind C_task": ("folora", [
        "--basis-rank", "128", "--lr", "3e-3", "--task-samples", "16"], None),
}, "fresh": {
    **{f"all directions, s_min = 0, one lr, λ = {lam}": (
        "folora", [*ONE_LR, "--lam", lam, "--s-min", "0", "--lr", "3e-3"], "one lr")
       for lam in ("30", "3", "1")},
    **{f"k = 128, {count} {what}": ("folora", [
        "--lr", "3e-3", "--basis-rank", "128", flag, count], None)
       for flag, what, counts in (("--calibration-samples", "texts behind C_pre", "10 20 40 160"),
                                  ("--task-samples", "examples behind C_task", "8 32"))
       for count in counts.split()},
    **{f"k = {k}, λ = {lam}": ("folora", ["--lr", "3e-3", "--basis-rank", k, "--lam", lam], None)
       for k in ("64", "128") for lam in ("3", "30")}}}


def settings(suite):
    """{(label, value): (method, flags, change)} of every front of a suite."""
    return {(label, value): (method, [*flags, value], change)
            for label, (method, flags, change, values) in FRONTS.items()
            for value in values.get(suite, "").split()}


def real_suite(name, options):
    """The flags that all runs of a suite have, as a tuple."""
    if name == "tiny":
        return tuple(SUITES[name].split())
    given = lambda task, path: f"{task}={path}" if path else task
    tasks = [given("nll", options.test), "drift"]
    if name == "fresh":
        tasks += [given("nq_open", options.nq), given("webqs", options.webqs)]
    return (*SUITES[name].split(), "--model", options.model, "--data", options.data,
            "--tasks", ",".join(tasks))


def wanted(name):
    """Every run of a suite. Settings are searched with seed 0; seeds 3, 4, 5 choose nothing."""
    seeds = (3, 4, 5) if name == "fresh" else (0,)
    runs = [*settings(name).values(), *ABLATIONS.get(name, {}).values()]
    return [(method, flags, change, seed) for seed in seeds for method, flags, change in runs]


# ---- tables and figures --------------------------------------------------------------------------

def point(results, method, flags, change):
    """{score: (mean, standard deviation, n)} over the seeds of one setting, or {}."""
    rows = [row["scores"] for row in results["runs"]
            if (row["method"], row["flags"], row["change"]) == (method, flags, change)]
    out = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        out[name] = statistics.mean(values), spread, len(values)
    return out


def fronts(suite):
    """{label: [(swept value, point)]}, as far as it has been run."""
    results, out = read(suite), {}
    for (label, value), setting in settings(suite).items():
        if found := point(results, *setting):
            out.setdefault(label, []).append((value, found))
    return out


def kl_at(line, nll):
    """The least KL on a front [(value, point)] at this NLL, on straight lines between neighbouring
    points, or at a point that learns more; None if the front never learns so much."""
    ends = [(p["nll"][0], p["drift"][0]) for _, p in line]
    found = [kl for x, kl in ends if x <= nll]
    for (x0, y0), (x1, y1) in zip(ends, ends[1:]):
        if min(x0, x1) <= nll <= max(x0, x1) and x0 != x1:
            found.append(y0 + (y1 - y0) * (nll - x0) / (x1 - x0))
    return min(found, default=None)


def shown(value):
    mean, spread, n = value
    digits = 1 if mean > 3 else 3 if mean > 0.1 else 4
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if n > 1 else "")


def print_suite(suite):
    """Every point of every front, and FoLoRA's KL at the same NLL."""
    results, lines = read(suite), fronts(suite)
    names = [n for n in results["untouched"] if n not in ("Avg2", "GM")]
    print(f"\n{suite}: NLL and KL (drift) in nat per token\n")
    print("| method | value | " + " | ".join(names) + " | FoLoRA's KL at that NLL |")
    print("|---" * (len(names) + 3) + "|")
    untouched_row = ((results["untouched"][n], 0, 1) for n in names)
    print("| untouched | | " + " | ".join(map(shown, untouched_row)) + " | |")
    ours = lines.get(FOLORA) or lines.get("FoLoRA, lr", [])
    rows = [(label, value, p) for label, line in lines.items() for value, p in line]
    rows += [(label, "", p) for label, setting in ABLATIONS.get(suite, {}).items()
             if (p := point(results, *setting))]
    for label, value, p in rows:
        there = kl_at(ours, p["nll"][0])
        cells = [shown(p[n]) if n in p else "" for n in names]
        print(f"| {label} | {value} | " + " | ".join(cells) + f" | {there and round(there, 4)} |")


def undominated(line):
    """[(NLL, KL)] of a front without the points that learn less and drift more than another."""
    ends = [(p["nll"][0], p["drift"][0]) for _, p in line]
    return [(x, y) for x, y in ends if not any(u < x and v < y for u, v in ends)]


def draw(suites):
    """assets/tradeoff.png: KL against NLL, a panel a model, a line a method, a point a setting."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(suites), figsize=(5 * len(suites), 4), squeeze=False,
                                   layout="constrained", sharey=True)
    axes[0][0].set_ylabel("KL from the untouched model, nat/token")
    for axis, (suite, title) in zip(axes[0], suites.items()):
        lines = {label: undominated(line) for label, line in fronts(suite).items()}
        for label, line in lines.items():
            color, width = ("C3", 2.5) if label == FOLORA else ("0.55", 1)
            if label != "FoLoRA, lr":                      # it crosses FoLoRA's in the default
                x, y = zip(*sorted(line))
                axis.plot(x, y, "o-", color=color, linewidth=width, markersize=3 + width)
                axis.annotate(label, (x[-1], y[-1]), color=color, fontsize=8, xytext=(2, 5),
                              textcoords="offset points")
        axis.set(title=title, xlabel="NLL of GSM8K test solutions, nat/token", yscale="log")
        axis.margins(0.12)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    figure.suptitle("lower: forgets less; further right: learns more", fontsize=9)
    figure.savefig(HERE / "tradeoff.png", dpi=130)


def report():
    for suite in SUITES:
        if "untouched" in read(suite):
            print_suite(suite)
    titles = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
    draw({suite: title for suite, title in titles.items() if read(suite)["runs"]})


@ev.one_line
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=(*SUITES, "report"))
    parser.add_argument("--model", help="hub id or directory, for every suite but tiny")
    parser.add_argument("--data", default="openai/gsm8k", help="GSM8K's training set")
    parser.add_argument("--test", help="GSM8K's test set, .jsonl (default: the hub's)")
    parser.add_argument("--nq", help="NQ-Open's validation set, .jsonl (default: the hub's)")
    parser.add_argument("--webqs", help="WebQuestions' test set, .jsonl (default: the hub's)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    options = parser.parse_args(arguments)
    if options.suite == "report":
        return report()
    if options.suite != "tiny" and not options.model:
        parser.error(f"{options.suite} needs a --model")
    for name in ("model", "data", "test", "nq", "webqs"):
        path = getattr(options, name)
        setattr(options, name, str(Path(path).resolve()) if path and Path(path).exists() else path)
    os.chdir(HERE.parent)
    CACHE.mkdir(parents=True, exist_ok=True)
    run_all(options.suite, real_suite(options.suite, options), wanted(options.suite),
            options.workers)


if __name__ == "__main__":
    main()
