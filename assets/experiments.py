"""The README's measurements. A run is a command line of train_math.py, or a baseline in its loop.

    python assets/experiments.py smollm2 --model DIR --data TRAIN.jsonl --tasks nll=TEST.jsonl,drift
    python assets/experiments.py report                   # tables and a figure from the JSON files
    python assets/experiments.py gpu --model Qwen2.5-1.5B

The suites are in suites.json. The searches (smollm2, gemma3, tiny, codes) run every setting with
seed 0. The fresh suites run those that no other setting of the same method beats in both NLL and
KL, with three other seeds, test solutions and held-out texts. smollm2-long, with seed 0, trains ten
times as long and is scored so. An interrupted suite goes on where it was.
"""
import argparse
import copy
import hashlib
import itertools
import json
import shutil
import sys
from pathlib import Path

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
KL = train_math.kl_from_untouched
SCALES = (1.0, 0.7, 0.5, 0.35)             # each trained update is also scored when scaled by these
# What the calibration texts and C_pre depend on, and what the bases depend on.
TEXTS = ("model", "seed", "dtype", "target_modules", "calibration", "calibration_samples",
         "calibration_max_tokens")
BASES = (*TEXTS, "data", "max_samples", "max_length", "task_samples", "rank", "basis_rank")
FRESH_TEST, FRESH_TEXT = slice(64, 192), dict(samples=32, seed=1001)
# A suite has options, the settings of each method (also those of the suite it is "like"), and
# others, outside the methods' fronts. A setting is a command, and after a semicolon CHANGES.
SUITES = json.loads((HERE / "suites.json").read_text())


def grid(command):
    """[(text, setting)] of a command: grid("lora --lr 1e-3|2e-3") is [("lr 1e-3", {"method":
    "lora", "flags": ["--lr", "1e-3"], "change": None}), and the same with 2e-3]."""
    command, _, change = command.partition(" ; ")
    choices = [word.split("|") for word in command.split()]
    return [(" ".join([*flags, change]).replace("--", "").strip(),
             {"method": method, "flags": flags, "change": change or None})
            for method, *flags in itertools.product(*choices)]


def settings_of(name):
    """[(label, text, setting)] of a suite. A fresh suite has the undominated ones of its search."""
    suite, search = SUITES[name], name.removesuffix("-fresh")
    more = SUITES[suite["like"]]["methods"] if "like" in suite else {}
    rows = [*more.items(), *suite.get("methods", {}).items(), ("", suite.get("others", []))]
    found = [(label, *setting) for label, commands in rows for command in commands
             for setting in grid(command)]
    if search == name:
        return found
    ev.need(read(search)["runs"], f"{name} takes its settings from {search}: run that first")
    kept = undominated(measured(search).query("scale == 1")).index
    return [row for row in found if not row[0] or (*row[:2], 1.0) in kept]


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
    prompt, ids = ev.encode(tokenizer, [question, f"{question} {answers[0]}"])
    return {"ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]}


def load(suite, fresh):
    """What all runs of a suite share. C holds the covariances of the held-out texts."""
    options = options_of(suite, "folora", [], 0)
    model, tokenizer, examples, tasks = train_math.load(options)
    tasks["nll"] = tasks["nll"][FRESH_TEST if fresh else slice(None)]
    answers = {name: [with_answer(tokenizer, ev.TASKS[name].prompt, *pair)
                      for pair in tasks.pop(name)]
               for name in {"nq_open", "webqs"} & {*tasks}}
    how, length = FRESH_TEXT if fresh else {}, min(256, options.calibration_max_tokens)
    texts = cached(how, lambda _: ev.held_out(model, tokenizer, length, **how), options)
    C = train_math.covariances(options, model, [text.tolist() for text in texts], "held-out text")
    # The KL is also measured on the task's own questions, which forgetting is said to follow
    # ("RL's Razor", arXiv 2509.04259).
    questions = [ev.ALPACA.format(question) for question, _ in tasks["nll"][:32]]
    questions = [torch.tensor(ids) for ids in ev.encode(tokenizer, questions)]
    return argparse.Namespace(model=model, tokenizer=tokenizer, examples=examples, tasks=tasks,
                              answers=answers, texts=texts, questions=questions, C=C)


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
        scores["task drift"] = ev.drift(model, shared.model, shared.questions)
        scores |= {f"{n} answers": ev.mean_nll(model, some) for n, some in shared.answers.items()}
    return {name: float(f"{score:.5g}") for name, score in scores.items()}


# What no option of train_math.py does: other fields in the optimiser's groups of A.
CHANGES = {"A slow": {"scale": 1 / 3}, "A frozen": {"scale": 0.0},
           "plain Adam": {"basis": None, "gate": None, "partners": (), "shares": ()}}


def run(shared, suite, setting):
    """Train once, and score the merged model and its scaled updates: a row of the JSON."""
    method, flags, change, seed = setting.values()
    options = options_of(suite, method, flags, seed)
    base, examples, bases, C_pre = shared.model, shared.examples, None, None
    texts = cached("texts", train_math.sample, options, base, shared.tokenizer)
    if method == "folora":
        bases = cached("bases", train_math.solve, options, base, texts, examples)
    if method in baselines.NEEDS_C_PRE or method == "lora" and options.penalty:
        C_pre = cached("C_pre", train_math.covariances, options, base, texts, "C_pre")
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if method in baselines.STARTS:
        optimizer = baselines.add_adapters(method, model, options, C_pre)
    else:
        optimizer = train_math.add_adapters(options, model, bases)
    for group in optimizer.param_groups:
        if group.get("basis") is not None:
            for name in filter(None, (change or "").split(", ")):
                group.update(CHANGES.get(name, {}))
    # Replay takes the place of the KL penalty in the loop: a loss on old texts, with a weight.
    train_math.kl_from_untouched = baselines.replay if change == "replay" else KL
    # An interrupted run goes on from the checkpoint in this directory.
    out = CACHE / hashlib.sha1(json.dumps([suite, setting]).encode()).hexdigest()
    out.mkdir(exist_ok=True)
    penalty = None
    if method == "lora" and options.penalty:
        penalty = train_math.dense_penalty(options, model, C_pre)
    train_math.train(options, model, optimizer, examples, shared.texts[:1], out, texts, penalty)
    exact = folora.merge(model.float())
    scores = {str(scale): scores_of(shared, exact, scale) for scale in SCALES}
    shutil.rmtree(out)
    return setting | {"scores": scores.pop("1.0"), "scaled": scores}


def read(name):
    path = HERE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def run_all(name, suite):
    """Run what assets/<name>.json lacks. It has a line for each run, but those that diverge."""
    results, seeds = read(name), (3, 4, 5) if name.endswith("-fresh") else (0,)
    settings = [setting | {"seed": seed} for seed in seeds for *_, setting in settings_of(name)]
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
        text = json.dumps(results).replace('{"method"', '\n{"method"')
        train_math.save(text, HERE / f"{name}.json")


def gpu(given):
    """Train a larger model by LoRA, LoRA + KL, and FoLoRA as the paper's and as ours."""
    kinds = {"lora": "--method lora", "lora-kl": "--method lora --kl 1",
             "folora-paper": "--preset paper", "folora": "--preset tuned"}
    columns = {}
    for kind, flags in kinds.items():
        flags = [*flags.split(), "--epochs", "1", "--out", f"{CACHE}/gpu/{kind}"]
        options = train_math.parse_options([*flags, *given])
        train_math.resolve(options)
        scores = train_math.experiment(options, columns.get("untouched"))
        columns["untouched"], columns[kind] = scores.values()
    print(ev.table(columns))


# ---- tables and figures --------------------------------------------------------------------------
KEYS, MEASURES = ["method", "setting", "scale"], ["drift", "penalty", "cka"]
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
COLORS = {"LoRA": ("C1", 2), "FoLoRA, the paper's": ("C4", 2), "LoRA + KL": ("black", 2),
          "FoLoRA": ("C3", 2.5), "FoLoRA + KL": ("C0", 2)}
DEFAULT = "basis-rank 96 lam 1 lr 3e-3"


def measured(name):
    """A suite's runs, with a row for each setting, scale and seed: KEYS, seed, and the scores. The
    method is the label of a front, or "" outside the fronts."""
    rows = []
    for (label, text, setting), run in itertools.product(settings_of(name), read(name)["runs"]):
        if setting.items() <= run.items():
            start = {"method": label, "setting": text, "seed": run["seed"]}
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
    """assets/tradeoff.png: KL against NLL, a panel a model and a line a method."""
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels) + 2.5, 4.2),
                                   squeeze=False, layout="constrained", sharey=True)
    figure.supxlabel("loss on GSM8K solutions, nat/token (further right: learned more)")
    axes[0][0].set_ylabel("KL from the untouched model, nat/token\n(lower: forgot less)")
    shown = {}
    for axis, (title, data) in zip(axes[0], panels.items()):
        axis.set(title=title, yscale="log")
        axis.invert_xaxis()
        for label, line in undominated(data).groupby("method"):
            color, width = COLORS.get(label, ("0.75", 1))
            name = label if label in COLORS else "other rivals"
            shown[name], = axis.plot(line.nll, line.drift, "o-", color=color, lw=width,
                                     markersize=4, zorder=1 + width)
            axis.plot(*line.query("scale < 1").values.T, "ow", markersize=2, zorder=5)
        default = data[data.setting.eq(DEFAULT) & data.scale.eq(1)][["nll", "drift"]].mean()
        shown["FoLoRA's default"], = axis.plot(*default, "*", color="C3", markersize=15, zorder=6,
                                               markeredgecolor="white")
    names = [name for name in (*COLORS, "FoLoRA's default", "other rivals") if name in shown]
    figure.legend([shown[name] for name in names], names, loc="outside right center")
    figure.savefig(HERE / "tradeoff.png", dpi=130)


def report():
    """Print the tables of all suites that have been run, and draw the searches: NLL and KL at equal
    NLL, the undominated points that are not scaled with the settings outside the fronts, and
    Spearman's rank correlation of each measure of drift with what was lost."""
    found = {name: measured(name) for name in SUITES if read(name)["runs"]}
    for name, data in found.items():
        print_equal_nll(name, data)
        untouched, kept = read(name)["untouched"], undominated(data).index
        names = [n for n in untouched if n in data and n not in ("Avg2", "GM")]
        rows = [["untouched", "", *(shown([untouched[n]]) for n in names), ""]]
        names, data["KL / FoLoRA's"] = [*names, "KL / FoLoRA's"], numpy.nan
        for seed, ours in data[data.method == "FoLoRA"].groupby("seed"):
            front, runs = undominated(ours), data[data.seed == seed]
            at_same_nll = numpy.interp(runs.nll, front.nll, front.drift)
            data.loc[runs.index, names[-1]] = runs.drift / at_same_nll
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
    draw({title: found[name] for name, title in TITLES.items() if name in found})


@ev.one_line
def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=(*SUITES, "gpu", "report"))
    options, more = parser.parse_known_args(arguments)
    CACHE.mkdir(parents=True, exist_ok=True)
    if options.suite == "report":
        return report()
    if options.suite == "gpu":
        return gpu(more)
    if options.suite == "codes":
        make_tiny.write_codes(CACHE / "codes.jsonl", seed=1)
        make_tiny.write_codes(CACHE / "codes_test.jsonl", seed=2)
    run_all(options.suite, (*SUITES[options.suite]["options"].split(), *more))


if __name__ == "__main__":
    main()
