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
the mean target score; GM, the root of Avg1 times Avg2. Other benchmarks are lm-eval's:
assets/RESULTS.md has its commands.

train_math.py imports from here what both scripts need. By heading: prompts and tasks, errors,
loading a model, data, the prompt and its labels, the loss and the drift, answers, the table.
"""
import json
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import pandas
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import folora

TINY = Path(__file__).resolve().parent / "tiny"


# ---- Prompts and tasks ---------------------------------------------------------------------------

# Training and scoring use the same prompts. Appendix B's is the Alpaca form; CorDA's prompt for
# maths adds a sentence.
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n### Response:")
MATHS = ALPACA + " Let's think step by step."
# Those of lm-eval.
NQ_OPEN = "Answer these questions:\n\nQ: {}?\nA:"
TRIVIAQA = "Question: {}?\nAnswer:"
WEBQS = "Question: {}\nAnswer:"


class Task(NamedTuple):
    role: str             # target, preserve, or measure (a loss: lower is better)
    prompt: str = ""      # for a question; nll has that of the training, prose and drift have none
    source: str = ""      # a file, or a hub id[:configuration]
    split: str = "train"  # of a hub data set


TASKS = {
    "gsm8k": Task("target", MATHS, "openai/gsm8k:main", "test"),
    "nq_open": Task("preserve", NQ_OPEN, "google-research-datasets/nq_open", "validation"),
    "triviaqa": Task("preserve", TRIVIAQA, "mandarjoshi/trivia_qa:rc.nocontext", "validation"),
    "webqs": Task("preserve", WEBQS, "stanfordnlp/web_questions", "test"),
    "nll": Task("measure", "", "openai/gsm8k:main", "test"),
    "prose": Task("measure", "", "prose.jsonl"),
    "drift": Task("measure"),
    "facts": Task("preserve", NQ_OPEN, str(TINY / "facts.jsonl")),
    "sort": Task("preserve", NQ_OPEN, str(TINY / "sort.jsonl")),
    "reverse": Task("preserve", NQ_OPEN, str(TINY / "reverse.jsonl")),
    "sums": Task("preserve", NQ_OPEN, str(TINY / "sums.jsonl")),
}
UNITS = {"target": "target, %", "preserve": "preserved, %", "measure": "nat/token", "": ""}


def role_of(row):
    """A task's role, or "" for a row that sums up others, such as Avg1."""
    return TASKS[row].role if row in TASKS else ""


def is_tiny(model):
    return model == "tiny" or Path(model).resolve() == TINY


def default_tasks(model):
    """What is scored if --tasks says nothing."""
    if is_tiny(model):
        return f"gsm8k={TINY / 'test.jsonl'},facts,sort,reverse,sums,drift"
    return "gsm8k,nq_open,webqs,triviaqa,drift"


# ---- Errors: what the user can mend ends in one line ---------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend. The first line of its text says what to do."""


# These end a script in one line, and so does a lack of memory.
MENDABLE = (UserError, OSError, MemoryError, FloatingPointError, KeyboardInterrupt)
NO_MEMORY = re.compile("MemoryError|allocate memory|out of memory")


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
            if NO_MEMORY.search(message):
                message = "out of memory: take a lower --micro-batch-size, --max-length or --rank"
            elif not isinstance(error, MENDABLE):
                raise
            status = 1 if isinstance(error, FloatingPointError) else 2
        tqdm.write(message.splitlines()[0], sys.stderr)              # main's bars are closed by now
        sys.exit(status)
    return guarded


# ---- Loading a model -----------------------------------------------------------------------------

# Whose models have these short names.
OWNERS = {"Qwen": "Qwen/", "Llama": "meta-llama/", "SmolLM": "HuggingFaceTB/"}


def find_model(name):
    """(weights, adapter, run) of a MODEL.

    weights   directory or hub id of the weights
    adapter   directory of a PEFT adapter on top of them, or None
    run       options of the train_math.py run that made it. Of these a plain adapter has its base
              alone, {"model": base}, and a checkpoint has none, {}
    """
    path, run = Path(name), {}
    if name == "tiny":
        path = TINY
    if (path / "summary.json").exists():             # a finished run
        run = json.loads((path / "config.json").read_text())["options"]
        path /= "merged" if (path / "merged").exists() else "adapter"
    if (path / "adapter_config.json").exists():
        config = json.loads((path / "adapter_config.json").read_text())
        run = run or {"model": config.get("base_model_name_or_path")}
        need(run["model"], f"{path}/adapter_config.json has no base_model_name_or_path: add it")
        weights, _, _ = find_model(run["model"])
        return weights, path, run
    if path.is_dir():
        return str(path), None, run
    # A hub id or a short name. "runs/x" looks like a hub id, but is a run that is not there.
    family = re.match("[A-Za-z]*", name)[0]
    owner = "" if "/" in name else OWNERS.get(family, "")
    need(re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", owner + name),
         f"{name}: no such directory, and no short name (Qwen2.5-1.5B) or hub id (owner/name)")
    return owner + name, None, {}


def pick_device(dtype="auto"):
    """The GPU if there is one, and a dtype's name; auto: bfloat16 on a GPU, else float32."""
    cuda = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return "cuda" if cuda else "cpu", dtype


def load_model(name, device, dtype):
    """(model, tokenizer) in evaluation mode, an adapter merged into the weights."""
    path, adapter, run = find_model(name)
    with blame(f"cannot load the model {name}"):
        if adapter:
            model, tokenizer = load_model(run["model"], device, dtype)
            merge_adapter(model, adapter)
            return model, tokenizer
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype,
                                                           output_loading_info=True)
        # transformers only warns where weights are missing, and then makes them up.
        need(not info["missing_keys"] and not info["unexpected_keys"], f"wrong weights: {info}")
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def merge_adapter(model, folder):
    """Add a PEFT adapter's κ B A to the model's weights: in float32, and rounded once."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors", str(model.device))
    # Anything else but a plain LoRA would be computed wrong below.
    odd = re.findall("pissa|olora|corda|loftq|lora_ga", str(config.get("init_lora_weights")))
    odd += [key for key in weights if not re.search("lora_[AB].weight$", key)]
    odd += [key for key in ("alpha_pattern", "fan_in_fan_out") if config.get(key)]
    need(not odd, f"not plain LoRA, merge it with PEFT: {odd}")
    for key in weights:
        if "lora_A" not in key:
            continue
        A = weights[key].float()
        B = weights[key.replace("lora_A", "lora_B")].float()
        rank = len(A)
        kappa = config["lora_alpha"] / (rank ** 0.5 if config.get("use_rslora") else rank)
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        model.get_submodule(name).weight += kappa * B @ A


def positions(model):
    """The greatest number of tokens in a text that the model was made for."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


# ---- Data ----------------------------------------------------------------------------------------

def read_rows(source, split="train", limit=None):
    """The rows (dicts) of a .jsonl file or of a hub data set, owner/name[:configuration]."""
    name, _, config = source.partition(":")
    with blame(f"{source}: no such file or hub data set can be read"):
        if not source.endswith((".jsonl", ".json")):
            return list(datasets.load_dataset(name, config or None, split=split))[:limit]
        # Lines of bytes: those of a str would also end at U+2028, which a text may hold.
        lines = Path(source).read_bytes().strip().splitlines()[:limit]
    need(lines, f"{source}: no rows")
    rows = []
    for number, line in enumerate(lines, 1):
        with blame(f"{source}, line {number}: not JSON with fields, {{...}}, in UTF-8"):
            rows.append(dict(json.loads(line)))
    return rows


def texts_in(row, names, where):
    """The texts in the first of the fields "a or b" that is not empty: one text, a list of texts,
    or TriviaQA's {"aliases": list}."""
    value = next((row[name] for name in names.split(" or ") if row.get(name)), None)
    if isinstance(value, dict):
        value = value.get("aliases")
    if not isinstance(value, list):
        value = [value]
    texts = [text for text in value if isinstance(text, str) and text.strip()]
    need(texts, f"{where}: no field called {names} with a text in it: {[*row]}")
    return texts


def given_texts(rows, source):
    """The texts of rows that have nothing else."""
    return [texts_in(row, "text or question", f"{source}, line {number}")[0]
            for number, row in enumerate(rows, 1)]


def to_pairs(rows, source):
    """[(instruction, accepted responses)], whatever the data set calls them."""
    pairs = []
    for number, row in enumerate(rows, 1):
        where = f"{source}, line {number}"
        asked = texts_in(row, "question or query or instruction or problem", where)[0]
        if row.get("input"):                         # Alpaca's second field
            asked = f"{asked}\n{row['input']}"
        texts = texts_in(row, "answers or answer or response or output or solution", where)
        # GSM8K's "#### 18" becomes "The answer is: 18", as in MetaMathQA, and its <<calculator>>
        # notes are removed.
        texts = [re.sub(r"<<[^<>]*>>", "", text) for text in texts]
        texts = [re.sub(r"\n#### *(.+)\s*$", r"\nThe answer is: \1", text) for text in texts]
        pairs.append((asked, texts))
    return pairs


def load_tasks(names, limit=None):
    """{task: pairs} of "gsm8k,nq_open=dev.jsonl,drift". prose has texts instead, and drift nothing.
    All data is read and checked now, so that a mistake in it does not show after an hour."""
    tasks = {}
    for item in filter(None, names.split(",")):
        name, _, path = item.partition("=")
        need(name in TASKS, f"unknown task {name}: there are {', '.join(TASKS)}")
        source = path or TASKS[name].source
        rows = read_rows(source, TASKS[name].split, limit) if source else []
        tasks[name] = given_texts(rows, source) if name == "prose" else to_pairs(rows, source)
        if name == "gsm8k":
            for number, (_, answers) in enumerate(tasks[name], 1):
                need(final_number(answers[0]) is not None, f"{source}, line {number}: its answer "
                     "has no number after #### or The answer is:")
    return tasks


# ---- The prompt and its labels -------------------------------------------------------------------

def encode_all(tokenizer, pairs, max_length):
    """[{"ids", "labels"}] of the pairs' first responses, in the prompt that is also scored with.

    The prompt has labels of -100, which bear no loss; the response and the end of sequence do. An
    example whose prompt alone fills max_length is left out; more than half is an error."""
    examples = []
    for instruction, (response, *_) in pairs:
        form = MATHS if "The answer is:" in response else ALPACA
        prompt = form.format(instruction)
        # Both are tokenised with the same start of text. The space begins a new token.
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(f"{prompt} {response}")["input_ids"]
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        if len(prompt_ids) < max_length:
            ids = ids[:max_length]
            labels = [-100] * len(prompt_ids) + ids[len(prompt_ids):]
            examples.append({"ids": ids, "labels": labels})
    need(2 * len(examples) >= len(pairs), f"most prompts fill {max_length} tokens: --max-length")
    return examples


def collate(examples, device, side="right"):
    """A padded batch of encoded examples, or of token sequences, which are their own labels."""
    examples = [e if isinstance(e, dict) else {"ids": e, "labels": e} for e in examples]
    ids = [torch.as_tensor(e["ids"]) for e in examples]
    labels = [torch.as_tensor(e["labels"]) for e in examples]
    ones = [torch.ones_like(i) for i in ids]

    def pad(rows, fill):
        return torch.nn.utils.rnn.pad_sequence(rows, True, fill, side).to(device)

    return {"input_ids": pad(ids, 0), "attention_mask": pad(ones, 0), "labels": pad(labels, -100)}


def by_length(examples, batch_size):
    """Batches of similar length, the longest first, so that a lack of memory shows at once."""
    def length(example):
        return len(example["ids"] if isinstance(example, dict) else example)

    ordered = sorted(examples, key=length, reverse=True)
    return [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]


# ---- The loss and the drift ----------------------------------------------------------------------

def logits_of(model, batch):
    """(logits, labels) at the n positions that predict a label: (n, vocabulary), float32, and (n,).
    Position t predicts token t + 1. The output layer runs only where some row has a label, which
    saves most of the memory of a large vocabulary."""
    labels = batch["labels"][:, 1:]
    is_label = labels != -100
    kept = is_label.any(0).nonzero()[:, 0]           # positions with a label in some row
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                   use_cache=False, logits_to_keep=kept).logits
    labels, is_label = labels[:, kept], is_label[:, kept]
    return logits[is_label].float(), labels[is_label]


def summed_nll(model, batch):
    """The sum of the losses at the batch's labels, in nat."""
    logits, labels = logits_of(model, batch)
    return F.cross_entropy(logits, labels, reduction="sum")


def count_labels(examples):
    """How many tokens of encoded examples bear a loss. The first is never predicted."""
    return sum(label != -100 for e in examples for label in e["labels"][1:])


@torch.inference_mode()
def mean_nll(model, examples, batch_size=8):
    """The mean loss per response token of encoded examples, in nat."""
    total = 0.0
    for batch in tqdm(by_length(examples, batch_size), "nll", leave=False):
        total += summed_nll(model, collate(batch, model.device)).item()
    return total / count_labels(examples)


def summed_kl(reference, model, texts, device):
    """KL(reference || model), summed over the next-token positions of token lists, in nat. Both are
    models, or functions like one; the reference gets no gradient."""
    batch = collate(texts, device)
    with torch.no_grad():
        log_p = logits_of(reference, batch)[0].log_softmax(-1)       # (n, vocabulary)
    log_q = logits_of(model, batch)[0].log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


@torch.no_grad()
def drift(model, reference, texts, batch_size=4):
    """The mean of KL(reference || model) over all next-token positions of the texts, in nat."""
    total = 0.0
    for some in by_length(texts, batch_size):
        total += summed_kl(reference, model, some, model.device).item()
    return total / sum(len(text) - 1 for text in texts)


def held_out(model, tokenizer, max_new_tokens, samples=16, seed=1000):
    """Text that the model writes and that calibration never sees, because its seed differs."""
    return folora.sample_calibration(model, tokenizer, samples, min(128, max_new_tokens),
                                     max_new_tokens, seed=seed)


# ---- Answers -------------------------------------------------------------------------------------

@torch.inference_mode()
def greedy(model, tokenizer, prompts, max_new_tokens, stops=None, desc=None):
    """The greedy continuation (a token list) of each prompt."""
    # generate takes every option that a call leaves open, such as beams or a repetition penalty,
    # from the checkpoint's generation_config. folora.plain_mode sets that aside; only its
    # end-of-sequence tokens are used.
    ends = model.generation_config.eos_token_id
    written = []
    for i in tqdm(range(0, len(prompts), 32), desc, leave=False):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[i:i + 32]]
        batch = collate(ids, model.device, side="left")
        width = batch.pop("labels").shape[1]
        with folora.plain_mode(model):
            rows = model.generate(
                **batch, tokenizer=tokenizer, do_sample=False, max_new_tokens=max_new_tokens,
                stop_strings=stops, eos_token_id=ends, pad_token_id=tokenizer.eos_token_id)
        written += rows[:, width:].tolist()
    return written


def exact_match(text, answers, articles=True):
    """lm-eval's exact_match. nq_open removes articles, before the text is put in lower case."""
    removed = r"[!-/:-@[-`{-~]"                      # punctuation
    if articles:
        removed += r"|\b(?:The |the |An |A |a |an )"

    def normal(text):
        return re.sub(removed, "", text).lower()

    return normal(text) in [normal(answer) for answer in answers]


def final_number(text):
    """The number after the last "The answer is:", or None."""
    _, marker, stated = text.rpartition("The answer is:")
    if not marker:
        return None
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", stated)
    return float(found.group().replace(",", "")) if found else None


def is_continuation(tokenizer, prompt, answers, tokens):
    """Whether the greedy tokens begin with those of an answer. It is so exactly if each token of
    the answer is the likeliest given all before it, which is lm-eval's rule for webqs."""
    start = len(tokenizer(prompt)["input_ids"])
    for answer in answers:
        wanted = tokenizer(f"{prompt} {answer}")["input_ids"][start:]
        if tokens[:len(wanted)] == wanted:
            return True
    return False


def count_right(model, tokenizer, pairs, task):
    """How many of a task's (question, accepted answers) are answered right."""
    prompts = [TASKS[task].prompt.format(question) for question, _ in pairs]
    longest, stops = 64, ["\n", ".", ","]
    if task == "gsm8k":                              # a solution: half of a small model's context
        longest, stops = min(512, positions(model) // 2), ["### Instruction", "Question:"]
    elif task == "webqs":
        stops = ["\n"]
    right = 0
    written = greedy(model, tokenizer, prompts, longest, stops, task)
    for prompt, tokens, (_, wanted) in zip(prompts, written, pairs):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if task == "gsm8k":
            right += final_number(text) == final_number(wanted[0])
        elif task == "webqs":
            right += is_continuation(tokenizer, prompt, wanted, tokens)
        else:
            answer = re.split(r"[\n.,]", text)[0].strip()
            right += exact_match(answer, wanted, articles=task != "triviaqa")
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
            scores[name] = 0.0 if reference is None else drift(model, reference, texts)
        else:
            scores[name] = 100 * count_right(model, tokenizer, pairs, name) / len(pairs)
    return scores


# ---- The table -----------------------------------------------------------------------------------

def average(scores, role):
    """The mean of a column's scores of one role. Of none it is NaN, which no row shows."""
    values = [score for row, score in scores.items() if role_of(row) == role]
    return sum(values) / len(values) if values else float("nan")


def summarise(scores, first=None):
    """The summary rows of one column. Avg1(%) needs `first`, the untouched model's column. Where
    there is nothing to average, the row is left out."""
    keep, target = average(scores, "preserve"), average(scores, "target")
    rows = {"Avg1": keep}
    before = average(first or {}, "preserve")
    if before > 0:
        rows["Avg1(%)"] = 100 * keep / before
    rows["Avg2"] = target
    rows["GM"] = (keep * target) ** 0.5
    return {row: value for row, value in rows.items() if value == value}     # not NaN


def table(columns):
    """{column: scores} as aligned text. A single column has nothing to be compared with."""
    first = next(iter(columns.values())) if len(columns) > 1 else None
    full = {name: scores | summarise(scores, first) for name, scores in columns.items()}

    def formatted(row):
        digits = "{:.4f}" if role_of(row.name) == "measure" else "{:.2f}"
        return row.map(digits.format, "ignore")

    shown = pandas.DataFrame(full).apply(formatted, axis=1)
    shown.index = [shown.index, [UNITS[role_of(row)] for row in shown.index]]        # two columns
    return shown.to_string(na_rep="")


# ---- The command ---------------------------------------------------------------------------------

def one_line_parser(description):
    """An ArgumentParser that raises UserError, and so prints one line without the usage."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, message)
    return parser


@one_line
def main(arguments=None):
    parser = one_line_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directory or hub id")
    parser.add_argument("--tasks", help="NAME or NAME=FILE.jsonl, by commas (default: see above)")
    parser.add_argument("--limit", type=int, help="the first so many rows of each task")
    options = parser.parse_args(arguments)

    # The untouched model is the base of the first run or adapter, or else the first model.
    runs = [find_model(name)[2] for name in options.models]
    run = next((run for run in runs if run), {})
    untouched = run.get("model", options.models[0])
    device, dtype = pick_device(run.get("dtype", "auto"))

    tasks = load_tasks(options.tasks or default_tasks(untouched), options.limit)
    reference = texts = None
    if "drift" in tasks:
        reference, tokenizer = load_model(untouched, device, dtype)
        longest = min(256, run.get("calibration_max_tokens", 256))
        texts = held_out(reference, tokenizer, longest)
    columns = {}
    for name in options.models:
        model, tokenizer = load_model(name, device, dtype)
        columns[name] = evaluate(model, tokenizer, tasks, reference, texts)
    print(table(columns))


if __name__ == "__main__":
    main()
