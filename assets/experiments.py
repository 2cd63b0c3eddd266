"""The README's measurements. Each run is a command line of train_math.py; the ones that are not in the JSON yet are run.

    python assets/experiments.py tiny                                  # every run on the embedded model
    python assets/experiments.py smollm2 --model DIR --data GSM8K_TRAIN.jsonl --test GSM8K_TEST.jsonl
    python assets/experiments.py fresh --model DIR --data GSM8K_TRAIN.jsonl --test GSM8K_TEST.jsonl --nq NQ.jsonl --webqs WEBQ.jsonl
    python eval.py --report                                            # tables and figures from the JSON

`smollm2` finds the settings; `fresh` repeats them with seeds, test solutions and held-out text that chose nothing.
Results go to assets/tiny.json, smollm2.json and fresh.json: {"untouched": scores, "runs": [{"flags", "change", "seed", "scores", ...}]}.
An interrupted suite goes on where it was; runs share the model, the calibration text, the covariances and the bases.
"""
import argparse
import copy
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import eval as ev                                          # noqa: E402
import folora                                              # noqa: E402
import train_math                                          # noqa: E402

CACHE = ROOT / "runs" / "experiments"
FRESH_ROWS = CACHE / "fresh.jsonl"
QUESTIONS = {"nq_open": "Answer these questions:\n\nQ: {}?\nA:", "webqs": "Question: {}\nAnswer:"}     # as eval.py asks them
PREPARING = ("rank", "tau", "calibration", "calibration_samples", "calibration_max_tokens", "calibration_model", "task_samples",
             "max_samples", "max_length", "data", "seed", "dtype", "model")


# ---- changes to FoLoRA that no flag of train_math makes: (optimizer, model, sites) -> None ------------------------------------------

def gate_after(optimizer, model, sites):
    """Adam's moments in A's own coordinates, the gate applied to its step: ΔA = Adam's step · V⁻ᵀ diag(s̃) Vᵀ."""
    groups = [(g, torch.linalg.inv(g["basis"].double()).mT.float() * g["gate"] @ g["basis"].mT.float()) for g in optimizer.param_groups if g["basis"] is not None]
    before = {}
    for group, _ in groups:
        group["basis"] = group["gate"] = None

    def keep(*_):
        before.update({p: p.detach().clone() for group, _ in groups for p in group["params"]})

    @torch.no_grad()
    def project(*_):
        for group, P in groups:
            for p in group["params"]:
                p.copy_(before[p] + (p - before[p]) @ P)   # (r, d_in) @ (d_in, d_in)
    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(project)


def gate_on_b(optimizer, model, sites):
    """B restrained by the rule for A, on its own input z = A0 x: with Ā0 = A0 V⁻ᵀ, z has A0 H A0ᵀ = Ā0 Ā0ᵀ and A0 C_task A0ᵀ = Ā0 Γ Ā0ᵀ."""
    plain = optimizer.param_groups.pop()
    for site in sites:
        A_bar = torch.linalg.solve(site["V"].double(), site["A0"].double().mT).mT               # (r, d_in)
        H, C_task = (A_bar * g @ A_bar.mT for g in (torch.ones(()), site["gamma"].double()))  # (r, r); then their scales, as A's
        H, C_task = (C / H.diagonal().mean() for C in (H, C_task))
        gamma, V = folora.generalized_eigenbasis(C_task, H, 1e-6)
        optimizer.add_param_group({"params": [model.get_submodule(name).lora_B for name in site["modules"]], "lr": plain["lr"],
                                   "basis": V.float(), "gate": folora.spectral_gate(gamma.float(), 1.0, 0.3)})


def float32_products(optimizer, model, sites):
    """The bases, rounded to bfloat16 as they are, multiplied in float32."""
    for group in (g for g in optimizer.param_groups if g["basis"] is not None):
        group["basis"] = group["basis"].float()


CHANGES = {"gate after": gate_after, "gate on B": gate_on_b, "float32 products": float32_products}


# ---- runs -----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def loaded(arguments):
    """What all runs of a suite share: (model, tokenizer, examples, tasks, held-out text, {name: encoded questions with their answers})."""
    options = train_math.parse_options(list(arguments))
    model, tokenizer, examples, tasks = train_math.load(options)
    text = dict(samples=32, seed=ev.HELD_OUT_SEED + 1) if str(FRESH_ROWS) in options.tasks else {}
    answers = {name: [with_answer(tokenizer, form, row) for row in tasks.pop(name)[0]] for name, form in QUESTIONS.items() if name in tasks}       # not generated
    return model, tokenizer, examples, tasks, ev.held_out(model, tokenizer, min(256, options.calibration_max_tokens), **text), answers


def with_answer(tokenizer, form, row):
    """{"ids", "labels"} of a question and its first answer, which bears the loss. A model of 135M gives almost no exact answer (0 of 200
    untouched): its exact matches cannot fall, but the NLL of the answers can rise."""
    question, answer = form.format(row["question"]), ev.answers_of(row, "the questions", 0)[0]
    prompt, ids = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answer}"))
    return {"ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]}


def scores_of(suite, model):
    """Every score of a model, those of the suite's tasks and the NLL of its questions' answers."""
    reference, tokenizer, _, tasks, texts, answers = loaded(suite)
    scores = ev.evaluate(model, tokenizer, tasks, reference, texts)
    scores.update(ev.summarise(scores))
    scores.update({f"{name} answers": ev.mean_nll(model, examples) for name, examples in answers.items()})
    return {name: round(score, 5) for name, score in scores.items()}


def prepared_path(options):
    key = json.dumps({name: getattr(options, name) for name in PREPARING})
    return CACHE / f"{hashlib.sha1(key.encode()).hexdigest()[:12]}.pt"


def prepare(suite, flags, seed):
    """C_pre and FoLoRA's sites of one preparation, on disk."""
    options = train_math.parse_options([*suite, *flags, "--seed", str(seed)])
    model, tokenizer, examples, *_ = loaded(suite)
    texts = train_math.calibration_texts(options, model, tokenizer)
    sites = train_math.solve(options, model, texts, examples, {})
    train_math.save({"C_pre": train_math.covariances(options, model, texts, "C_pre"), "sites": sites}, prepared_path(options))


def untouched(suite):
    return scores_of(suite, loaded(suite)[0])


def trained(suite, flags, change, seed):
    """One training run: (the merged model, the mean loss of its last five steps)."""
    options = train_math.parse_options([*suite, *flags, "--seed", str(seed)])
    reference, _, examples, _, texts, _ = loaded(suite)
    if not prepared_path(options).exists():
        prepare(suite, flags, seed)
    state, model = torch.load(prepared_path(options)), copy.deepcopy(reference)
    torch.manual_seed(seed)
    optimizer = train_math.add_adapters(options, model, state["sites"], state["C_pre"])
    if change:
        CHANGES[change](optimizer, model, state["sites"])
    with tempfile.TemporaryDirectory() as out:
        train_math.train(options, model, optimizer, examples, train_math.Probe(reference, texts), Path(out))
        losses = [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return folora.merge(model), round(sum(losses[-5:]) / 5, 4)


def run(suite, flags, change, seed):
    """One training run and its scores."""
    start = time.time()
    model, loss = trained(suite, flags, change, seed)
    return {"flags": flags, "change": change, "seed": seed, "loss": loss, "seconds": round(time.time() - start), "scores": scores_of(suite, model)}


def drift_by_kind(suite, flags):
    """{kind of tiny's pretraining documents: KL on 64 of them}: a method's drift, taken apart; and its scores."""
    (model, _), (reference, tokenizer, *_) = trained(suite, flags, None, 0), loaded(suite)
    texts = {kind: [torch.tensor(tokenizer(row["text"])["input_ids"]) for row in ev.read_rows(str(source_file(kind)), limit=64)] for kind in KINDS}
    return {**scores_of(suite, model), **{kind: round(ev.drift(model, reference, some), 4) for kind, some in texts.items()}}


def write(results, path):
    """JSON with one line a run, replaced as a whole."""
    path.with_suffix(".part").write_text(json.dumps(results).replace('{"flags"', '\n{"flags"'))
    path.with_suffix(".part").replace(path)


def processes(workers):
    """A pool that shares the cores out."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (max(1, (os.cpu_count() or 1) // workers),))


def run_all(name, suite, wanted, workers):
    """Run what assets/<name>.json lacks of `wanted`, [(flags, change, seed)], in `workers` processes, and add each result as it comes."""
    path, suite = HERE / f"{name}.json", tuple(suite)
    results = json.loads(path.read_text()) if path.exists() else {"runs": []}
    key = lambda run: json.dumps([list(run[0]), run[1], run[2]])
    done = {key((r["flags"], r["change"], r["seed"])) for r in results["runs"]}
    wanted = [run for run in {key(run): run for run in wanted}.values() if key(run) not in done]
    first = {prepared_path(train_math.parse_options([*suite, *flags, "--seed", str(seed)])): (flags, seed) for flags, _, seed in wanted}
    with processes(workers) as pool:
        jobs = [pool.submit(prepare, suite, *what) for file, what in first.items() if not file.exists()]
        if "untouched" not in results:
            results["untouched"] = pool.submit(untouched, suite).result()
        for job in tqdm(as_completed(jobs), total=len(jobs), desc=f"{name}: prepare"):
            job.result()
        jobs, failed = [pool.submit(run, suite, *what) for what in wanted], None
        for job in tqdm(as_completed(jobs), total=len(jobs), desc=f"{name}: runs"):
            failed = job.exception() or failed
            results["runs"] += [job.result()] if job.exception() is None else []
            write(results, path)
    if failed:                                             # only now: what the others found is kept
        raise failed
    return results


# ---- what is run ----------------------------------------------------------------------------------------------------

# label: (flags, the last of which is swept; its values on tiny; on SmolLM2)
LAM = "FoLoRA, tuned, λ swept at lr 3e-3"
FRONTS = {
    "LoRA": (["--method", "lora", "--lr"], ("1e-3", "2e-3", "4e-3", "8e-3"), ("3e-4", "1e-3", "2e-3", "4e-3")),
    "MiLoRA": (["--method", "milora", "--lr"], ("1e-3", "2e-3", "4e-3", "8e-3"), ("1e-4", "3e-4", "5e-4", "1e-3")),
    "CorDA": (["--method", "corda", "--lr"], ("1e-3", "2e-3", "4e-3", "8e-3"), ("1e-4", "2e-4", "3e-4", "1e-3")),
    "OPLoRA": (["--method", "oplora", "--lr"], ("2e-3", "4e-3", "8e-3", "1.6e-2"), ("3e-4", "1e-3", "2e-3", "4e-3")),
    "LoRA-Null": (["--method", "lora-null", "--lr"], ("1e-3", "2e-3", "4e-3", "8e-3"), ("1e-4", "2e-4", "3e-4", "1e-3")),
    "LoRA-Null v2 (A frozen)": (["--method", "lora-null-v2", "--lr"], ("4e-3", "8e-3", "1.6e-2", "3.2e-2"), ("1e-3", "3e-3", "6e-3", "1.2e-2")),
    "FoLoRA, paper": (["--lr"], ("2e-3", "4e-3", "8e-3", "1.6e-2"), ("1e-4", "3e-4", "6e-4", "1e-3")),
    "FoLoRA, tuned": (["--preset", "tuned", "--lr"], ("4e-3", "8e-3", "1.6e-2", "3.2e-2"), ("2e-3", "3e-3", "6e-3", "1.2e-2")),
    "FoLoRA, tuned, the paper's start": (["--preset", "tuned", "--zero-start", "0", "--lr"], ("8e-3", "1.1e-2", "1.6e-2", "3.2e-2"), ("1e-3", "2e-3", "3e-3", "6e-3")),
    LAM: (["--preset", "tuned", "--lr", "3e-3", "--lam"], (), ("10", "3", "1", "0.3")),
}
# label: (flags beside the learning rate of the suite, change)
ABLATIONS = {
    "as in the paper": ([], None),
    "gate off (1 everywhere), the same basis": (["--s-min", "1"], None),
    "basis off (plain Adam), the same start": (["--update-a", "plain"], None),
    "A frozen": (["--update-a", "frozen"], None),
    "Adam's moments in A's own coordinates, the gate after": ([], "gate after"),
    "λ = 0.5": (["--lam", "0.5"], None),
    "λ = 2": (["--lam", "2"], None),
    "s_min = 0.1": (["--s-min", "0.1"], None),
    "s_min = 0.5": (["--s-min", "0.5"], None),
    "B restrained too": ([], "gate on B"),
}
# label: (flags, change), on SmolLM2
TUNED_ABLATIONS = {
    "tuned": (["--preset", "tuned", "--lr", "3e-3"], None),
    "tuned, the paper's start": (["--preset", "tuned", "--zero-start", "0", "--lr", "3e-3"], None),
    "tuned, the paper's gate (λ = 1, s_min = 0.3)": (["--zero-start", "1", "--lr", "3e-3"], None),
    "tuned, λ = 1": (["--preset", "tuned", "--lr", "3e-3", "--lam", "1"], None),
    "tuned, s_min = 0.3": (["--preset", "tuned", "--s-min", "0.3", "--lr", "3e-3"], None),
    "tuned, gate off, lr of A 1e-3": (["--preset", "tuned", "--s-min", "1", "--lr", "3e-3", "--lr-a", "1e-3"], None),
    "tuned, basis off (plain Adam)": (["--preset", "tuned", "--update-a", "plain", "--lr", "3e-3"], None),
    "tuned, basis off, lr of A 1e-3": (["--preset", "tuned", "--update-a", "plain", "--lr", "3e-3", "--lr-a", "1e-3"], None),
    "tuned, A frozen": (["--preset", "tuned", "--update-a", "frozen", "--lr", "3e-3"], None),
    "tuned, A frozen, lr 1e-2": (["--preset", "tuned", "--update-a", "frozen", "--lr", "1e-2"], None),
    "tuned, Adam's moments in A's own coordinates, the gate after": (["--preset", "tuned", "--lr", "3e-3"], "gate after"),
}


KINDS = {"biography": "facts told", "quiz": "facts and skills asked", "drill": "bare sums and products", "story": "one-step stories",
         "exercise": "one-step stories and skills in the target's prompt"}
SOURCES = {"sampled from the model": None, "the true pretraining distribution": "biography,quiz,exercise,drill,story", "facts only": "biography"}
BUDGETS = {32: (1, 32), 128: (1, 128), 512: (4, 128), 2048: (16, 128)}       # tokens: (texts, tokens each); down_proj's d_in is 512
# Whose drift is taken apart by kind: learning rates with an NLL of .07 to .09 at the first seed
BY_KIND = (("LoRA", "4e-3"), ("MiLoRA", "4e-3"), ("OPLoRA", "4e-3"), ("FoLoRA, paper", "8e-3"), ("FoLoRA, tuned, the paper's start", "1.6e-2"))
SEEDS = (0, 1, 2)                                          # of each front's best learning rate; everything else has the first
SUITE = {
    "tiny": "--max-steps 160 --batch-size 8 --eval-samples 100 --log-every 1000 --tasks gsm8k=tiny/test.jsonl,nll=tiny/test.jsonl,facts,sort,reverse,sums,drift",
    "smollm2": "--rank 32 --max-steps 40 --batch-size 8 --micro-batch-size 4 --calibration-samples 80 --calibration-max-tokens 160 --task-samples 128 --passes 1 "
               "--dtype bfloat16 --eval-samples 64 --log-every 1000",
}
SUITE["fresh"] = SUITE["smollm2"].replace("--eval-samples 64", "--eval-samples 250")
# The preset's path in `smollm2`, from least KL to least NLL: the learning rate up to 3e-3, then λ down
PATH = (("FoLoRA, tuned", "2e-3"), ("FoLoRA, tuned", "3e-3"), (LAM, "3"), (LAM, "1"))
# With seeds, rows and text of their own: each front's learning rate of lowest NLL in `smollm2`, and more of the four fronts of least KL
FRESH = (("LoRA", "2e-3"), ("MiLoRA", "5e-4"), ("CorDA", "3e-4"), ("CorDA", "1e-4"), ("OPLoRA", "2e-3"), ("LoRA-Null", "1e-3"),
         ("LoRA-Null v2 (A frozen)", "3e-3"), ("LoRA-Null v2 (A frozen)", "1e-3"), ("FoLoRA, paper", "6e-4"), ("FoLoRA, paper", "3e-4"),
         *PATH, ("FoLoRA, tuned", "6e-3"))
FRESH_SEEDS, FRESH_TEST = (3, 4, 5), slice(64, 192)        # `smollm2` looks at the first 64 test solutions
TARGET = {"tiny": "NLL of unseen word problems' solutions, nat/token", "smollm2": "NLL of GSM8K test solutions, nat/token"}


def front(label, suite):
    """[(learning rate or λ, flags)] of a method's front."""
    flags, *values = FRONTS[label]
    return [(value, [*flags, value]) for value in values[suite == "smollm2"]]


def screening(suite):
    """Every point of every front, with the first seed."""
    return [(flags, None, 0) for label in FRONTS for _, flags in front(label, suite)]


def best(results, suite):
    """The other seeds of each front's point with the lowest NLL at the first seed."""
    nll = {json.dumps(r["flags"]): r["scores"]["nll"] for r in results["runs"] if r["change"] is None and r["seed"] == SEEDS[0]}
    found = [min((flags for _, flags in front(label, suite)), key=lambda flags: nll[json.dumps(flags)]) for label in FRONTS if front(label, suite)]
    return [(flags, None, seed) for seed in SEEDS[1:] for flags in found]


def ablations(suite):
    """{label: (flags, change)}: of the paper's setting, and on SmolLM2 of the preset."""
    lr = FRONTS["FoLoRA, paper"][1 + (suite == "smollm2")][1]
    out = {label: ([*flags, "--lr", lr], change) for label, (flags, change) in ABLATIONS.items()}
    return out if suite == "tiny" else {**out, **TUNED_ABLATIONS}


def fresh():
    """[(flags, change, seed)], seed by seed: where it is cut short, every setting has as many."""
    return [(dict(front(label, "smollm2"))[lr], None, seed) for seed in FRESH_SEEDS for label, lr in FRESH]


def sources():
    """{label: flags}: FoLoRA with C_pre from each source, and from few tokens of its own."""
    out, lr = {}, FRONTS["FoLoRA, paper"][1][1]
    for label, kinds in SOURCES.items():
        out[label] = ["--lr", lr] + (["--calibration", os.path.relpath(source_file(kinds), ROOT)] if kinds else [])
    for tokens, (texts, each) in BUDGETS.items():
        out[f"{tokens} tokens of its own"] = ["--lr", lr, "--calibration-samples", str(texts), "--calibration-max-tokens", str(each)]
    return out


def source_file(kinds):
    return CACHE / f"{kinds.replace(',', '-')}.jsonl"


def write_sources():
    """256 documents of tiny's pretraining distribution for each source that is not the model, and for each kind."""
    for kinds in {*filter(None, SOURCES.values()), *KINDS}:
        done = subprocess.run([sys.executable, str(ROOT / "tiny/make_tiny.py"), "--documents", "256", "--kinds", kinds], capture_output=True, text=True, check=True)
        source_file(kinds).write_text(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITE)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or directory; this and the files are for smollm2 and fresh")
    parser.add_argument("--data", default="openai/gsm8k", help="GSM8K's training set")
    parser.add_argument("--test", help="GSM8K's test set as .jsonl (default: the hub's)")
    parser.add_argument("--nq", help="NQ-Open's validation set as .jsonl (default: the hub's)")
    parser.add_argument("--webqs", help="WebQuestions' test set as .jsonl (default: the hub's)")
    parser.add_argument("--only", choices=("fronts", "ablations", "sources"), help="one part of the suite")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(), help="runs at a time (default: one a core, or one on a GPU)")
    options = parser.parse_args()
    if options.only and options.suite == "fresh":
        parser.error("--only is a part of tiny or smollm2: fresh has no parts")
    for name in ("model", "data", "test", "nq", "webqs"):
        if getattr(options, name) and Path(getattr(options, name)).exists():
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
    os.chdir(ROOT)
    CACHE.mkdir(parents=True, exist_ok=True)
    suite, name = suite_of(options), options.suite
    if name == "fresh":
        return run_all(name, suite, fresh(), options.workers)
    if name == "tiny":
        write_sources()
    parts = {"fronts": screening(name), "ablations": [(*run, 0) for run in ablations(name).values()],
             "sources": [(flags, None, 0) for flags in sources().values()] if name == "tiny" else []}
    results = run_all(name, suite, [run for part in parts if options.only in (None, part) for run in parts[part]], options.workers)
    if options.only in (None, "fronts"):
        results = run_all(name, suite, best(results, name), options.workers)
    if name == "smollm2" and "spectrum" not in results and options.only is None:
        results["spectrum"] = spectrum(suite)
    if name == "tiny" and "kinds" not in results and options.only is None:
        with processes(options.workers) as pool:
            jobs = {f"{label}, lr {lr}": pool.submit(drift_by_kind, tuple(suite), dict(front(label, name))[lr]) for label, lr in BY_KIND}
            results["kinds"] = {setting: job.result() for setting, job in tqdm(jobs.items(), desc="kinds")}
    write(results, HERE / f"{name}.json")


def suite_of(options):
    """The flags that all runs of a suite have."""
    given = lambda task, path: task + f"={path}" * bool(path)
    tasks = [given("nll", options.test), "drift"]
    if options.suite == "fresh":
        rows = ev.read_rows(options.test or "openai/gsm8k", "main", "test")[FRESH_TEST]
        FRESH_ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks = [given("nll", FRESH_ROWS), "drift", given("nq_open", options.nq), given("webqs", options.webqs)]
    real = ["--model", options.model, "--data", options.data, "--tasks", ",".join(tasks)]
    return SUITE[options.suite].split() + (real if options.suite != "tiny" else [])


# ---- the spectrum of one layer --------------------------------------------------------------------------------------

def spectrum(suite, module="down_proj"):
    """γ of the middle layer's `module`, and C_task in C_pre's eigenbasis: mean |entries| over 32 x 32 blocks, largest eigenvalues first."""
    options = train_math.parse_options([*suite, "--seed", "0"])
    state = torch.load(prepared_path(options))
    sites = [site for site in state["sites"] if site["modules"][0].endswith(module)]
    site = sites[len(sites) // 2]
    inverse = torch.linalg.inv(site["V"].double())         # C_task = V⁻ᵀ Γ V⁻¹
    C_task = inverse.mT * site["gamma"].double() @ inverse
    U = torch.linalg.eigh(state["C_pre"][site["modules"][0]].double()).eigenvectors.flip(-1)    # (d_in, d_in)
    rotated, n = (U.mT @ C_task @ U).abs(), len(U) // 32
    blocks = rotated[:32 * n, :32 * n].view(32, n, 32, n).mean((1, 3))
    off = 1 - rotated.diagonal().square().sum() / rotated.square().sum()
    return {"module": site["modules"][0], "gamma": [float(f"{g:.4g}") for g in site["gamma"].tolist()], "off_diagonal_energy": round(off.item(), 4),
            "blocks": [[float(f"{x:.3g}") for x in row] for row in blocks.tolist()]}


# ---- tables and figures ---------------------------------------------------------------------------------------------

def points(results, flags, change=None):
    """{metric: (mean, spread, n)} over the seeds of one setting; the spread is the sample standard deviation."""
    runs = [r["scores"] for r in results["runs"] if (r["flags"], r["change"]) == (flags, change)]
    out = {}
    for metric in runs[0] if runs else ():
        values = torch.tensor([run[metric] for run in runs], dtype=torch.float64)
        out[metric] = (values.mean().item(), values.std().item() if len(runs) > 1 else 0.0, len(runs))
    return out


def at(line, x):
    """y of a front [(x, y)], in the order of its points, at the target score x: straight lines between its points, the first
    crossing; None if it never gets there."""
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if min(x0, x1) <= x <= max(x0, x1):
            return y0 if x0 == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def with_spread(point, digits):
    mean, spread, n = point
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if n > 1 else "")


def there(ours, point, metric):
    """`metric` of our front at the NLL of another's point, as text."""
    y = at([(p["nll"][0], p[metric][0]) for p in ours], point["nll"][0])
    if y is None:
        return "learns more at every lr" if all(p["nll"][0] < point["nll"][0] for p in ours) else "not reached"
    return f"{y:.{4 if metric == 'drift' else 1}f}"


def line_of(result, label, suite):
    """[(learning rate or λ, points)] of a front, as far as it has been run."""
    return [(lr, found) for lr, flags in front(label, suite) if (found := points(result, flags))]


def print_fronts(suite, result):
    """Every point of every front, and both presets of FoLoRA at the same NLL."""
    shown = [m for m in ("nll", "drift", "Avg1", "gsm8k") if m in result["untouched"]]
    compared = [m for m in shown if m in ("drift", "Avg1")]
    lines = {label: line_of(result, label, suite) for label in FRONTS}
    ours = {label: [p for _, p in lines[label]] for label in FRONTS if label.startswith("FoLoRA") and lines[label]}
    print(f"\n{suite}: {TARGET[suite]}; KL (drift), nat/token; mean ± standard deviation of the seeds, where there are several\n")
    print("| method | lr or λ | " + " | ".join(shown) + " | " + " | ".join(f"{label}, there: {m}" for label in ours for m in compared) + " |")
    print("|---" * (2 + len(shown) + len(ours) * len(compared)) + "|")
    print("| untouched | | " + " | ".join(f"{result['untouched'][m]:.4g}" for m in shown) + " |" + " |" * (len(ours) * len(compared)))
    for label, line in lines.items():
        for lr, point in line:
            print(f"| {label} | {lr} | " + " | ".join(with_spread(point[m], 4 if m in ("drift", "nll") else 1) for m in shown) + " | "
                  + " | ".join(there(ours[other], point, m) for other in ours for m in compared) + " |")


def print_fresh(result):
    """The repetition of the best settings: every score, and the tuned preset's KL at the same NLL."""
    found = {(label, lr): points(result, dict(front(label, "smollm2"))[lr]) for label, lr in FRESH}
    found = {key: point for key, point in found.items() if point}
    ours = [found[key] for key in PATH if key in found]
    shown = list(result["untouched"])
    print("\nfresh: 128 other test solutions, 32 other held-out texts, other seeds; nat/token\n")
    print("| method | lr or λ | seeds | " + " | ".join(shown) + " | KL of tuned, there |\n" + "|---" * (4 + len(shown)) + "|")
    print("| untouched | | | " + " | ".join(f"{result['untouched'][m]:.4f}" for m in shown) + " | |")
    for (label, lr), point in found.items():
        print(f"| {label} | {lr} | {point['nll'][2]} | " + " | ".join(with_spread(point[m], 4) for m in shown) + f" | {'' if point in ours else there(ours, point, 'drift')} |")


def print_settings(suite, result, settings):
    """One row a setting: [target score, KL, what was kept]."""
    shown = [m for m in result["untouched"] if m in ("nll", "drift", "Avg1", "gsm8k") or ev.role(m) == "preserve"]
    settings = {label: run for label, run in settings.items() if points(result, *run)}
    if not settings:
        return
    print("\n| | seeds | " + " | ".join(shown) + " |\n" + "|---" * (2 + len(shown)) + "|")
    for label, (flags, change) in settings.items():
        point = points(result, flags, change)
        print(f"| {label} | {point['drift'][2]} | " + " | ".join(with_spread(point[m], 4 if m in ("drift", "nll") else 1) for m in shown) + " |")


def print_kinds(result):
    """KL on each kind of text that tiny was pretrained on."""
    if "kinds" not in result:
        return
    shown = ("nll", "drift", *KINDS)
    print("\ntiny: KL, nat/token, on 64 documents of each kind that it was pretrained on; first seed\n")
    print("| | nll | drift | " + " | ".join(f"{kind}: {what}" for kind, what in KINDS.items()) + " |\n" + "|---" * (1 + len(shown)) + "|")
    for label, found in result["kinds"].items():
        print(f"| {label} | " + " | ".join(f"{found[name]:.4f}" for name in shown) + " |")


def draw_tradeoff(results):
    """assets/tradeoff.png: a panel a measure, a line a method, a point a learning rate."""
    from matplotlib import pyplot
    panels = [(suite, m) for suite in results for m in ("Avg1", "drift") if m in results[suite]["untouched"]]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, (suite, metric) in zip(axes[0], panels):
        for i, label in enumerate(FRONTS):
            line = [p for _, p in line_of(results[suite], label, suite)]
            ours = label.startswith("FoLoRA")
            x, y = ([p[m] for p in line] for m in ("nll", metric))
            axis.errorbar([v[0] for v in x], [v[0] for v in y], [v[1] for v in y], [v[1] for v in x], label=label, marker="os^vD<>P*X"[i],
                          color={6: "C1", 7: "C3", 8: "C4", 9: "C2"}[i] if ours else pyplot.cm.tab20c(16 + i % 4 if i < 4 else 4 + i), zorder=3 if ours else 2,
                          linewidth=2 if ours else 1, markersize=5, capsize=2)
        axis.set(xlabel=TARGET[suite], ylabel="KL from the untouched model, nat/token" if metric == "drift" else "what it knew before: mean of four scores, %",
                 title=f"{'tiny' if suite == 'tiny' else 'SmolLM2-135M, GSM8K'}: {'forgetting' if metric == 'drift' else 'preservation'}")
        if metric == "drift":
            axis.set_yscale("log")
        axis.set_ylim(*((None, 0.5) if metric == "drift" else (60, None)))          # a method that fell apart is in the JSON alone
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FRONTS), fontsize=7)
    figure.savefig(HERE / "tradeoff.png", dpi=130)


def draw_sources(result):
    """assets/sources.png: what each capability keeps, by the source of C_pre and by its number of tokens."""
    from matplotlib import pyplot
    settings = {label: points(result, flags) for label, flags in sources().items()}
    settings = {label: point for label, point in settings.items() if point}
    if not settings:
        return
    names = [m for m in result["untouched"] if ev.role(m) == "preserve"] + ["gsm8k"]
    figure, axis = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for i, (label, point) in enumerate(settings.items()):
        places = [j + 0.8 * (i + 0.5) / len(settings) - 0.4 for j in range(len(names))]
        axis.bar(places, [point[m][0] for m in names], 0.8 / len(settings), yerr=[point[m][1] for m in names], label=label, color=pyplot.cm.viridis(i / len(settings)))
    for j, name in enumerate(names):
        axis.hlines(result["untouched"][name], j - 0.4, j + 0.4, color="black", linewidth=1)
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="score, % (line: untouched)", title="tiny: FoLoRA with C_pre from ...")
    axis.legend(fontsize=7)
    figure.savefig(HERE / "sources.png", dpi=130)


def draw_spectrum(spectrum):
    """assets/spectrum.png: the paper's Fig. 2a and 1a for one layer."""
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    gamma = torch.tensor(spectrum["gamma"])
    left.semilogy(gamma, color="black", label="γ")
    for lam in (0.5, 1.0, 2.0):
        left.semilogy(folora.spectral_gate(gamma, lam, 0.3), label=f"gate, λ = {lam:g}, s_min = 0.3")
    left.set(xlabel="direction, in descending γ", title=spectrum["module"], ylim=(1e-3, None))
    left.legend(fontsize=8)
    image = right.imshow(torch.tensor(spectrum["blocks"]).log10(), cmap="magma")
    right.set(title="C_task in C_pre's eigenbasis (log₁₀, blocks)", xticks=[], yticks=[],
              xlabel=f"{100 * spectrum['off_diagonal_energy']:.0f}% of its energy is off the diagonal")
    figure.colorbar(image)
    figure.savefig(HERE / "spectrum.png", dpi=130)


def load_results(suite):
    path = HERE / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else None


def report():
    """Print the tables; draw the figures."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--report draws figures: pip install matplotlib")
    matplotlib.use("Agg")
    results = {suite: load_results(suite) for suite in TARGET}
    results = {suite: result for suite, result in results.items() if result}
    if not results:
        sys.exit("no measurement in assets/ yet: python assets/experiments.py tiny")
    for suite, result in results.items():
        print_fronts(suite, result)
        print_settings(suite, result, ablations(suite))
    if "tiny" in results:
        print_settings("tiny", results["tiny"], {label: (flags, None) for label, flags in sources().items()})
        draw_sources(results["tiny"])
        print_kinds(results["tiny"])
    if fresh_result := load_results("fresh"):
        print_fresh(fresh_result)
    if "spectrum" in results.get("smollm2", {}):
        draw_spectrum(results["smollm2"]["spectrum"])
    draw_tradeoff(results)


if __name__ == "__main__":
    main()
