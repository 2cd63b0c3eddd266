"""Score models on the target and on what they knew before: one column a model, one row a task.

    python eval.py tiny runs/mine --tasks gsm8k=tiny/test.jsonl,facts,sums,drift
    python eval.py Qwen2.5-1.5B runs/mine --tasks gsm8k,nq_open,webqs,triviaqa,drift --limit 500

A model is a run directory of train_math.py, a checkpoint directory, or a hub id (Qwen2.5-1.5B stands for Qwen/Qwen2.5-1.5B).
Tasks (data from the hub, or from a file as in nq_open=dev.jsonl):

    gsm8k, math     target: greedy answers to the Alpaca prompt + " Let's think step by step.", the number (MATH: expression)
                    after "The answer is:" is compared, as in CorDA's protocol. math needs lm-eval for Hendrycks' equivalence.
    nll             target: nat per token of GSM8K's reference solutions; the lower the better
    nq_open, triviaqa   preservation: exact match, lm-eval 0.4.13's prompts, stops and normalisation, no examples in the prompt
    webqs           preservation: lm-eval's score, 1 if an accepted answer is the model's greedy continuation
    facts, sort, reverse, sums   preservation: what tiny/ was pretrained on, asked in nq_open's form
    drift           KL(untouched || this model), nat per token, on held-out text sampled from the untouched model

Below them: Avg1, the mean preservation score; Avg1(%), relative to the first column; Avg2, the mean target score; GM = √(Avg1 Avg2).
This file also holds what train_math.py shares with it: models, data, prompts, the loss at labelled positions.
"""
import argparse
import importlib.util
import json
import math
import os
import re
import string
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import folora

TINY = Path(__file__).resolve().parent / "tiny"
HUB = (("Llama-2-7b", "meta-llama/Llama-2-7b-hf"), ("Qwen", "Qwen/"), ("Llama", "meta-llama/"), ("SmolLM", "HuggingFaceTB/"))    # by prefix
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{}\n\n### Response:")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# task -> (role, where its data is: hub id, configuration, split, or a file)
TASKS = {
    "gsm8k": ("target", "openai/gsm8k", "main", "test"),
    "math": ("target", "DigitalLearningGmbH/MATH-lighteval", "default", "test"),
    "nq_open": ("preserve", "google-research-datasets/nq_open", None, "validation"),
    "triviaqa": ("preserve", "mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "webqs": ("preserve", "stanfordnlp/web_questions", None, "test"),
    **{name: ("preserve", str(TINY / f"{name}.jsonl"), None, None) for name in ("facts", "sort", "reverse", "sums")},
    "nll": ("measure", "openai/gsm8k", "main", "test"),
    "drift": ("measure", None, None, None),
}
HELD_OUT_SEED, HELD_OUT_SAMPLES = 1000, 16
LOGITS = 2 ** 27                                           # at a time: half a GB in float32
SUMMARY = ("Avg1", "Avg1(%)", "Avg2", "GM")


# ---- models and data ------------------------------------------------------------------------------------------------

def is_tiny(name):
    return name == "tiny" or Path(name).resolve() == TINY


def run_options(name):
    """The options that a finished run was made with; {} if `name` is not one's directory."""
    finished = (Path(name) / "summary.json").exists()
    return json.loads((Path(name) / "config.json").read_text())["options"] if finished else {}


def resolve_model(name):
    """Where the weights of a run directory, a directory, "tiny", a short name or a hub id are."""
    path = TINY if name == "tiny" else Path(name)
    if run_options(name):
        return str(path / "merged")
    if path.is_dir():
        if not (path / "config.json").exists() or (path / "prepared.pt").exists():
            sys.exit(f"{name}: neither a checkpoint nor a finished run (its training was interrupted: run the same command again)")
        return str(path)
    if "/" in name:
        if name.count("/") > 1 or name.startswith(("/", ".", "~", "runs/")):
            sys.exit(f"{name}: no such directory")
        return name
    hub = next((hub for prefix, hub in HUB if name.startswith(prefix)), None)
    if hub is None:
        sys.exit(f"{name}: no such directory, and no short name (Qwen..., Llama-..., SmolLM...): give a directory or a full hub id, owner/name")
    return hub + name if hub.endswith("/") else hub


def pick_device(device, dtype):
    """torch device and dtype from their options, "auto" meaning: a GPU in bfloat16 if there is one, else the CPU in float32."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        sys.exit(f"--device {device}: it is cpu, cuda, cuda:1 (and so on) or auto")
    if device.startswith("cuda") and int(device[5:] or 0) >= torch.cuda.device_count():
        sys.exit(f"--device {device}: this torch sees {torch.cuda.device_count() or 'no'} CUDA GPU (torch.cuda.device_count()); use --device cpu")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return torch.device(device), DTYPES[("bfloat16" if device != "cpu" else "float32") if dtype == "auto" else dtype]


def load_model(name, device, dtype):
    """(model, tokenizer), ready for inference; one clear line if it cannot be had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    where = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"cannot load the model {where}: {str(error).strip().splitlines()[0]}")
    with torch.no_grad():
        ids = torch.arange(4, device=device)[None]
        if not torch.allclose(model(ids).logits, model.get_output_embeddings()(model.base_model(ids)[0]), rtol=1e-2, atol=1e-2):
            sys.exit(f"{where} changes its logits after the output layer (soft capping or a scale), which the loss here does not do")
    return model, tokenizer


def read_rows(source, config=None, split="train", limit=None):
    """The rows (dicts) of a .jsonl file or of a hub data set."""
    if source.endswith((".jsonl", ".json")):
        if not Path(source).exists():
            sys.exit(f"{source}: no such file")
        rows = []
        for number, line in enumerate(Path(source).read_text().splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                sys.exit(f"{source}, line {number}: not JSON ({error})")
            if rows and not isinstance(rows[-1], dict):
                sys.exit(f"{source}, line {number}: not an object with fields, {{...}}, but {type(rows[-1]).__name__}")
    else:
        import datasets
        try:
            rows = list(datasets.load_dataset(source, config, split=split))
        except Exception as error:                         # the hub raises a dozen types, for no network, no such name, no access
            sys.exit(f"cannot load the data set {source}: {str(error).strip().splitlines()[0]}; a .jsonl file can be given instead")
    if not rows:
        sys.exit(f"{source}: no rows")
    return rows[:limit]


def field(row, names, source, number):
    """The first of `names` that the row has; one clear line if it has none."""
    found = next((name for name in names if row.get(name)), None)
    if found is None:
        sys.exit(f"{source}, line {number}: no field called {' or '.join(names)}; it has: {', '.join(row)}")
    return row[found]


def to_pairs(rows, source):
    """[(instruction, response)]. GSM8K's "#### 18" becomes "The answer is: 18" and its <<calculator>> notes go, as in MetaMathQA."""
    pairs = []
    for number, row in enumerate(rows, 1):
        instruction = field(row, ("question", "query", "instruction", "problem"), source, number)
        response = field(row, ("answer", "response", "output", "solution"), source, number)
        if not isinstance(response, str):
            sys.exit(f"{source}, line {number}: its answer is not a text but {type(response).__name__}")
        response = re.sub(r"<<[^<>]*>>", "", response)
        pairs.append((instruction + (f"\n{row['input']}" if row.get("input") else ""), re.sub(r"\n#### *(.+)\s*$", r"\nThe answer is: \1", response)))
    return pairs


def prompt_of(instruction, maths):
    """The Alpaca prompt; for maths with CorDA's addition. Training uses the prompt that scoring uses: a small model needs that."""
    return ALPACA.format(instruction) + " Let's think step by step." * maths


def encode(tokenizer, pair, max_length):
    """{"ids", "labels"} of one example: the prompt, which bears no loss (-100), then response and end of sequence, which do."""
    text = prompt_of(pair[0], "The answer is:" in pair[1])
    prompt = tokenizer(text)["input_ids"]
    # Tokenised as one text, since a tokenizer may treat the start of a text apart; a space begins a new token in all of them.
    ids = tokenizer(text + " " + pair[1])["input_ids"]
    ids = ids + [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
    return {"ids": ids[:max_length], "labels": ([-100] * len(prompt) + ids[len(prompt):])[:max_length]}


def encode_all(tokenizer, pairs, max_length):
    """Encoded examples; those whose prompt alone fills max_length are dropped: they would bear no loss."""
    examples = [encode(tokenizer, pair, max_length) for pair in pairs]
    kept = [example for example in examples if len(set(example["labels"])) > 1 or example["labels"][-1] != -100]
    if not kept:
        sys.exit(f"no example has a response within --max-length {max_length}: raise it")
    return kept


def collate(examples, device):
    """Right-padded {"input_ids", "attention_mask", "labels"} (batch, length) of encoded examples, or of plain id lists (no labels)."""
    examples = [e if isinstance(e, dict) else {"ids": list(e), "labels": list(e)} for e in examples]
    width = max(len(e["ids"]) for e in examples)
    pad = lambda key, value: torch.tensor([e[key] + [value] * (width - len(e[key])) for e in examples], device=device)
    lengths = torch.tensor([[len(e["ids"])] for e in examples], device=device)
    return {"input_ids": pad("ids", 0), "attention_mask": (torch.arange(width, device=device) < lengths).long(), "labels": pad("labels", -100)}


def by_length(examples, batch_size, length=len):
    """Batches of similar length, the longest first (so that a lack of memory shows at once): little is spent on padding."""
    ordered = sorted(examples, key=length, reverse=True)
    return [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]


def share(items):
    """This process's share of them."""
    process, world = folora.processes()
    return items[process::world]


def mean(total, count):
    """total / count, both summed over the processes."""
    if folora.processes()[1] > 1:
        both = torch.tensor([total, count], dtype=torch.float64)
        torch.distributed.all_reduce(both)
        total, count = both.tolist()
    return total / count


def label_states(model, batch):
    """(hidden states (labels, width), labels) at the positions that predict a label: the output layer runs there, and nowhere else."""
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    targets = batch["labels"][:, 1:]                                                    # position t predicts token t + 1
    chosen = targets != -100
    return hidden[:, :-1][chosen], targets[chosen]


def logits_of(model, states):
    """Logits (labels, vocabulary) in float32."""
    return model.get_output_embeddings()(states).float()


def pieces(model, *tensors):
    """The tensors' rows in pieces of which each has LOGITS logits: with 150,000 tokens in the vocabulary, logits are most of the memory."""
    return list(zip(*(t.split(max(1, LOGITS // model.get_output_embeddings().weight.shape[0])) for t in tensors)))


def summed_nll(model, batch):
    """Sum over the batch's labels of their NLL in nat. Of several pieces the logits are not kept for the backward pass but computed again."""
    parts = pieces(model, *label_states(model, batch))
    nll = lambda states, labels: F.cross_entropy(logits_of(model, states), labels, reduction="sum")
    return nll(*parts[0]) if len(parts) == 1 else sum(checkpoint(nll, *part, use_reentrant=False) for part in parts)


# ---- metrics --------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def mean_nll(model, examples, batch_size=8):
    """Nat per response token over encoded examples."""
    total = count = 0
    for batch in tqdm(by_length(share(examples), batch_size, lambda e: len(e["ids"])), desc="nll", leave=False):
        batch = collate(batch, model.device)
        total, count = total + summed_nll(model, batch).item(), count + (batch["labels"][:, 1:] != -100).sum().item()
    return mean(total, count)


def summed_kl(log_p, model, states):
    """Σ over positions of KL(p || the model's distribution), in nat; log_p (positions, vocabulary)."""
    return F.kl_div(logits_of(model, states).log_softmax(-1), log_p, log_target=True, reduction="sum").item()


@torch.inference_mode()
def drift(model, reference, texts, batch_size=4):
    """KL(reference || model), the mean over all next-token positions of `texts` (1-D LongTensors), in nat."""
    total = count = 0
    for batch in tqdm(by_length([t.tolist() for t in share(texts)], batch_size), desc="drift", leave=False):
        batch = collate(batch, model.device)
        (theirs, _), (ours, _) = (label_states(m, batch) for m in (reference, model))
        total += sum(summed_kl(logits_of(reference, p).log_softmax(-1), model, q) for p, q in pieces(model, theirs, ours))
        count += len(ours)
    return mean(total, count)


def held_out(model, tokenizer, max_new_tokens, samples=HELD_OUT_SAMPLES, seed=HELD_OUT_SEED):
    """Self-generated text that calibration never sees: its seed is not one of theirs."""
    bar = tqdm(total=samples, desc="held-out text", leave=False)
    return folora.sample_calibration(model, tokenizer, samples, min(128, max_new_tokens), max_new_tokens, seed=seed, progress=bar.update)


@torch.inference_mode()
def greedy(model, tokenizer, prompts, max_new_tokens, stops=(), batch_size=32, desc="generate"):
    """Greedy continuations (token lists) of the prompts, in their order."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stopping = {"stop_strings": list(stops), "tokenizer": tokenizer} if stops else {}
    out = [None] * len(prompts)
    for batch in tqdm(by_length(range(len(prompts)), batch_size, lambda i: len(encoded[i])), desc=desc, leave=False):
        width = len(encoded[batch[0]])
        ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch], device=model.device)
        rows = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                              repetition_penalty=1.0, pad_token_id=pad, **stopping)
        for i, row in zip(batch, rows[:, width:].tolist()):
            out[i] = row
    return out


def answers_of(row, source, number):
    """Accepted answers: NQ-Open's list, WebQuestions' list, or TriviaQA's aliases."""
    answers = field(row, ("answers", "answer"), source, number)
    answers = answers["aliases"] if isinstance(answers, dict) else answers
    return [answers] if isinstance(answers, str) else answers


def normalise(text, articles):
    """lm-eval's exact_match: articles out (nq_open only, and before lower-casing), lower case, no punctuation."""
    text = re.sub(r"\b(?:The |the |An |A |The |a |an )", "", text) if articles else text
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def until(text, stops):
    """The text before the first stop, without surrounding white space."""
    return text[:min([text.find(s) for s in stops if s in text], default=len(text))].strip()


def exact_match(text, answers, articles=True):
    return any(normalise(text, articles) == normalise(answer, articles) for answer in answers)


def shortest_prefixes(answers):
    """webqs: an answer that begins with another accepted one adds nothing, and goes."""
    kept = []
    for answer in sorted(answers):
        if not kept or not answer.startswith(kept[-1]):
            kept.append(answer)
    return kept


def final_number(text):
    """The number after the last "The answer is:", or None."""
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text.rpartition("The answer is:")[2]) if "The answer is:" in text else None
    return float(found.group().replace(",", "")) if found else None


def boxed(solution):
    """The contents of MATH's last \\boxed{...}."""
    start, depth = solution.rfind("\\boxed{") + len("\\boxed{"), 1
    for end in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start:end]
    return solution[start:]


# ---- tasks: each returns one score per row --------------------------------------------------------------------------

def score_questions(model, tokenizer, rows, source, task):
    """nq_open, triviaqa, and tiny's facts and skills. 64 tokens, where lm-eval allows 256: no accepted answer is longer."""
    trivia, stops = task == "triviaqa", ("\n", ".", ",")
    form = "Question: {}?\nAnswer:" if trivia else "Answer these questions:\n\nQ: {}?\nA:"
    answers = [answers_of(row, source, n) for n, row in enumerate(rows, 1)]
    prompts = [form.format(field(row, ("question",), source, n)) for n, row in enumerate(rows, 1)]
    texts = [tokenizer.decode(t, skip_special_tokens=True) for t in greedy(model, tokenizer, prompts, 64, stops, desc=task)]
    return [float(exact_match(until(text, stops), a, articles=not trivia)) for text, a in zip(texts, answers)]


def score_webqs(model, tokenizer, rows, source, task):
    """An answer's every token is the likeliest one if and only if greedy decoding, let run, begins with these tokens."""
    prompts = [f"Question: {field(row, ('question',), source, n)}\nAnswer:" for n, row in enumerate(rows, 1)]
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    choices = [[tokenizer(f"{p} {a}")["input_ids"][n:] for a in shortest_prefixes(answers_of(row, source, i))]
               for i, (p, n, row) in enumerate(zip(prompts, lengths, rows), 1)]
    longest = max((len(c) for options in choices for c in options), default=1)
    texts = greedy(model, tokenizer, prompts, longest, desc=task)
    return [float(any(text[:len(c)] == c for c in options)) for text, options in zip(texts, choices)]


def score_math(model, tokenizer, rows, source, task):
    """gsm8k and math: at most 512 new tokens, and half of a small model's context."""
    pairs, max_new_tokens = to_pairs(rows, source), min(512, model.config.max_position_embeddings // 2)
    prompts = [prompt_of(question, True) for question, _ in pairs]
    texts = [tokenizer.decode(t, skip_special_tokens=True) for t in
             greedy(model, tokenizer, prompts, max_new_tokens, ("### Instruction", "Question:"), desc=task)]
    if task == "gsm8k":
        return [float(final_number(text) is not None and final_number(text) == final_number(answer)) for text, (_, answer) in zip(texts, pairs)]
    from lm_eval.tasks.hendrycks_math.utils import is_equiv
    found = [until(text.rpartition("The answer is:")[2], ("\n", "### Instruction", "Question:")).rstrip(".") if "The answer is:" in text else "" for text in texts]
    return [float(bool(answer) and is_equiv(answer, boxed(solution))) for answer, (_, solution) in zip(found, pairs)]


SCORERS = {"gsm8k": score_math, "math": score_math, "webqs": score_webqs}          # the rest: score_questions


def load_tasks(names, limit=None):
    """{task: (rows, source)} of "gsm8k,nq_open=dev.jsonl,drift", all read now: a missing file should not show after an hour."""
    paths = dict(item.partition("=")[::2] for item in filter(None, names.split(",")))
    for name in paths:
        if name not in TASKS:
            sys.exit(f"unknown task {name}: there are {', '.join(TASKS)}")
    if "math" in paths:
        try:
            import lm_eval.tasks.hendrycks_math.utils                     # noqa: F401
        except ImportError:
            sys.exit("the task math uses lm-eval's test of equivalence: pip install lm-eval==0.4.13")
    tasks = {}
    for name, path in paths.items():
        _, source, config, split = TASKS[name]
        source = path or source
        tasks[name] = (read_rows(source, config, split, limit) if source else None, source)
    for number, (_, answer) in enumerate(to_pairs(*tasks["gsm8k"]) if "gsm8k" in tasks else (), 1):
        if final_number(answer) is None:
            sys.exit(f"{tasks['gsm8k'][1]}, line {number}: its answer has no number after #### or \"The answer is:\"")
    return tasks


def evaluate(model, tokenizer, tasks, reference=None, texts=None):
    """{task: score}: per cent, or nat per token for nll and drift. `reference` is the untouched model, `texts` its held-out text."""
    scores = {}
    for name, (rows, source) in tasks.items():
        if name == "nll":
            scores[name] = mean_nll(model, encode_all(tokenizer, to_pairs(rows, source), 1024))
        elif name == "drift":
            scores[name] = drift(model, reference, texts) if reference is not None else 0.0
        else:
            each = SCORERS.get(name, score_questions)(model, tokenizer, share(rows), source, name)
            scores[name] = 100 * mean(sum(each), len(each))
    return scores


# lm-eval's name of the score to report, where a task has several: the first of these that it has, else its first
HARNESS_SCORES = ("HasAns_exact", "prompt_level_strict_acc", "pass@1", "pass_at_1", "exact_match", "em", "acc")
HARNESS_TARGETS = ("humaneval", "mbpp", "gsm8k", "hendrycks_math", "minerva_math")         # by prefix; the rest is preservation


def harness(model, tokenizer, names, limit=None):
    """{task: per cent} by lm-eval, each with the examples, prompt and stops of its own configuration: no global few-shot count.

    names           by commas; FOLDER/NAME is a task of one's own, whose YAML file lies in FOLDER
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        sys.exit("--harness runs lm-eval: pip install lm-eval==0.4.13")
    paths = [name.rpartition("/") for name in names.split(",")]
    manager = TaskManager(include_path=[folder for folder, _, _ in paths if folder] or None)
    unknown = [name for _, _, name in paths if name not in manager.all_tasks]
    if unknown:
        sys.exit(f"lm-eval has no task {', '.join(unknown)}: lm-eval ls tasks lists them; FOLDER/NAME is one of your own")
    # Tasks that run generated code (humaneval, mbpp) ask for HF_ALLOW_CODE_EVAL=1, and say so.
    done = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size="auto" if model.device.type == "cuda" else 8), tasks=[name for _, _, name in paths],
                           limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False,
                           confirm_run_unsafe_code=os.environ.get("HF_ALLOW_CODE_EVAL") == "1")["results"]
    return {name: harness_score(done[name]) for _, _, name in paths}


def harness_score(result):
    """One number of lm-eval's result of a task, {"acc,none": 0.3, "acc_stderr,none": ...}: per cent."""
    scores = {key.partition(",")[0]: value for key, value in reversed(result.items()) if isinstance(value, float) and "_stderr" not in key}
    name = next((name for name in HARNESS_SCORES if name in scores), None) or list(scores)[-1]
    return scores[name] * (1 if name.startswith("HasAns") else 100)                       # SQuAD's come in per cent


def role(row):
    """target, preserve, measure, or "" for a summary row."""
    if row in SUMMARY:
        return ""
    return TASKS[row][0] if row in TASKS else "target" if row.startswith(HARNESS_TARGETS) else "preserve"


def summarise(scores, first=None):
    """Avg1, Avg2 and GM of one column; Avg1(%) too, if `first`, the untouched model's column, has something to lose."""
    of = lambda wanted, s: [s[t] for t in s if role(t) == wanted]
    keep, target = of("preserve", scores), of("target", scores)
    rows = {}
    if keep:
        rows["Avg1"] = sum(keep) / len(keep)
        base = of("preserve", first or {})
        if sum(base):
            rows["Avg1(%)"] = 100 * rows["Avg1"] / (sum(base) / len(base))
    if target:
        rows["Avg2"] = sum(target) / len(target)
    if keep and target:
        rows["GM"] = math.sqrt(rows["Avg1"] * rows["Avg2"])
    return rows


def table(columns):
    """{column: scores} as aligned text, the summary rows below a line."""
    first = next(iter(columns.values())) if len(columns) > 1 else None               # a lone column has nothing to be compared with
    full = {name: {**scores, **summarise(scores, first)} for name, scores in columns.items()}
    names = list(full)
    units = {"target": "target, %", "preserve": "preserved, %", "measure": "nat/token", "": ""}
    width = max(12, *(len(n) + 2 for n in names))
    label = max(10, *(len(row) + 2 for scores in full.values() for row in scores))
    lines = [f"{'':{label}}{'':14}" + "".join(f"{n:>{width}}" for n in names)]
    for row in dict.fromkeys(r for scores in full.values() for r in scores):
        unit = units[role(row)]
        digits = 4 if unit == "nat/token" else 2
        if row == "Avg1":
            lines.append("-" * len(lines[0]))
        lines.append(f"{row:{label}}{unit:14}" + "".join(f"{full[n][row]:{width}.{digits}f}" if row in full[n] else " " * width for n in names))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="run directories, checkpoint directories or hub ids")
    parser.add_argument("--tasks", help="by commas, NAME or NAME=FILE.jsonl (default: on tiny gsm8k=tiny/test.jsonl,facts,sort,reverse,sums,drift; "
                        "else gsm8k,nq_open,webqs,triviaqa,drift)")
    parser.add_argument("--harness", metavar="NAMES", help="lm-eval's tasks, by commas, in the same table: truthfulqa_mc2,mmlu,ifeval,squadv2,humaneval...")
    parser.add_argument("--report", action="store_true", help="no model: the tables and figures of the measurements in assets/")
    parser.add_argument("--limit", type=int, help="the first N rows of each task (default: all)")
    parser.add_argument("--reference", help="the untouched model for drift (default: the one that this or another run directory names, else the first MODEL)")
    parser.add_argument("--max-new-tokens", type=int, help="length of the held-out text for drift (default: as the first run directory had it, else 256)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], help="default: as the first run directory had it, else auto: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="auto", help="default: cuda if there is one, else cpu")
    options = parser.parse_args()
    if options.report:
        from assets import experiments
        return experiments.report()
    if not options.models:
        parser.error("which MODEL? (or --report)")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, not {options.limit}")
    if options.tasks == "" and not options.harness:
        parser.error("nothing to score: --tasks is empty, and no --harness is given")
    if options.harness and importlib.util.find_spec("lm_eval") is None:
        sys.exit("--harness runs lm-eval: pip install lm-eval==0.4.13")
    for name in options.models:
        resolve_model(name)                                # a name that is wrong should not show after the first model's hour
    runs = [run_options(name) for name in options.models]
    first, bases = next(filter(None, runs), {}), [run.get("model") for run in runs]      # a run: in its dtype, on its held-out text
    device, dtype = pick_device(options.device, options.dtype or first.get("dtype", "auto"))
    length = options.max_new_tokens or min(256, first.get("calibration_max_tokens", 256))
    tasks = load_tasks(options.tasks if options.tasks is not None else default_tasks(bases[0] or options.models[0]), options.limit)
    columns, reference, texts, loaded = {}, None, None, None
    for name, base in zip(options.models, bases):
        model, tokenizer = load_model(name, device, dtype)
        source = options.reference or base or next(filter(None, bases), options.models[0])
        if "drift" in tasks and source != loaded:
            reference, _ = load_model(source, device, dtype)
            texts, loaded = held_out(reference, tokenizer, length), source
        columns[name.rstrip("/")] = evaluate(model, tokenizer, tasks, reference, texts)
        if options.harness:
            columns[name.rstrip("/")].update(harness(model, tokenizer, options.harness, options.limit))
    print(table(columns))


def default_tasks(model):
    """What is scored if --tasks says nothing."""
    return f"gsm8k={TINY / 'test.jsonl'},facts,sort,reverse,sums,drift" if is_tiny(model) else "gsm8k,nq_open,webqs,triviaqa,drift"


if __name__ == "__main__":
    main()
