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
Other benchmarks are lm-eval's: the README has its commands.
"""
import json
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path

import datasets
import pandas
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import folora

TINY = Path(__file__).resolve().parent / "tiny"
OWNERS = {"Qwen": "Qwen/", "Llama": "meta-llama/", "SmolLM": "HuggingFaceTB/"}     # of short names
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n### Response:")
MATHS = ALPACA + " Let's think step by step."        # CorDA's prompt for maths
NQ_OPEN = "Answer these questions:\n\nQ: {}?\nA:"
# Each task has a role, a prompt, and data: a file, or a hub id[:configuration] and a split.
TASKS = {
    "gsm8k": ("target", MATHS, "openai/gsm8k:main", "test"),
    "nq_open": ("preserve", NQ_OPEN, "google-research-datasets/nq_open", "validation"),
    "triviaqa": ("preserve", "Question: {}?\nAnswer:",
                 "mandarjoshi/trivia_qa:rc.nocontext", "validation"),
    "webqs": ("preserve", "Question: {}\nAnswer:", "stanfordnlp/web_questions", "test"),
    "nll": ("measure", None, "openai/gsm8k:main", "test"),
    "prose": ("measure", None, "prose.jsonl"), "drift": ("measure", None, None),
    **{skill: ("preserve", NQ_OPEN, str(TINY / f"{skill}.jsonl"))
       for skill in ("facts", "sort", "reverse", "sums")},
    **{row: ("", None, None) for row in ("Avg1", "Avg1(%)", "Avg2", "GM")}}      # summary rows
UNITS = {"target": "target, %", "preserve": "preserved, %", "measure": "nat/token", "": ""}


# ---- errors --------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend. The first line of its text says what to do."""


# These end a script in one line, and so does a lack of memory.
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
    """Let main end in one line on stderr: in exit status 2 if the user can mend the error, and in 1
    if a run has failed (FloatingPointError). Other errors keep their traceback."""
    def guarded(arguments=None):
        try:
            return main(arguments)
        except (*MENDABLE, RuntimeError) as error:
            message = str(error).strip() or type(error).__name__
            if re.search("MemoryError|allocate memory|out of memory", message):
                message = "out of memory: take a lower --micro-batch-size, --max-length or --rank"
            elif not isinstance(error, MENDABLE):
                raise
            status = 1 if isinstance(error, FloatingPointError) else 2
        tqdm.write(message.splitlines()[0], sys.stderr)              # main's bars are closed by now
        sys.exit(status)
    return guarded


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
    if path.is_dir():
        return str(path), None, run
    owner = "" if "/" in name else OWNERS.get(re.match("[A-Za-z]*", name)[0], "")
    need(re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", owner + name),
         f"{name}: no such directory, and no short name (Qwen2.5-1.5B) or hub id (owner/name)")
    return owner + name, None, {}


def pick_device(dtype="auto"):
    """The GPU if there is one, and a dtype's name; auto: bfloat16 on a GPU, else float32."""
    cuda = torch.cuda.is_available()
    return "cuda" if cuda else "cpu", dtype.replace("auto", "bfloat16" if cuda else "float32")


@torch.no_grad()
def add_adapter(model, folder):
    """Add a PEFT adapter's κ B A to the weights: in float32, and rounded once."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors", str(model.device))
    odd = re.findall("pissa|olora|corda|loftq|lora_ga", str(config.get("init_lora_weights")))
    odd += [key for key in weights if not re.search("lora_[AB].weight$", key)]
    odd += [key for key in ("alpha_pattern", "fan_in_fan_out") if config.get(key)]
    need(not odd, f"not plain LoRA, merge it with PEFT: {odd}")
    for key in [key for key in weights if "lora_A" in key]:
        A, B = (weights[key.replace("lora_A", side)].float() for side in ("lora_A", "lora_B"))
        update = config["lora_alpha"] / len(A) ** (0.5 if config.get("use_rslora") else 1) * B @ A
        model.get_submodule(key[len("base_model.model."):-len(".lora_A.weight")]).weight += update


def load_model(name, device, dtype):
    """(model, tokenizer), ready for inference, an adapter merged."""
    path, adapter, run = find_model(name)
    with blame(f"cannot load the model {name}"):
        if adapter:
            model, tokenizer = load_model(run["model"], device, dtype)
            add_adapter(model, adapter)
            return model, tokenizer
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype,
                                                           output_loading_info=True)
        need(not info["missing_keys"] and not info["unexpected_keys"], f"wrong weights: {info}")
    return model.to(device).eval(), tokenizer


def positions(model):
    """The greatest number of tokens in a text that the model was made for."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


# ---- data ----------------------------------------------------------------------------------------

def read_rows(source, split="train", limit=None):
    """The rows (dicts) of a .jsonl file or of a hub data set, owner/name[:configuration]. The lines
    of a file are those of its bytes, because a text may hold U+2028 and other line separators."""
    name, _, config = source.partition(":")
    with blame(f"{source}: no such file or hub data set can be read"):
        if not source.endswith((".jsonl", ".json")):
            return list(datasets.load_dataset(name, config or None, split=split))[:limit]
        rows = Path(source).read_bytes().strip().splitlines()[:limit]
    need(rows, f"{source}: no rows")
    for number, line in enumerate(rows, 1):
        with blame(f"{source}, line {number}: not JSON with fields, {{...}}, in UTF-8"):
            rows[number - 1] = dict(json.loads(line))
    return rows


def texts_in(row, names, where):
    """The texts in the first of the fields "a or b" that is not empty: one text, a list of texts,
    or TriviaQA's {"aliases": list}."""
    value = next((row[name] for name in names.split(" or ") if row.get(name)), None)
    value = value.get("aliases") if isinstance(value, dict) else value
    texts = [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, str)]
    need("".join(texts).strip(), f"{where}: no field called {names} with a text in it: {[*row]}")
    return [text for text in texts if text.strip()]


def given_texts(rows, source):
    """The texts of rows that have nothing else."""
    return [texts_in(row, "text or question", f"{source}, line {number}")[0]
            for number, row in enumerate(rows, 1)]


def to_pairs(rows, source):
    """[(instruction, accepted responses)]. GSM8K's "#### 18" becomes "The answer is: 18", as in
    MetaMathQA, and its <<calculator>> notes are removed."""
    pairs = []
    for number, row in enumerate(rows, 1):
        where = f"{source}, line {number}"
        asked = texts_in(row, "question or query or instruction or problem", where)[0]
        texts = texts_in(row, "answers or answer or response or output or solution", where)
        texts = [re.sub(r"<<[^<>]*>>", "", text) for text in texts]
        texts = [re.sub(r"\n#### *(.+)\s*$", r"\nThe answer is: \1", text) for text in texts]
        pairs.append((f"{asked}\n{row.get('input') or ''}".removesuffix("\n"), texts))    # Alpaca's
    return pairs


def default_tasks(model):
    """What is scored if --tasks says nothing."""
    return (f"gsm8k={TINY / 'test.jsonl'},facts,sort,reverse,sums,drift" if is_tiny(model)
            else "gsm8k,nq_open,webqs,triviaqa,drift")


def load_tasks(names, limit=None):
    """{task: pairs} of "gsm8k,nq_open=dev.jsonl,drift". prose has texts instead, and drift nothing.
    All data is read and checked now, so that a mistake in it does not show after an hour."""
    tasks = {}
    for item in filter(None, names.split(",")):
        name, _, path = item.partition("=")
        need(TASKS.get(name, [""])[0], f"unknown task {name}: there are {', '.join(TASKS)}")
        source = path or TASKS[name][2]
        rows = read_rows(source, *TASKS[name][3:], limit=limit) if source else []
        tasks[name] = (given_texts if name == "prose" else to_pairs)(rows, source)
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
    need(2 * len(examples) >= len(pairs), f"most prompts fill {max_length} tokens: --max-length")
    return examples


def collate(examples, device, side="right"):
    """A padded batch of encoded examples, or of token sequences, which are their own labels."""
    examples = [e if isinstance(e, dict) else {"ids": e, "labels": e} for e in examples]
    ids, labels = ([torch.as_tensor(e[key]) for e in examples] for key in ("ids", "labels"))
    pad = lambda rows, fill: torch.nn.utils.rnn.pad_sequence(rows, True, fill, side).to(device)
    return {"input_ids": pad(ids, 0), "attention_mask": pad([torch.ones_like(i) for i in ids], 0),
            "labels": pad(labels, -100)}


def by_length(examples, batch_size):
    """Batches of similar length, the longest first, so that a lack of memory shows at once."""
    ordered = sorted(examples, key=lambda e: -len(e["ids"] if isinstance(e, dict) else e))
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
    labels = sum(label != -100 for e in examples for label in e["labels"][1:])
    return sum(summed_nll(model, collate(batch, model.device)).item()
               for batch in tqdm(by_length(examples, batch_size), "nll", leave=False)) / labels


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


def held_out(model, tokenizer, max_new_tokens, samples=16, seed=1000):
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
    removed = r"[!-/:-@[-`{-~]" + (r"|\b(?:The |the |An |A |a |an )" if articles else "")
    normal = lambda text: re.sub(removed, "", text).lower()
    return normal(text) in map(normal, answers)


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
            texts = [prompt, *(f"{prompt} {answer}" for answer in wanted)]
            start, *whole = (tokenizer(text)["input_ids"] for text in texts)
            right += any(tokens[:len(ids) - len(start)] == ids[len(start):] for ids in whole)
        else:
            right += exact_match(re.split(r"[\n.,]", text)[0].strip(), wanted, task != "triviaqa")
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


# ---- the table -----------------------------------------------------------------------------------

def summarise(scores, first=None):
    """The summary rows of one column. Avg1(%) needs `first`, the untouched model's column. A mean
    of nothing is not a finite number, and its rows are left out."""
    average = lambda column, role: torch.tensor(
        [column[row] for row in column if TASKS[row][0] == role], dtype=torch.float64).mean()
    keep, target = average(scores, "preserve"), average(scores, "target")
    rows = {"Avg1": keep, "Avg1(%)": 100 * keep / average(first or {}, "preserve"), "Avg2": target,
            "GM": (keep * target).sqrt()}
    return {row: value.item() for row, value in rows.items() if value.isfinite()}


def table(columns):
    """{column: scores} as aligned text. A single column has nothing to be compared with."""
    first = next(iter(columns.values())) if len(columns) > 1 else None
    full = {name: scores | summarise(scores, first) for name, scores in columns.items()}
    digits = lambda row: "{:.4f}" if TASKS[row.name][0] == "measure" else "{:.2f}"
    shown = pandas.DataFrame(full).apply(lambda row: row.map(digits(row).format, "ignore"), axis=1)
    shown.index = [shown.index, [UNITS[TASKS[row][0]] for row in shown.index]]     # two columns
    return shown.to_string(na_rep="")


@one_line
def main(arguments=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, message)              # one line, without the usage
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directory or hub id")
    parser.add_argument("--tasks", help="NAME or NAME=FILE.jsonl, by commas (default: see above)")
    parser.add_argument("--limit", type=int, help="the first so many rows of each task")
    options = parser.parse_args(arguments)
    run = next(filter(None, (find_model(name)[2] for name in options.models)), {})
    untouched = run.get("model", options.models[0])
    device, dtype = pick_device(run.get("dtype", "auto"))
    tasks = load_tasks(options.tasks or default_tasks(untouched), options.limit)
    reference = texts = None
    if "drift" in tasks:
        reference, tokenizer = load_model(untouched, device, dtype)
        texts = held_out(reference, tokenizer, min(256, run.get("calibration_max_tokens", 256)))
    print(table({name: evaluate(*load_model(name, device, dtype), tasks, reference, texts)
                 for name in options.models}))


if __name__ == "__main__":
    main()
