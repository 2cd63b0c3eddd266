"""The README's measurements. A run is a command line of train_math.py, or a baseline in its loop.

    python assets/experiments.py smollm2 --model DIR --data TRAIN.jsonl --tasks nll=TEST.jsonl,drift
    python assets/experiments.py report                   # tables and a figure from the JSON files
    python assets/experiments.py gpu --model Qwen2.5-1.5B --harness ifeval,mmlu

The searches (smollm2, gemma3, tiny) run every setting once, with seed 0. From them, smollm2-fresh
and gemma3-fresh take each method's undominated settings: those that no other setting of the same
method beats in both NLL and KL. They run these with three other seeds, other test solutions and
other held-out text. smollm2-long trains ten times as long. A suite writes assets/<suite>.json; an
interrupted one goes on where it was. Each trained update is also scored after a scaling by 0.7,
0.5 and 0.35. Runs share texts, covariances and bases on disk. The figure needs matplotlib.
"""
import argparse
import copy
import hashlib
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy
import pandas
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import baselines  # noqa: E402

import eval as ev  # noqa: E402
import folora  # noqa: E402
import train_math  # noqa: E402

CACHE = HERE.parent / "runs" / "experiments"
SCALES = (1.0, 0.7, 0.5, 0.35)
# What the calibration texts and C_pre depend on, and what the bases depend on.
TEXTS = ("model", "seed", "dtype", "calibration", "calibration_samples", "calibration_max_tokens")
BASES = (*TEXTS, "data", "max_samples", "max_length", "task_samples", "rank", "tau", "basis_rank")


# ---- what is run ---------------------------------------------------------------------------------

REAL = ("--rank 32 --batch-size 8 --micro-batch-size 4 --gradient-checkpointing 0 --dtype bfloat16 "
        "--calibration-samples 80 --calibration-max-tokens 160 --task-samples 128 --log-every 400 ")
SMOLLM2, GEMMA3 = "--model SmolLM2-135M-Instruct " + REAL, "--model google/gemma-3-270m " + REAL
SUITES = {"tiny": "--max-steps 160 --batch-size 8 --eval-samples 100 --log-every 160",
          "smollm2": SMOLLM2 + "--max-steps 40 --eval-samples 64",
          "smollm2-fresh": SMOLLM2 + "--max-steps 40 --eval-samples 250",
          "smollm2-long": SMOLLM2 + "--max-steps 400 --eval-samples 250",
          "gemma3": GEMMA3 + "--max-steps 40 --eval-samples 64",
          "gemma3-fresh": GEMMA3 + "--max-steps 40 --eval-samples 250"}
FRESH_TEST, FRESH_TEXT = slice(64, 192), dict(samples=32, seed=ev.HELD_OUT_SEED + 1)


def grid(*commands, change=None):
    """The settings of commands in which | stands between alternatives: grid("lora --lr 1e-3|2e-3")
    is [{"method": "lora", "flags": ["--lr", "1e-3"], "change": None}, and the same with 2e-3]."""
    choices = [[word.split("|") for word in command.split()] for command in commands]
    return [{"method": method, "flags": flags, "change": change}
            for words in choices for method, *flags in itertools.product(*words)]


# The fronts, {label: settings}: learning rates of methods that have no other knob, on SmolLM2 and
# Gemma and on tiny, and then all settings of each suite.
RATES = {
    "LoRA": ("lora", "3e-4|5e-4|1e-3|2e-3|4e-3", "1e-3|2e-3|4e-3|8e-3"),
    "MiLoRA": ("milora", "1e-4|3e-4|5e-4|1e-3", "1e-3|2e-3|4e-3|8e-3"),
    "CorDA": ("corda", "1e-4|2e-4|3e-4|1e-3", "1e-3|2e-3|4e-3|8e-3"),
    "OPLoRA": ("oplora", "3e-4|1e-3|2e-3|4e-3", "2e-3|4e-3|8e-3|1.6e-2"),
    "LoRA-Null": ("lora-null", "1e-4|2e-4|3e-4|1e-3", "1e-3|2e-3|4e-3|8e-3"),
    "LoRA-Null v2": ("lora-null-v2", "1e-3|3e-3|6e-3|1.2e-2", "4e-3|8e-3|1.6e-2|3.2e-2"),
    "FoLoRA, the paper's": ("folora --preset paper", "1e-4|3e-4|6e-4|1e-3",
                            "2e-3|4e-3|8e-3|1.6e-2")}
METHODS = {label: grid(f"{command} --lr {rates}") for label, (command, rates, _) in RATES.items()}
METHODS |= {
    "LoRA, rank 8": grid("lora --rank 8 --lr 5e-4|1e-3|2e-3|4e-3"),
    "LoRA, MLP alone": grid("lora --target-modules gate_proj,up_proj,down_proj "
                            "--lr 5e-4|1e-3|2e-3|4e-3"),
    "LoRA + replay": grid("lora --lr 1e-3|2e-3|4e-3 --kl 0.3|1|3", change="replay"),
    "LoRA + KL": grid("lora --lr 1e-3|2e-3|4e-3 --kl 0.3|1|3|10|30",
                      "lora --lr 2e-3 --kl 1|3 --kl-texts 2|8"),
    "FoLoRA": grid("folora --basis-rank 32|64|128|256 --lam 1 --lr 3e-3",
                   "folora --basis-rank 128 --lam 1 --lr 1.5e-3|6e-3|1.2e-2"),
    "FoLoRA + KL": grid("folora --basis-rank 128|256|0 --lam 1 --lr 3e-3 --kl 1|3|10",
                        "folora --basis-rank 256 --lam 1 --lr 6e-3 --kl 1|3|10")}
TINY = {label: grid(f"{command} --lr {rates}") for label, (command, _, rates) in RATES.items()}
TINY |= {
    "LoRA + KL": grid("lora --lr 2e-3|4e-3 --kl 0.3|1|3|10"),
    "FoLoRA": grid("folora --basis-rank 128 --lam 1 --lr 1.5e-3|3e-3|6e-3|1.2e-2|2.4e-2"),
    "FoLoRA + KL": grid("folora --basis-rank 128 --lam 1 --lr 1.2e-2|2.4e-2 --kl 0.3|1|3|10")}
LONG = {
    "LoRA": grid("lora --lr 5e-4|1e-3"),
    "LoRA + KL": grid("lora --lr 5e-4|1e-3 --kl 1|3"),
    "A frozen": grid("folora --basis-rank 128 --lam 1 --lr 1e-3|3e-3", change="A frozen"),
    "FoLoRA": grid("folora --basis-rank 64|128 --lam 1 --lr 1.5e-3|3e-3"),
    "FoLoRA + KL": grid("folora --basis-rank 128|256 --lam 1 --lr 3e-3 --kl 1|3")}
# Settings outside the fronts, which answer a question each.
OURS, ZERO = "folora --basis-rank 128 --lam 1", "folora --preset paper --zero-start 1"
PARTS = {
    "tiny":
        grid("folora --basis-rank 64 --lam 1 --lr 1.2e-2",
             "folora --basis-rank 128 --lam 10 --lr 1.2e-2", f"{OURS} --lr 1.2e-2 --zero-start 0"),
    "smollm2":
        grid(f"{ZERO} --lam 1|3|10|30 --s-min 0 --lr 3e-3", f"{ZERO} --lr 3e-3", change="one lr")
        + grid(f"{ZERO} --lam 30 --s-min 1 --lr 3e-3", change="one lr, A slow")
        + grid(f"{ZERO} --lam 30 --s-min 0 --lr 3e-3", change="one lr, A slow, plain Adam")
        + grid(f"{ZERO} --lam 30 --s-min 0 --lr 3e-3", change="one lr, A frozen")
        + grid("folora --preset paper --lam 30 --s-min 0 --lr 3e-3",
               "folora --basis-rank 256 --lam 3 --lr 3e-3",
               "folora --basis-rank 256 --lam 1 --lr 1.5e-3|6e-3",
               f"{OURS} --lr 3e-3 --s-min 0.3", f"{OURS} --lr 3e-3 --calibration-samples 10|20",
               f"{OURS} --lr 3e-3 --task-samples 16"),
    "smollm2-fresh":
        grid("folora --basis-rank 16|32|64|128|256 --lam 1|3|30 --lr 3e-3",
             "folora --basis-rank 64 --lam 1 --lr 3e-3 --s-min 0.3",
             f"{OURS} --lr 3e-3 --calibration-samples 10|20|40|160",
             f"{OURS} --lr 3e-3 --task-samples 8|16|32|64")
        + grid(f"{ZERO} --lam 1|3|30 --s-min 0 --lr 3e-3", change="one lr")}


def fronts(name):
    """{label: settings} of a suite's fronts. A fresh suite's are undominated in the search."""
    if not name.endswith("-fresh"):
        return {"tiny": TINY, "smollm2-long": LONG}.get(name, METHODS)
    search = name.removesuffix("-fresh")
    ev.need(read(search)["runs"], f"{name} takes its settings from {search}: run that first")
    kept = undominated(measured(search).query("scale == 1")).index
    return {label: [setting for setting in some if (label, described(setting), 1.0) in kept]
            for label, some in METHODS.items()}


def wanted(name):
    """Every run of a suite, a setting with its seed. Some are in two of its fronts and parts."""
    settings = [*itertools.chain(*fronts(name).values()), *PARTS.get(name, [])]
    seeds = (3, 4, 5) if name.endswith("-fresh") else (0,)
    return [setting | {"seed": seed} for seed in seeds for setting in settings]


# ---- runs ----------------------------------------------------------------------------------------

def options_of(suite, method, flags, seed):
    """train_math.py's options of a run. A baseline has LoRA's."""
    method = "folora" if method == "folora" else "lora"
    options = train_math.parse_options([*suite, "--method", method, *flags, "--seed", str(seed)])
    train_math.resolve(options)
    return options


def cached(kind, options, names, make):
    """make()'s value, kept on disk under the options that it depends on."""
    key = json.dumps([kind, *(getattr(options, name) for name in names)])
    return train_math.once(CACHE / f"{hashlib.sha1(key.encode()).hexdigest()}.pt", make)


def with_answer(tokenizer, form, question, answers):
    """{"ids", "labels"} of a question and its first answer, which bears the loss. A small model has
    almost no exact answer to lose, but the loss of the right answers can rise."""
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
    length, more = min(256, options.calibration_max_tokens), FRESH_TEXT if fresh else {}
    texts = cached("fresh text" if fresh else "held-out text", options, TEXTS,
                   lambda: ev.held_out(model, tokenizer, length, **more))
    C = train_math.covariances(options, model, [text.tolist() for text in texts], "held-out text")
    return SimpleNamespace(model=model, tokenizer=tokenizer, examples=examples, tasks=tasks,
                           answers=answers, texts=texts, C=C)


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
        shares.append(energies[0] / energies[1])
    return torch.stack(shares).mean().item()


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


def change_optimizer(optimizer, change):
    """What `change` says and no option of train_math.py does. "one lr": A and B have the same
    learning rate, as in the paper, also from B = 0. "A slow": A's is a third of B's. "A frozen": A
    stays at its start. "plain Adam": A is trained by plain Adam in its own coordinates."""
    for group in optimizer.param_groups:
        is_A = group.get("basis") is not None
        if "one lr" in change:
            group["scale"] = 1.0
        if is_A and "A slow" in change:
            group["scale"] = 1 / 3
        if is_A and "A frozen" in change:
            group["scale"] = 0.0
        if is_A and "plain Adam" in change:
            group["basis"] = group["gate"] = None


def trained(shared, options, method, change):
    """One training run: the merged model, in float32."""
    model, base = copy.deepcopy(shared.model), shared.model
    texts = cached("texts", options, TEXTS,
                   lambda: train_math.calibration_texts(options, base, shared.tokenizer))
    bases = C_pre = None
    if method == "folora":
        bases = cached("bases", options, BASES,
                       lambda: train_math.solve(options, base, texts, shared.examples))
    if method in baselines.NEEDS_C_PRE:
        C_pre = cached("C_pre", options, TEXTS,
                       lambda: train_math.covariances(options, base, texts, "C_pre"))
    torch.manual_seed(options.seed)
    if method in baselines.STARTS:
        optimizer = baselines.add_adapters(method, model, options, C_pre)
    else:
        optimizer = train_math.add_adapters(options, model, bases)
    change_optimizer(optimizer, change or "")
    # Replay takes the place of the KL penalty in the loop: a loss on old texts, with a weight.
    loss = baselines.replay if change == "replay" else train_math.kl_from_untouched
    with tempfile.TemporaryDirectory() as out, \
            mock.patch.object(train_math, "kl_from_untouched", loss):
        train_math.train(options, model, optimizer, shared.examples, lambda model: None, Path(out),
                         texts)
    return folora.merge(model.float())


def run(shared, suite, setting):
    """One training run and its scores, as a row of the JSON."""
    method, flags, change, seed = setting.values()
    options = options_of(suite, method, flags, seed)
    exact = trained(shared, options, method, change)
    scores = {str(s): scores_of(shared, scaled(shared, exact, s), s == 1.0) for s in SCALES}
    return setting | {"scores": scores.pop("1.0"), "scaled": scores}


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
    outs, columns = [], {}
    if harness:
        ev.harness_tasks(harness)                      # a wrong name shows before the training
    for kind, flags in kinds.items():
        outs.append(str(CACHE / "gpu" / kind))
        command = ["--epochs", "1", *given, *flags.split(), "--out", outs[-1]]
        options = train_math.parse_options(command)
        train_math.resolve(options)
        scores = train_math.run(options, columns.get("untouched"))
        columns["untouched"], columns[kind] = scores.values()
    print(ev.table(columns))
    if harness:
        ev.main([options.model, *outs, "--tasks", "", "--harness", harness])


# ---- tables and figures --------------------------------------------------------------------------

KEYS = ["method", "setting", "scale"]
COLORS = {"FoLoRA": "C3", "FoLoRA + KL": "C0", "LoRA + KL": "black"}      # all others are grey


def described(setting):
    """The text that stands for a setting in the tables."""
    return " ".join([*setting["flags"], setting["change"] or ""]).replace("--", "").strip()


def measured(name):
    """A suite's runs, with a row for each setting, scale and seed: KEYS, seed, and the scores. The
    method is the label of a front, or "" outside the fronts."""
    rows, labels = [], {**fronts(name), "": PARTS.get(name, [])}
    settings = [(label, setting) for label, some in labels.items() for setting in some]
    for (label, setting), run in itertools.product(settings, read(name)["runs"]):
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
    before = lambda kl: kl.cummin().shift(fill_value=math.inf)     # the least KL at a lower NLL
    return means[means.drift < means.groupby("method").drift.transform(before)]


def shown(values):
    """Mean and standard deviation over the seeds, or "-" if one is missing."""
    values = pandas.Series(values)
    if values.empty or values.hasnans:
        return "-"
    mean = values.mean()
    digits = 1 if mean > 3 else 3 if mean > 0.1 else 4
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def print_table(title, header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    print(f"\n{title}\n", lines[0], "|---" * len(header) + "|", *lines[1:], sep="\n")


def print_equal_nll(name, data, excesses=(0.03, 0.01, 0.005, 0.0)):
    """Each method's KL where its NLL is LoRA's lowest of the same seed plus an excess, on straight
    lines between undominated points, or at the last point if all have a lower NLL. The seeds are
    those of all LoRA's settings, and the settings those that were run with all these seeds."""
    lora = data[data.method == "LoRA"].pivot(index=KEYS, columns="seed", values="nll")
    lowest, rows = lora.dropna(axis="columns").min(), []
    data = data[data.method.ne("") & data.seed.isin(lowest.index)]
    data = data.groupby(KEYS).filter(lambda some: len(some) == len(lowest))
    for method, some in data.groupby("method", sort=False):
        kls = []
        for seed, one in some.groupby("seed"):
            line, wanted = undominated(one), lowest[seed] + numpy.array(excesses)
            kls.append(numpy.interp(wanted, line.nll, line.drift, left=math.nan))
        rows.append([method, *map(shown, zip(*kls))])
    title = f"{name}: KL at LoRA's lowest NLL, {shown(lowest)}, plus"
    print_table(title, ["method", *excesses], rows)


def print_settings(name, data):
    """The undominated points of every front, and the settings outside the fronts."""
    untouched = read(name)["untouched"]
    names = [n for n in untouched if n in data and n not in ("Avg2", "GM")]
    cells = data.groupby(KEYS, sort=False)[names].agg(shown)
    kept = undominated(data).index
    rows = [["untouched", "", "", *(shown([untouched[n]]) for n in names)]]
    rows += [[*key, *row] for key, row in zip(cells.index, cells.values)
             if key in kept or (key[0], key[2]) == ("", 1.0)]
    print_table(f"{name}: NLL and KL (drift) in nat per token", [*KEYS, *names], rows)


def print_correlations(name, data):
    """Spearman's rank correlation of each measure of drift with what was lost."""
    measures, data = ["drift", "penalty", "cka"], data.drop_duplicates(["setting", "scale", "seed"])
    for lost in ("prose", "Avg1"):
        some = data.reindex(columns=[*measures, lost]).dropna()
        if len(some) > 9:
            rho = some.corr("spearman")[lost][measures].round(2).to_dict()
            print(f"\n{name}, {len(some)} points, rank correlation with {lost}: {rho}")


def label_lines(axis, lines, gap=0.065):
    """Write each label beside the panel, at the height of its line's lowest NLL as far as there is
    room, and connect the two."""
    ends = sorted((line.drift.iloc[0], line.nll.iloc[0], label) for label, line in lines.items())
    low, high = map(math.log, axis.get_ylim())
    height = -math.inf
    for i, (kl, nll, label) in enumerate(ends, 1):
        own = (math.log(kl) - low) / (high - low)
        height = min(max(own, height + gap), 1 - gap * (len(ends) - i))
        connector = {"arrowstyle": "-", "linewidth": 0.3, "relpos": (0, 0.5)}
        axis.annotate(label, (nll, kl), (1.08, height), textcoords="axes fraction", va="center",
                      color=COLORS.get(label, "0.5"), arrowprops=connector)


def draw(panels):
    """assets/tradeoff.png: KL against NLL, a panel a model, a line a method."""
    from matplotlib import pyplot
    pyplot.rc("font", size=12)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), squeeze=False,
                                   layout="constrained", sharey=True)
    figure.supxlabel("NLL of GSM8K solutions, nat/token (further right: learns more)")
    axes[0][0].set_ylabel("KL, nat/token (lower: forgets less)")
    drawn = [dict(iter(undominated(data).groupby("method"))) for data in panels.values()]
    for axis, title, lines in zip(axes[0], panels, drawn):
        axis.set(title=title, yscale="log")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        for label, line in lines.items():
            axis.plot(line.nll, line.drift, "o-", color=COLORS.get(label, "0.6"),
                      lw=2.5 if label in COLORS else 1, markersize=4)
    for axis, lines in zip(axes[0], drawn):            # once all lines have set the common scale
        label_lines(axis, lines)
    figure.savefig(HERE / "tradeoff.png", dpi=130)


def report():
    """Print the tables of all suites that have been run, and draw the searches."""
    found = {name: measured(name) for name in SUITES if read(name)["runs"]}
    for name, data in found.items():
        print_equal_nll(name, data)
        print_settings(name, data)
        print_correlations(name, data)
    titles = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
    panels = {title: found[name] for name, title in titles.items() if name in found}
    if panels:
        draw(panels)


@ev.one_line
def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are train_math.py's, such as --model, --data and --tasks")
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
    suite = (*SUITES[options.suite].split(), "--tasks", tasks, *more)
    run_all(options.suite, suite)


if __name__ == "__main__":
    main()
