"""Score models on what they were trained for and on what they knew before.

    python eval.py tiny runs/mine --tasks gsm8k=tiny/test.jsonl,facts,sums,drift
    python eval.py Qwen2.5-1.5B runs/mine --tasks gsm8k,nq_open,webqs,triviaqa,drift --limit 500

This prints a table with one column per model and one row per task. A model is a run directory of
train_math.py, a PEFT adapter's directory, a checkpoint directory, a hub id, or a short name
(Qwen2.5-1.5B). The data of a task comes from the hub, or from a file as in nq_open=dev.jsonl.
Without --tasks they are those of the second line; for tiny, gsm8k and all its skills, and drift.

    gsm8k               target: the model answers greedily, and the number after "The answer is:"
                        is compared, as in CorDA
    nll                 the loss per token of GSM8K's reference solutions, in nat
    nq_open, triviaqa   preservation: exact match, by the prompts and rules of lm-eval 0.4.13
    webqs               preservation: 1 if an accepted answer is the greedy continuation, as lm-eval
    facts, sort, reverse, sums   preservation: what tiny/ was pretrained on, asked as in nq_open
    prose               the loss per token of texts of your own, in nat: prose=FILE.jsonl
    drift               KL(untouched || this model) per token, in nat, on held-out text that the
                        untouched model wrote; untouched is the base of the first run or adapter,
                        or else the first model

The rows below are Avg1, the mean preservation score; Avg1(%), relative to the first column; Avg2,
the mean target score; GM, the root of Avg1 times Avg2. train_math.py shares what this file holds.
"""
import json
import os
import re
import string
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import pandas
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import folora

TINY = Path(__file__).resolve().parent / "tiny"
OWNERS = {"Qwen": "Qwen/", "Llama": "meta-llama/", "SmolLM": "HuggingFaceTB/"}     # of short names
DTYPES = ("float32", "bfloat16", "float16")
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n### Response:")
MATHS = ALPACA + " Let's think step by step."        # CorDA's prompt for maths
NQ_OPEN = "Answer these questions:\n\nQ: {}?\nA:"
# Each task has a role, a prompt, and data: a hub id with configuration and split, or a file.
TASKS = {
    "gsm8k": ("target", MATHS, "openai/gsm8k", "main", "test"),
    "nq_open": ("preserve", NQ_OPEN, "google-research-datasets/nq_open", None, "validation"),
    "triviaqa": ("preserve", "Question: {}?\nAnswer:",
                 "mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "webqs": ("preserve", "Question: {}\nAnswer:", "stanfordnlp/web_questions", None, "test"),
    "nll": ("measure", None, "openai/gsm8k", "main", "test"),
    "prose": ("measure", None, "prose.jsonl"), "drift": ("measure", None, None)}
for skill in ("facts", "sort", "reverse", "sums"):
    TASKS[skill] = ("preserve", NQ_OPEN, str(TINY / f"{skill}.jsonl"))
UNITS = {"target": "target, %", "preserve": "preserved, %", "measure": "nat/token", "": ""}
HELD_OUT_SEED = 1000
# Of the scores that lm-eval gives a task, the first in this list is shown, else the task's first.
HARNESS_SCORES = ("HasAns_exact", "prompt_level_strict_acc", "exact_match", "em", "acc")
# lm-eval's tasks that begin so count as target tasks, all others as preservation.
HARNESS_TARGETS = ("humaneval", "mbpp", "gsm8k", "hendrycks_math", "minerva_math")


# ---- errors --------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend. The first line of its text says what to do."""


# These end a script in one line; ValueError and RuntimeError do so only if folora.py raises them.
MENDABLE = (UserError, OSError, MemoryError, FloatingPointError, KeyboardInterrupt)


def need(condition, message):
    if not condition:
        raise UserError(message)


@contextmanager
def blame(what):
    """Turn any error of a library inside, of which the hub alone has a dozen types, into a
    UserError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {str(error).strip()}") from error


def one_line(main):
    """Let main end in one line on stderr: in exit status 2 if the user can mend the error, which
    includes what folora.py raises and a lack of memory, and in 1 if a run has failed
    (FloatingPointError). Other errors keep their traceback."""
    def guarded(arguments=None):
        try:
            return main(arguments)
        except (*MENDABLE, ValueError, RuntimeError) as error:
            source = traceback.extract_tb(error.__traceback__)[-1].filename
            memory = re.search("allocate memory|out of memory", str(error))   # on a CPU, on a GPU
            if not memory and source != folora.__file__ and not isinstance(error, MENDABLE):
                raise
            message = str(error).strip() or type(error).__name__
            if memory or isinstance(error, MemoryError):
                message = ("out of memory: take a smaller model, or, in training, a lower "
                           "--micro-batch-size, --max-length or --rank")
            status = 1 if isinstance(error, FloatingPointError) else 2
        tqdm.write(message.splitlines()[0], sys.stderr)              # main's bars are closed by now
        sys.exit(status)
    return guarded


def reach_hub():
    """Ask whether the hub can be reached. If not, its clients would repeat every request for half a
    minute; in offline mode they use what has been downloaded before, or fail at once."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


# ---- models --------------------------------------------------------------------------------------

def is_tiny(name):
    return name == "tiny" or Path(name).resolve() == TINY


def find_model(name):
    """(weights, adapter, run) of a MODEL: the directory or hub id of its weights, the directory of
    its PEFT adapter or None, and the options of the run that made it. Of these a plain adapter
    has its base alone, {"model": base}, and a checkpoint has none, {}."""
    path, run = TINY if name == "tiny" else Path(name), {}
    if (path / "summary.json").exists():             # a finished run
        run = json.loads((path / "config.json").read_text())["options"]
        path /= "merged" if (path / "merged").exists() else "adapter"
    if (path / "adapter_config.json").exists():
        config = json.loads((path / "adapter_config.json").read_text())
        run = run or {"model": config.get("base_model_name_or_path")}
        need(run["model"], f"{path}/adapter_config.json has no base_model_name_or_path: add it")
        return find_model(run["model"])[0], path, run
    if (path / "tokenizer_config.json").exists():
        return str(path), None, run
    need(not path.exists(), f"{name}: neither a checkpoint, nor a PEFT adapter, nor a finished run")
    owner = "" if "/" in name else OWNERS.get(re.match("[A-Za-z]*", name)[0], "")
    need(re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", owner + name),
         f"{name}: no such directory, and no short name (Qwen2.5-1.5B) or hub id (owner/name)")
    return owner + re.sub("^Llama-2-7b$", "Llama-2-7b-hf", name), None, {}


def pick_device(device, dtype):
    """torch's device, and a dtype's name; auto: bfloat16 on a GPU if any, else float32 on a CPU."""
    with blame(f"--device {device}: it is cpu, cuda or cuda:1"):
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.empty(0, device=device.replace("auto", best)).device   # fails without it
    return device, dtype.replace("auto", "float32" if device.type == "cpu" else "bfloat16")


@torch.no_grad()
def add_adapter(model, folder):
    """Add a PEFT adapter's scaling * B A to the weights: in float32, and rounded once."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors", str(model.device))
    changed = re.match("pissa|olora|corda|loftq|lora_ga", str(config.get("init_lora_weights")))
    need(not changed and not config.get("alpha_pattern"), "not plain LoRA: merge it with PEFT")
    for key in [key for key in weights if key.endswith(".lora_A.weight")]:
        A, B = (weights.pop(key.replace("lora_A", side)).float() for side in ("lora_A", "lora_B"))
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = config["lora_alpha"] / len(A) ** (0.5 if config.get("use_rslora") else 1) * B @ A
        weight = model.get_submodule(name).weight
        weight.copy_(weight + (update.T if config.get("fan_in_fan_out") else update))
    need(not weights, f"not plain LoRA: {next(iter(weights), '')} (merge it with PEFT)")


def load_model(name, device, dtype):
    """(model, tokenizer), ready for inference, an adapter merged."""
    where, adapter, run = find_model(name)
    with blame(f"cannot load the model {name}"):
        if adapter:
            model, tokenizer = load_model(run["model"], device, dtype)
            add_adapter(model, adapter)
            return model, tokenizer
        if not Path(where).exists():
            reach_hub()
        tokenizer = AutoTokenizer.from_pretrained(where)
        model, info = AutoModelForCausalLM.from_pretrained(where, dtype=dtype,
                                                           output_loading_info=True)
        wrong = [*info["missing_keys"], *info["unexpected_keys"]]
        need(not wrong, f"missing or unexpected weights: {wrong}")
    return model.to(device).eval(), tokenizer


def positions(model):
    """The greatest number of tokens in a text that the model was made for."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


# ---- data ----------------------------------------------------------------------------------------

def read_rows(source, config=None, split="train", limit=None):
    """The rows (dicts) of a .jsonl file or of a hub data set. The lines of a file are those of its
    bytes, because a text may hold U+2028 and other line separators."""
    with blame(f"{source}: no such file or hub data set can be read"):
        if not source.endswith((".jsonl", ".json")):
            reach_hub()
            return list(datasets.load_dataset(source, config, split=split))[:limit]
        lines = Path(source).read_bytes().strip().splitlines()
    need(lines, f"{source}: no rows")
    rows = []
    for number, line in enumerate(lines, 1):
        with blame(f"{source}, line {number}: not JSON with fields, {{...}}, in UTF-8"):
            rows.append(dict(json.loads(line)))
    return rows[:limit]


def texts_in(row, names, source, number):
    """The texts in the first of the fields "a or b" that is not empty: one text, a list of texts,
    or TriviaQA's {"aliases": list}."""
    value = next((row[name] for name in names.split(" or ") if row.get(name)), None)
    value = value.get("aliases") if isinstance(value, dict) else value
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str) and text.strip()]
    need(texts, f"{source}, line {number}: no field called {names} with a text in it: {[*row]}")
    return texts


def given_texts(source, limit):
    """The texts of a .jsonl file or of a hub data set."""
    rows = enumerate(read_rows(source, limit=limit), 1)
    return [texts_in(row, "text or question", source, number)[0] for number, row in rows]


def to_pairs(rows, source):
    """[(instruction, accepted responses)]. GSM8K's "#### 18" becomes "The answer is: 18", as in
    MetaMathQA, and its <<calculator>> notes are removed."""
    pairs = []
    for number, row in enumerate(rows, 1):
        asked = texts_in(row, "question or query or instruction or problem", source, number)[0]
        asked += f"\n{row['input']}" if row.get("input") else ""
        names = "answers or answer or response or output or solution"
        texts = texts_in(row, names, source, number)
        texts = [re.sub(r"<<[^<>]*>>", "", text) for text in texts]
        texts = [re.sub(r"\n#### *(.+)\s*$", r"\nThe answer is: \1", text) for text in texts]
        pairs.append((asked, texts))
    return pairs


def default_tasks(model):
    """What is scored if --tasks says nothing."""
    tiny = f"gsm8k={TINY / 'test.jsonl'},facts,sort,reverse,sums,drift"
    return tiny if is_tiny(model) else "gsm8k,nq_open,webqs,triviaqa,drift"


def load_tasks(names, limit=None):
    """{task: pairs} of "gsm8k,nq_open=dev.jsonl,drift". prose has texts instead, and drift nothing.
    All data is read and checked now, so that a mistake in it does not show after an hour."""
    tasks = {}
    for item in filter(None, names.split(",")):
        name, _, path = item.partition("=")
        need(name in TASKS, f"unknown task {name}: there are {', '.join(TASKS)}")
        source = path or TASKS[name][2]
        if name == "prose":
            tasks[name] = given_texts(source, limit)
        else:
            rows = read_rows(source, *TASKS[name][3:], limit=limit) if source else []
            tasks[name] = to_pairs(rows, source)
        for number, (_, answers) in enumerate(tasks[name] if name == "gsm8k" else (), 1):
            need(final_number(answers[0]) is not None,
                 f"{source}, line {number}: its answer has no number after #### or The answer is:")
    return tasks


def encode_all(tokenizer, pairs, max_length):
    """[{"ids", "labels"}] of the pairs' first responses, in the prompt that is also scored with.
    The prompt has labels of -100, which bear no loss; the response and the end of sequence do.
    An example whose prompt alone fills max_length is left out; more than half is an error."""
    examples = []
    for instruction, (response, *_) in pairs:
        prompt = (MATHS if "The answer is:" in response else ALPACA).format(instruction)
        # Both are tokenised with the same start of text. The space begins a new token.
        start, ids = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {response}"))
        ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
        if len(start) < max_length:
            labels = [-100] * len(start) + ids[len(start):max_length]
            examples.append({"ids": ids[:max_length], "labels": labels})
    dropped = f"{len(pairs) - len(examples)} of {len(pairs)} examples have prompts that fill"
    need(2 * len(examples) >= len(pairs), f"{dropped} {max_length} tokens (raise --max-length)")
    if len(examples) < len(pairs):
        tqdm.write(f"{dropped} {max_length} tokens: they are left out", sys.stderr)
    return examples


def collate(examples, device, side="right"):
    """A padded batch of encoded examples, or of token sequences, which are their own labels."""
    examples = [e if isinstance(e, dict) else {"ids": e, "labels": e} for e in examples]
    ids, labels = ([torch.as_tensor(e[key]) for e in examples] for key in ("ids", "labels"))
    pad = lambda rows, fill: torch.nn.utils.rnn.pad_sequence(rows, True, fill, side).to(device)
    return {"input_ids": pad(ids, 0), "attention_mask": pad([torch.ones_like(i) for i in ids], 0),
            "labels": pad(labels, -100)}


def by_length(examples, batch_size, length=len):
    """Batches of similar length, the longest first, so that a lack of memory shows at once."""
    ordered = sorted(examples, key=length, reverse=True)
    return [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]


# ---- loss and drift ------------------------------------------------------------------------------

def logits_of(model, batch):
    """(logits, labels) at the n positions that predict a label: (n, vocabulary), float32, and (n,).
    Position t predicts token t + 1. The output layer runs only where some row has a label."""
    labels = batch["labels"][:, 1:]
    kept = (labels != -100).any(0).nonzero()[:, 0]
    labels = labels[:, kept]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    return logits[labels != -100].float(), labels[labels != -100]


def summed_nll(model, batch):
    """The sum of the losses at the batch's labels, in nat."""
    return F.cross_entropy(*logits_of(model, batch), reduction="sum")


@torch.inference_mode()
def mean_nll(model, examples, batch_size=8):
    """The mean loss per response token of encoded examples, in nat."""
    batches = by_length(examples, batch_size, lambda e: len(e["ids"]))
    labels = sum(label != -100 for e in examples for label in e["labels"][1:])
    need(labels, "no token to score: every text has one token alone")
    return sum(summed_nll(model, collate(batch, model.device)).item()
               for batch in tqdm(batches, desc="nll", leave=False)) / labels


def summed_kl(log_p, logits):
    """The sum over positions of KL(p || softmax(logits)), in nat; both are (n, vocabulary)."""
    return F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="sum")


@torch.inference_mode()
def drift(model, reference, texts, batch_size=4):
    """The mean of KL(reference || model) over all next-token positions of the texts, in nat."""
    total = 0.0
    for some in by_length(texts, batch_size):
        batch = collate(some, model.device)
        log_p = logits_of(reference, batch)[0].log_softmax(-1)
        total += summed_kl(log_p, logits_of(model, batch)[0]).item()
    return total / sum(len(text) - 1 for text in texts)


def held_out(model, tokenizer, max_new_tokens, samples=16, seed=HELD_OUT_SEED):
    """Text that the model writes and that calibration never sees, because its seed differs."""
    return folora.sample_calibration(model, tokenizer, samples, min(128, max_new_tokens),
                                     max_new_tokens, seed=seed)


# ---- answers -------------------------------------------------------------------------------------

@torch.inference_mode()
def greedy(model, tokenizer, prompts, max_new_tokens, stops=None, desc=None):
    """The greedy continuation (a token list) of each prompt. generate takes every option that a
    call leaves open, such as beams or a repetition penalty, from the checkpoint's
    generation_config. folora.plain_mode sets it aside; only its end-of-sequence tokens are used."""
    written, ends = [], model.generation_config.eos_token_id
    for i in tqdm(range(0, len(prompts), 32), desc, leave=False):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[i:i + 32]]
        batch = collate(ids, model.device, "left")
        width = batch.pop("labels").shape[1]
        with folora.plain_mode(model):
            rows = model.generate(
                **batch, tokenizer=tokenizer, do_sample=False, max_new_tokens=max_new_tokens,
                stop_strings=stops, eos_token_id=ends, pad_token_id=tokenizer.eos_token_id)
        written += rows[:, width:].tolist()
    return written


def exact_match(text, answers, articles=True):
    """lm-eval's exact_match. nq_open removes articles, before the text is put in lower case."""
    def normal(text):
        text = re.sub(r"\b(?:The |the |An |A |The |a |an )", "", text) if articles else text
        return text.lower().translate(str.maketrans("", "", string.punctuation))
    return normal(text) in map(normal, answers)


def shortest_prefixes(answers):
    """webqs drops an answer that begins with another accepted one."""
    return [answer for answer in sorted(set(answers))
            if not any(answer.startswith(other) for other in answers if other != answer)]


def begins_with(tokenizer, prompt, written, answers):
    """Whether the greedy continuation begins with the tokens of an accepted answer, that is whether
    each of these is the likeliest one given those before it."""
    start = len(tokenizer(prompt)["input_ids"])
    choices = [tokenizer(f"{prompt} {a}")["input_ids"][start:] for a in shortest_prefixes(answers)]
    return any(written[:len(tokens)] == tokens for tokens in choices)


def final_number(text):
    """The number after the last "The answer is:", or None."""
    _, marker, stated = text.rpartition("The answer is:")
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", stated if marker else "")
    return float(found.group().replace(",", "")) if found else None


def count_right(model, tokenizer, pairs, task):
    """How many of a task's (question, accepted answers) are answered right. gsm8k may take 512 new
    tokens, or half of a small model's context. No other answer has more than 64."""
    prompts = [TASKS[task][1].format(question) for question, _ in pairs]
    longest = min(512, positions(model) // 2) if task == "gsm8k" else 64
    stops = {"gsm8k": ["### Instruction", "Question:"], "webqs": ["\n"]}.get(task, ["\n", ".", ","])
    written, right = greedy(model, tokenizer, prompts, longest, stops, task), 0
    for prompt, tokens, (_, wanted) in zip(prompts, written, pairs):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if task == "gsm8k":
            right += final_number(text) == final_number(wanted[0])
        elif task == "webqs":
            right += begins_with(tokenizer, prompt, tokens, wanted)
        else:
            text = re.split(r"[\n.,]", text)[0].strip()
            right += exact_match(text, wanted, articles=task != "triviaqa")
    return right


def evaluate(model, tokenizer, tasks, reference=None, texts=None):
    """{task: score}, in per cent, or in nat for nll and drift. `reference` is the untouched model
    and `texts` its held-out text. Without them the model itself is the untouched one."""
    scores, longest = {}, min(1024, positions(model))
    for name, pairs in tasks.items():
        if name == "nll":
            scores[name] = mean_nll(model, encode_all(tokenizer, pairs, longest))
        elif name == "prose":
            ids = [tokenizer(text)["input_ids"][:longest] for text in pairs]
            scores[name] = mean_nll(model, [{"ids": text, "labels": text} for text in ids])
        elif name == "drift":
            scores[name] = drift(model, reference, texts) if reference is not None else 0.0
        else:
            scores[name] = 100 * count_right(model, tokenizer, pairs, name) / len(pairs)
    return scores


# ---- lm-eval -------------------------------------------------------------------------------------

def harness_tasks(names, metadata=None):
    """(lm-eval's task manager, task names) of --harness. Each must have a score of its own: tags
    and some groups only stand for several tasks."""
    with blame("--harness needs lm-eval: pip install lm-eval==0.4.13"):
        from lm_eval.tasks import TaskManager
    manager, names = TaskManager(metadata=metadata), names.split(",")
    reach_hub()
    with blame(f"lm-eval cannot load {names} (try lm-eval[ifeval,math] or HF_ALLOW_CODE_EVAL=1)"):
        loaded = manager.load(names)
    scored = {name for name, group in loaded["groups"].items() if group.has_aggregation}
    unscored = set(names) - scored - set(loaded["tasks"])
    need(not unscored, f"lm-eval has no score of its own for {unscored}: name their subtasks")
    return manager, names


def harness(model, tokenizer, manager, names, limit=None):
    """{task: per cent} by lm-eval, with the examples, prompt and stops of its configuration."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    size = "auto" if model.device.type == "cuda" else 8
    allowed = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
    done = simple_evaluate(
        HFLM(model, tokenizer=tokenizer, batch_size=size), tasks=names, task_manager=manager,
        limit=limit, bootstrap_iters=0, log_samples=False, confirm_run_unsafe_code=allowed)
    return {name: harness_score(done["results"][name]) for name in names}


def harness_score(result):
    """One number, in per cent, of lm-eval's {"acc,none": 0.3, "acc_stderr,none": ...} of a task."""
    scores = {key.partition(",")[0]: value for key, value in reversed(result.items())
              if isinstance(value, float) and "_stderr" not in key}     # the first filter's stays
    name = next(name for name in (*HARNESS_SCORES, *reversed(scores)) if name in scores)
    return scores[name] * (1 if name.startswith("HasAns") else 100)      # SQuAD's come in per cent


# ---- the table -----------------------------------------------------------------------------------

def role(row):
    """target, preserve, measure, or "" for a summary row."""
    other = "target" if row.startswith(HARNESS_TARGETS) else "preserve"
    return "" if row in ("Avg1", "Avg1(%)", "Avg2", "GM") else TASKS.get(row, (other,))[0]


def summarise(scores, first=None):
    """The summary rows of one column. Avg1(%) needs `first`, the untouched model's column. A mean
    of nothing is not a finite number, and its rows are left out."""
    average = lambda column, wanted: torch.tensor(
        [score for row, score in column.items() if role(row) == wanted], dtype=torch.float64).mean()
    keep, target = average(scores, "preserve"), average(scores, "target")
    rows = {"Avg1": keep, "Avg1(%)": 100 * keep / average(first or {}, "preserve"), "Avg2": target,
            "GM": (keep * target).sqrt()}
    return {row: value.item() for row, value in rows.items() if value.isfinite()}


def table(columns):
    """{column: scores} as aligned text. A single column has nothing to be compared with."""
    first = next(iter(columns.values())) if len(columns) > 1 else None
    full = {name: scores | summarise(scores, first) for name, scores in columns.items()}
    digits = lambda row: "{:.4f}" if role(row.name) == "measure" else "{:.2f}"
    shown = pandas.DataFrame(full).apply(lambda row: row.map(digits(row).format, "ignore"), axis=1)
    shown.index = [shown.index, [UNITS[role(row)] for row in shown.index]]     # two columns
    return shown.to_string(na_rep="")


@one_line
def main(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, message)              # one line, without the usage
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directory or hub id")
    parser.add_argument("--tasks", help="NAME or NAME=FILE.jsonl, by commas (default: see above)")
    parser.add_argument("--harness", metavar="NAMES", help="lm-eval's, by commas: mmlu,ifeval")
    parser.add_argument("--harness-metadata", type=json.loads,
                        help="JSON, for some of its tasks, such as {\"max_seq_lengths\": \"4k\"}")
    parser.add_argument("--limit", type=int, help="the first so many rows of each task")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], help="default: the run's, else auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:1; auto: cuda if any")
    options = parser.parse_args(arguments)
    need(options.limit is None or options.limit > 0, "--limit must be at least 1")
    need(options.tasks != "" or options.harness, "nothing to score: give --tasks or --harness")
    runs = [find_model(name)[2] for name in options.models]
    run = next(filter(None, runs), {"model": options.models[0]})
    device, dtype = pick_device(options.device, options.dtype or run.get("dtype", "auto"))
    extra = harness_tasks(options.harness, options.harness_metadata) if options.harness else None
    names = default_tasks(run["model"]) if options.tasks is None else options.tasks
    tasks, reference, texts, columns = load_tasks(names, options.limit), None, None, {}
    if "drift" in tasks:
        bases = {find_model(other.get("model", run["model"]))[0] for other in runs}
        need(len(bases) == 1, "drift is from one untouched model, and these have several bases")
        reference, tokenizer = load_model(run["model"], device, dtype)
        length = min(run.get("calibration_max_tokens", 256), 256, positions(reference) - 1)
        texts, vocabulary = held_out(reference, tokenizer, length), tokenizer.get_vocab()
    try:
        for name in options.models:
            model = None                             # its memory is free before the next is loaded
            model, tokenizer = load_model(name, device, dtype)
            need(not texts or tokenizer.get_vocab() == vocabulary,
                 f"{name} has another tokenizer than {run['model']}: score its drift apart")
            scores = columns[name.rstrip("/")] = evaluate(model, tokenizer, tasks, reference, texts)
            scores |= harness(model, tokenizer, *extra, options.limit) if extra else {}
    finally:                                         # what was scored before a failure is shown
        if columns:
            print(table(columns))


if __name__ == "__main__":
    main()
