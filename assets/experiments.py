"""The README's measurements. A run is a command line of train_math.py, or a baseline in its loop.

    python assets/experiments.py smollm2 --model DIR --data TRAIN.jsonl --tasks nll=TEST.jsonl,drift
    python assets/experiments.py report                   # tables and a figure from the JSON files
    python assets/experiments.py gpu --model Qwen2.5-1.5B --harness ifeval,mmlu

The searches (smollm2, gemma3, tiny) run every setting with seed 0. smollm2-fresh and gemma3-fresh
run those that no other setting of the same method beats in both NLL and KL, with three other seeds,
other test solutions and other held-out text. smollm2-long trains ten times as long, with seed 0,
and is scored so. codes teaches tiny invented codes. An interrupted suite goes on where it was.
"""
import argparse
import copy
import hashlib
import itertools
import json
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy
import pandas
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval as ev  # noqa: E402
import folora  # noqa: E402
import train_math  # noqa: E402
from assets import baselines  # noqa: E402
from tiny import make_tiny  # noqa: E402

CACHE = HERE.parent / "runs" / "experiments"
SCALES = (1.0, 0.7, 0.5, 0.35)             # each trained update is also scored when scaled by these
# What the calibration texts and C_pre depend on, and what the bases depend on.
TEXTS = ("model", "seed", "dtype", "target_modules", "calibration", "calibration_samples",
         "calibration_max_tokens")
BASES = (*TEXTS, "data", "max_samples", "max_length", "task_samples", "rank", "tau", "basis_rank")
FRESH_TEST, FRESH_TEXT = slice(64, 192), dict(samples=32, seed=ev.HELD_OUT_SEED + 1)

# ---- settings ------------------------------------------------------------------------------------

REAL = ("--rank 32 --batch-size 8 --micro-batch-size 4 --gradient-checkpointing 0 --dtype bfloat16 "
        "--calibration-samples 80 --calibration-max-tokens 160 --task-samples 128 --log-every 400 ")
SMOLLM2, GEMMA3 = "--model SmolLM2-135M-Instruct " + REAL, "--model google/gemma-3-270m " + REAL
SUITES = {"tiny": "--max-steps 160 --batch-size 8 --max-samples 3200 --eval-samples 100 "
                  "--log-every 160",
          "codes": "--max-steps 160 --batch-size 8 --eval-samples 100 --log-every 160",
          "smollm2": SMOLLM2 + "--max-steps 40 --eval-samples 64",
          "smollm2-fresh": SMOLLM2 + "--max-steps 40 --eval-samples 250",
          "smollm2-long": SMOLLM2 + "--max-steps 400 --eval-samples 250 --log-every 20",
          "gemma3": GEMMA3 + "--max-steps 40 --eval-samples 64",
          "gemma3-fresh": GEMMA3 + "--max-steps 40 --eval-samples 250"}
# Rows of a method's label, a command with | between alternatives, and a change (change_optimizer).
# Without a label: settings outside the methods' fronts, which answer a question each.
OURS, ZERO = "folora --basis-rank 128 --lam 1", "folora --preset paper --zero-start 1"
SEARCH = [
    ("LoRA", "lora --lr 3e-4|5e-4|1e-3|2e-3|4e-3"),
    ("MiLoRA", "milora --lr 1e-4|3e-4|5e-4|1e-3"),
    ("CorDA", "corda --lr 1e-4|2e-4|3e-4|1e-3"),
    ("OPLoRA", "oplora --lr 3e-4|1e-3|2e-3|4e-3"),
    ("LoRA-Null", "lora-null --lr 1e-4|2e-4|3e-4|1e-3"),
    ("LoRA-Null v2", "lora-null-v2 --lr 1e-3|3e-3|6e-3|1.2e-2"),
    ("FoLoRA, the paper's", "folora --preset paper --lr 1e-4|3e-4|6e-4|1e-3"),
    ("LoRA, rank 8", "lora --rank 8 --lr 5e-4|1e-3|2e-3|4e-3"),
    ("LoRA, MLP alone",
     "lora --target-modules gate_proj,up_proj,down_proj --lr 5e-4|1e-3|2e-3|4e-3"),
    ("LoRA + replay", "lora --lr 1e-3|2e-3|4e-3 --kl 0.3|1|3", "replay"),
    ("LoRA + KL", "lora --lr 1e-3|2e-3|4e-3 --kl 0.3|1|3|10|30"),
    ("LoRA + KL", "lora --lr 2e-3 --kl 1|3 --kl-texts 2|8"),
    ("FoLoRA", "folora --basis-rank 32|64|128|256 --lam 1 --lr 3e-3"),
    ("FoLoRA", f"{OURS} --lr 1.5e-3|6e-3|1.2e-2"),
    ("FoLoRA", "folora --basis-rank 32 --lam 1 --lr 2e-3"),
    ("FoLoRA + KL", "folora --basis-rank 128|256|0 --lam 1 --lr 3e-3 --kl 1|3|10"),
    ("FoLoRA + KL", "folora --basis-rank 256 --lam 1 --lr 6e-3 --kl 1|3|10")]
SETTINGS = {"gemma3": SEARCH, "gemma3-fresh": SEARCH, "smollm2": SEARCH + [
    ("", f"{ZERO} --lam 1|3|10|30 --s-min 0 --lr 3e-3", "one lr"),
    ("", f"{ZERO} --lam 30 --s-min 1 --lr 3e-3", "one lr, A slow"),
    ("", f"{ZERO} --lam 30 --s-min 0 --lr 3e-3", "one lr, A slow, plain Adam"),
    ("", f"{ZERO} --lam 30 --s-min 0 --lr 3e-3", "one lr, A frozen"),
    ("", "folora --preset paper --lam 30 --s-min 0 --lr 3e-3"),
    ("", "folora --basis-rank 256 --lam 3 --lr 3e-3"),
    ("", "folora --basis-rank 256 --lam 1 --lr 1.5e-3|6e-3"),
    ("", f"{OURS} --lr 3e-3 --s-min 0.3"),
    ("", f"{OURS} --lr 3e-3 --calibration-samples 10|20"),
    ("", f"{OURS} --lr 3e-3 --task-samples 16")
], "smollm2-fresh": SEARCH + [
    ("", "folora --basis-rank 16|32|64|128|256 --lam 1|3|30 --lr 3e-3"),
    ("", "folora --basis-rank 64 --lam 1 --lr 3e-3 --s-min 0.3"),
    ("", f"{OURS} --lr 3e-3 --calibration-samples 10|20|40|160"),
    ("", f"{OURS} --lr 3e-3 --task-samples 8|16|32|64"),
    ("", f"{ZERO} --lam 1|3|30 --s-min 0 --lr 3e-3", "one lr")
], "smollm2-long": [
    ("LoRA", "lora --lr 5e-4|1e-3"),
    ("LoRA + KL", "lora --lr 5e-4|1e-3 --kl 1|3"),
    ("A frozen", f"{OURS} --lr 1e-3|3e-3", "A frozen"),
    ("FoLoRA", "folora --basis-rank 64|128 --lam 1 --lr 1.5e-3|3e-3"),
    ("FoLoRA + KL", "folora --basis-rank 128|256 --lam 1 --lr 3e-3 --kl 1|3")
], "tiny": [
    ("LoRA", "lora --lr 1e-3|2e-3|4e-3|8e-3"),
    ("MiLoRA", "milora --lr 1e-3|2e-3|4e-3|8e-3"),
    ("CorDA", "corda --lr 1e-3|2e-3|4e-3|8e-3"),
    ("OPLoRA", "oplora --lr 2e-3|4e-3|8e-3|1.6e-2"),
    ("LoRA-Null", "lora-null --lr 1e-3|2e-3|4e-3|8e-3"),
    ("LoRA-Null v2", "lora-null-v2 --lr 4e-3|8e-3|1.6e-2|3.2e-2"),
    ("FoLoRA, the paper's", "folora --preset paper --lr 2e-3|4e-3|8e-3|1.6e-2"),
    ("LoRA + KL", "lora --lr 2e-3|4e-3 --kl 0.3|1|3|10"),
    ("FoLoRA", f"{OURS} --lr 1.5e-3|3e-3|6e-3|1.2e-2|2.4e-2"),
    ("FoLoRA + KL", f"{OURS} --lr 1.2e-2|2.4e-2 --kl 0.3|1|3|10"),
    ("", "folora --basis-rank 64 --lam 1 --lr 1.2e-2"),
    ("", "folora --basis-rank 128 --lam 10 --lr 1.2e-2"),
    ("", f"{OURS} --lr 1.2e-2 --zero-start 0")]}
SETTINGS["codes"] = [row for row in SETTINGS["tiny"] if row[0]] + [
    ("FoLoRA", "folora --basis-rank 32|64 --lam 1 --lr 1.2e-2|2.4e-2")]


def grid(command, change=None):
    """The settings of a command in which | stands between alternatives: grid("lora --lr 1e-3|2e-3")
    is [{"method": "lora", "flags": ["--lr", "1e-3"], "change": None}, and the same with 2e-3]."""
    choices = [word.split("|") for word in command.split()]
    return [{"method": method, "flags": flags, "change": change}
            for method, *flags in itertools.product(*choices)]


def settings_of(name):
    """[(label, setting)] of a suite. A fresh suite has the undominated ones of its search."""
    found = [(row[0], setting) for row in SETTINGS[name] for setting in grid(*row[1:])]
    if not name.endswith("-fresh"):
        return found
    search = name.removesuffix("-fresh")
    ev.need(read(search)["runs"], f"{name} takes its settings from {search}: run that first")
    kept = undominated(measured(search).query("scale == 1")).index
    return [(label, setting) for label, setting in found
            if not label or (label, described(setting), 1.0) in kept]


def wanted(name):
    """Every run of a suite, a setting with its seed. A setting may have two labels."""
    seeds = (3, 4, 5) if name.endswith("-fresh") else (0,)
    return [setting | {"seed": seed} for seed in seeds for _, setting in settings_of(name)]


# ---- runs ----------------------------------------------------------------------------------------

def options_of(suite, method, flags, seed):
    """train_math.py's options of a run. A baseline has LoRA's."""
    method = "folora" if method == "folora" else "lora"
    options = train_math.parse_options([*suite, "--method", method, *flags, "--seed", str(seed)])
    train_math.resolve(options)
    return options


def cached(kind, make, options, *more):
    """make(options, *more), kept on disk under the options that it depends on."""
    names = BASES if kind == "bases" else TEXTS
    key = hashlib.sha1(json.dumps([kind, *(getattr(options, n) for n in names)]).encode())
    return train_math.once(CACHE / f"{key.hexdigest()}.pt", lambda: make(options, *more))


def with_answer(tokenizer, form, question, answers):
    """{"ids", "labels"} of a question and its first answer, which alone bears the loss."""
    question = form.format(question)
    prompt, ids = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answers[0]}"))
    return {"ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]}


def load(suite, fresh):
    """What all runs of a suite share. C holds the covariances of the held-out texts."""
    options = options_of(suite, "folora", [], 0)
    model, tokenizer, examples, tasks = train_math.load(options)
    if fresh:
        tasks["nll"] = tasks["nll"][FRESH_TEST]
    answers = {name: [with_answer(tokenizer, ev.TASKS[name][1], *pair) for pair in tasks.pop(name)]
               for name in ("nq_open", "webqs") if name in tasks}
    kind, how = ("fresh text", FRESH_TEXT) if fresh else ("held-out text", {})
    length = min(256, options.calibration_max_tokens)
    texts = cached(kind, lambda _: ev.held_out(model, tokenizer, length, **how), options)
    C = train_math.covariances(options, model, [text.tolist() for text in texts], "held-out text")
    return argparse.Namespace(model=model, tokenizer=tokenizer, examples=examples, tasks=tasks,
                              answers=answers, texts=texts, C=C)


def hidden_cka(shared, model):
    """Linear CKA of the last hidden states of the untouched model and of `model`, on held-out text:
    |Xᵀ Y|² / (|Xᵀ X| |Yᵀ Y|), where X and Y (tokens, d) have columns of mean 0. 1: alike."""
    batch = ev.collate([text.tolist() for text in shared.texts], model.device)
    real, ids = batch["attention_mask"].bool(), batch["input_ids"]
    X, Y = (m.get_decoder()(ids)[0][real].double() for m in (shared.model, model))
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return ((X.mT @ Y).norm() ** 2 / ((X.mT @ X).norm() * (Y.mT @ Y).norm())).item()


def penalty(shared, model):
    """E|ΔW x|² / E|W0 x|² on held-out text, the forgetting penalty, as a mean over the layers."""
    shares = []
    for name, C in shared.C.items():
        W0, W = (m.get_submodule(name).weight.float() for m in (shared.model, model))
        energies = [((M @ C.to(M.device)) * M).sum() for M in (W - W0, W0)]     # tr(M C Mᵀ)
        shares.append(energies[0] / energies[1])
    return torch.stack(shares).mean().item()


@torch.no_grad()
def scores_of(shared, exact, scale=1.0):
    """The scores of the untouched model plus `scale` times the update in `exact`, rounded to the
    dtype. Of an update that is scaled, only the scores that take little time."""
    model, whole = copy.deepcopy(shared.model), scale == 1.0
    for name in shared.C:
        W0, W = (m.get_submodule(name).weight for m in (model, exact))
        W0.copy_(W0 + scale * (W - W0))
    tasks = {name: pairs for name, pairs in shared.tasks.items()
             if whole or name in ("nll", "drift", "prose")}
    scores = ev.evaluate(model, shared.tokenizer, tasks, shared.model, shared.texts)
    scores |= ev.summarise(scores)
    scores |= {"penalty": penalty(shared, model), "cka": hidden_cka(shared, model)}
    if whole:
        scores |= {f"{n} answers": ev.mean_nll(model, some) for n, some in shared.answers.items()}
    return {name: float(f"{score:.5g}") for name, score in scores.items()}


# What no option of train_math.py does, as fields of the optimiser's groups. "one lr" is for A and
# B, the others for A alone, which "plain Adam" trains in its own coordinates.
CHANGES = {"one lr": {"scale": 1.0}, "A slow": {"scale": 1 / 3}, "A frozen": {"scale": 0.0},
           "plain Adam": {"basis": None, "gate": None}}


def change_optimizer(optimizer, change):
    for group, (name, fields) in itertools.product(optimizer.param_groups, CHANGES.items()):
        if name in change and (name == "one lr" or group.get("basis") is not None):
            group.update(fields)


def run(shared, suite, setting):
    """Train once, and score the merged model and its scaled updates: a row of the JSON."""
    method, flags, change, seed = setting.values()
    options = options_of(suite, method, flags, seed)
    base, examples, bases, C_pre = shared.model, shared.examples, None, None
    texts = cached("texts", train_math.calibration_texts, options, base, shared.tokenizer)
    if method == "folora":
        bases = cached("bases", train_math.solve, options, base, texts, examples)
    if method in baselines.NEEDS_C_PRE:
        C_pre = cached("C_pre", train_math.covariances, options, base, texts, "C_pre")
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if method in baselines.STARTS:
        optimizer = baselines.add_adapters(method, model, options, C_pre)
    else:
        optimizer = train_math.add_adapters(options, model, bases)
    change_optimizer(optimizer, change or "")
    # Replay takes the place of the KL penalty in the loop: a loss on old texts, with a weight.
    loss = baselines.replay if change == "replay" else train_math.kl_from_untouched
    # An interrupted run goes on from the checkpoint in this directory.
    out = CACHE / hashlib.sha1(json.dumps([suite, setting]).encode()).hexdigest()
    out.mkdir(exist_ok=True)
    with mock.patch.object(train_math, "kl_from_untouched", loss):
        train_math.train(options, model, optimizer, examples, shared.texts[:1], out, texts)
    exact = folora.merge(model.float())
    scores = {str(scale): scores_of(shared, exact, scale) for scale in SCALES}
    shutil.rmtree(out)
    return setting | {"scores": scores.pop("1.0"), "scaled": scores}


def write_codes(path, seed, count=2000):
    """The data of the suite codes: three of 20 words, and their codes of two syllables each."""
    rng, words = random.Random(0), make_tiny.WORDS[:20]
    codes = {word: "".join(rng.choices(make_tiny.SYLLABLES, k=2)) for word in words}
    rng.seed(seed)
    asked = [rng.sample(words, 3) for _ in range(count)]
    train_math.save([{"question": f"Write in code: {' '.join(some)}",
                      "answer": " ".join(map(codes.get, some))} for some in asked], path)


def read(name):
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def run_all(name, suite):
    """Run what assets/<name>.json lacks. It has a line for each run, but those that diverge."""
    results, settings = read(name), wanted(name)
    shared = load(suite, fresh="-" in name)
    if "untouched" not in results:
        results["untouched"] = scores_of(shared, shared.model)
    for setting in tqdm(settings, desc=name):
        if any(setting.items() <= row.items() for row in results["runs"]):
            continue
        try:
            results["runs"].append(run(shared, suite, setting))
        except FloatingPointError as error:
            tqdm.write(f"{setting}: {error}")
        part = HERE / f"{name}.part"                   # the file is replaced as a whole
        part.write_text(json.dumps(results).replace('{"method"', '\n{"method"'))
        part.replace(HERE / f"{name}.json")


def gpu(given, harness):
    """Train a larger model for one epoch by LoRA, LoRA + KL and FoLoRA as the paper's and as ours.
    `given` are options of train_math.py. Prints one table, and another of lm-eval's scores."""
    kinds = {"lora": "--method lora", "lora-kl": "--method lora --kl 1",
             "folora-paper": "--preset paper", "folora": "--preset tuned"}
    outs, columns = {kind: str(CACHE / "gpu" / kind) for kind in kinds}, {}
    if harness:
        ev.harness_tasks(harness)                      # a wrong name shows before the training
    for kind, flags in kinds.items():
        command = ["--epochs", "1", *given, *flags.split(), "--out", outs[kind]]
        options = train_math.parse_options(command)
        train_math.resolve(options)
        scores = train_math.run(options, columns.get("untouched"))
        columns["untouched"], columns[kind] = scores.values()
    print(ev.table(columns))
    if harness:
        ev.main([options.model, *outs.values(), "--tasks", "", "--harness", harness])


# ---- tables and figures --------------------------------------------------------------------------

KEYS, MEASURES = ["method", "setting", "scale"], ["drift", "penalty", "cka"]
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
COLORS = {"FoLoRA": ("C3", 2.5), "FoLoRA + KL": ("C0", 2.5), "LoRA + KL": ("black", 2.5)}


def described(setting):
    """The text that stands for a setting in the tables."""
    return " ".join([*setting["flags"], setting["change"] or ""]).replace("--", "").strip()


def measured(name):
    """A suite's runs, with a row for each setting, scale and seed: KEYS, seed, and the scores. The
    method is the label of a front, or "" outside the fronts."""
    rows = []
    for (label, setting), run in itertools.product(settings_of(name), read(name)["runs"]):
        if setting.items() <= run.items():
            start = {"method": label, "setting": described(setting), "seed": run["seed"]}
            scales = {"1.0": run["scores"], **run.get("scaled", {})}
            rows += [{**start, "scale": float(scale), **scores} for scale, scores in scales.items()]
    return pandas.DataFrame(rows)


def undominated(data):
    """NLL and KL (drift), as means over the seeds, of the points (KEYS) on the fronts: those that
    no other one of their method beats in both. By ascending NLL."""
    means = data[data.method != ""].groupby(KEYS)[["nll", "drift"]].mean()
    means = means.sort_values(["nll", "drift"])
    before = lambda kl: kl.cummin().shift(fill_value=numpy.inf)     # the least KL at a lower NLL
    return means[means.drift < means.groupby("method").drift.transform(before)]


def beside_folora(data):
    """Each run's KL over that of FoLoRA's front, same seed, at the run's NLL or the nearest."""
    ratios = pandas.Series(numpy.nan, data.index)
    for seed, ours in data[data.method == "FoLoRA"].groupby("seed"):
        front, runs = undominated(ours), data[data.seed == seed]
        ratios[runs.index] = runs.drift / numpy.interp(runs.nll, front.nll, front.drift)
    return ratios


def shown(values):
    """Mean and standard deviation over the seeds, or "-" if one is missing."""
    values = pandas.Series(values)
    if values.empty or values.hasnans:
        return "-"
    mean = values.mean()
    digits = numpy.select([mean > 6, mean > 0.1, mean > 0.001, mean > 0], [1, 3, 4, 6], 4)
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def print_table(title, header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    print(f"\n{title}\n", lines[0], "|---" * len(header) + "|", *lines[1:], sep="\n")


def print_equal_nll(name, data):
    """Each method's KL where its NLL is LoRA's lowest of the same seed plus an excess, on straight
    lines between undominated points, or "≤" that of its last point if all have a lower NLL. The
    seeds are those of all LoRA's settings, the settings those that were run with all these."""
    lora = data[data.method == "LoRA"].pivot(index=KEYS, columns="seed", values="nll")
    lowest, excess, rows = lora.dropna(axis="columns").min(), (0.03, 0.01, 0.005, 0.0), []
    data = data[data.method.ne("") & data.seed.isin(lowest.index)]
    data = data.groupby(KEYS).filter(lambda some: len(some) == len(lowest))
    for method, some in data.groupby("method", sort=False):
        lines = {seed: undominated(one) for seed, one in some.groupby("seed")}
        wanted = [numpy.add(excess, lowest[seed]) for seed in lines]
        kls = [numpy.interp(nlls, line.nll, line.drift, left=numpy.nan)
               for nlls, line in zip(wanted, lines.values())]
        beyond = [nlls > line.nll.max() for nlls, line in zip(wanted, lines.values())]
        rows.append([method, *("≤ " * (any(some) and shown(kl) != "-") + shown(kl)
                               for some, kl in zip(zip(*beyond), zip(*kls)))])
    print_table(f"{name}: KL at LoRA's lowest NLL ({shown(lowest)}) +", ["method", *excess], rows)


def draw(panels):
    """assets/tradeoff.png: KL against NLL, a panel a model, a line a method, labelled beside it."""
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), squeeze=False,
                                   layout="constrained", sharey=True)
    figure.supxlabel("NLL of GSM8K solutions, nat/token (right: learns more; hollow: scaled down)")
    axes[0][0].set_ylabel("KL, nat/token (lower: forgets less)")
    for axis, (title, data) in zip(axes[0], panels.items()):
        axis.set(title=title, yscale="log")
        axis.invert_xaxis()
        lines, height = undominated(data).groupby("method"), numpy.inf
        for label in lines.drift.first().sort_values(ascending=False).index:
            line, (color, width) = lines.get_group(label), COLORS.get(label, ("0.6", 1))
            axis.plot(line.nll, line.drift, "o-", color=color, lw=width, markersize=4)
            axis.plot(*line.query("scale < 1").values.T, "ow", markersize=2)
            height = min(line.drift.iloc[0], height / 1.35)          # below the label before
            axis.annotate(label, line.iloc[0], (1.08, height), color=color, va="center",
                          textcoords=axis.get_yaxis_transform(),
                          arrowprops={"arrowstyle": "-", "linewidth": 0.3, "relpos": (0, 0.5)})
    figure.savefig(HERE / "tradeoff.png", dpi=130)


def report():
    """Print the tables of all suites that have been run, and draw the searches: NLL and KL at equal
    NLL, the undominated points that are not scaled with the settings outside the fronts, and
    Spearman's rank correlation of each measure of drift with what was lost."""
    found = {name: data for name in SUITES
             if read(name)["runs"] and not (data := measured(name)).empty}
    for name, data in found.items():
        print_equal_nll(name, data)
        untouched, kept = read(name)["untouched"], undominated(data).index
        names = [n for n in untouched if n in data and n not in ("Avg2", "GM")]
        rows = [["untouched", "", *(shown([untouched[n]]) for n in names), ""]]
        names.append("KL / FoLoRA's")
        data[names[-1]] = beside_folora(data)
        cells = data.groupby(KEYS, sort=False)[names].agg(shown)
        rows += [[*key[:2], *row] for key, row in zip(cells.index, cells.values)
                 if key[2] == 1.0 and (key in kept or key[0] == "")]
        print_table(f"{name}: NLL and KL (drift) in nat per token", [*KEYS[:2], *names], rows)
        for lost in ("prose", "Avg1"):
            some = data.drop(columns="method").drop_duplicates()
            some = some.reindex(columns=[*MEASURES, lost]).dropna()
            if len(some) > 9:
                rho = some.corr("spearman")[lost][MEASURES].round(2).to_dict()
                print(f"\n{name}, {len(some)} points, rank correlation with {lost}: {rho}")
    panels = {title: found[name] for name, title in TITLES.items() if name in found}
    if panels:
        draw(panels)


@ev.one_line
def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=(*SUITES, "gpu", "report"))
    parser.add_argument("--harness", help="gpu: lm-eval's tasks, as for eval.py")
    options, more = parser.parse_known_args(arguments)
    if options.suite == "report":
        return report()
    CACHE.mkdir(parents=True, exist_ok=True)
    if options.suite == "gpu":
        return gpu(more, options.harness)
    tasks = "nll,nq_open,webqs,drift" if "-" in options.suite else "nll,drift"
    if options.suite == "tiny":
        tasks = f"{ev.default_tasks('tiny')},nll={ev.TINY / 'test.jsonl'}"
    if options.suite == "codes":
        train, test = CACHE / "codes.jsonl", CACHE / "codes_test.jsonl"
        write_codes(train, 1), write_codes(test, 2)
        tasks, more = f"facts,sort,reverse,sums,drift,nll={test}", ["--data", str(train), *more]
    run_all(options.suite, (*SUITES[options.suite].split(), "--tasks", tasks, *more))


if __name__ == "__main__":
    main()
