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
the mean target score; GM, the root of Avg1 times Avg2. Each score is also written to stderr as soon
as it is known. Other benchmarks are lm-eval's: assets/RESULTS.md has its commands.

train_math.py imports from here what both scripts need. By heading: prompts and tasks, errors,
loading a model, data, the prompt and its labels, the loss and the drift, answers, the table.
"""
import json
import math
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
        cause = str(error).strip() or type(error).__name__
        raise UserError(f"{what}: {cause}") from error


def say(message):
    """A line on stderr, above the bars."""
    tqdm.write(message, sys.stderr)


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
        say(message.splitlines()[0])                 # main's bars are closed by now
        sys.exit(status)
    return guarded


# ---- Loading a model -----------------------------------------------------------------------------

DTYPES = ("auto", "float32", "bfloat16")
# Whose models have these short names.
OWNERS = {"Qwen": "Qwen/", "Llama": "meta-llama/", "SmolLM": "HuggingFaceTB/"}


def find_model(name, above=()):
    """(weights, adapter, run) of a MODEL.

    weights   directory or hub id of the weights
    adapter   directory of a PEFT adapter on top of them, or None
    run       options of the train_math.py run that made it. Of these a plain adapter has its base
              alone, {"model": base}, and a checkpoint has none, {}
    above     the adapters that have led here, which must not lead here again
    """
    need(name, "the name of a model is empty")
    path, run = Path(name), {}
    if name == "tiny":
        path = TINY
    if (path / "config.json").exists() or is_finished_run(path):
        run = run_options(path)
    if run:
        need((path / "summary.json").exists(), f"{path} is an unfinished run: repeat its command")
        path /= "merged" if (path / "merged").exists() else "adapter"
    if (path / "adapter_config.json").exists():
        config = read_object(path / "adapter_config.json")
        run = run or {"model": config.get("base_model_name_or_path")}
        need(run["model"] and isinstance(run["model"], str),
             f"{path}/adapter_config.json has no base_model_name_or_path: add it")
        need(path.resolve() not in above, f"{path} is an adapter whose base is itself: write the "
             "base into adapter_config.json as base_model_name_or_path")
        weights, _, _ = find_model(run["model"], (*above, path.resolve()))
        return weights, path, run
    if path.is_dir():
        return str(path), None, run
    # A hub id or a short name. "runs/x" looks like a hub id, but is a run that is not there.
    family = re.match("[A-Za-z]*", name)[0]
    owner = "" if "/" in name else OWNERS.get(family, "")
    need(re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", owner + name),
         f"{name}: no such directory, and no short name (Qwen2.5-1.5B) or hub id (owner/name)")
    return owner + name, None, {}


def read_object(path):
    """The JSON object in a file."""
    with blame(f"{path} is damaged or gone"):
        value = json.loads(path.read_text())
        need(isinstance(value, dict), "it holds no {...}")
    return value


def is_finished_run(path):
    """A checkpoint may have a summary.json of somebody else's, too, but not these folders."""
    parts = (path / "merged").is_dir() or (path / "adapter").is_dir()
    return parts and (path / "summary.json").exists()


def run_options(path):
    """The options of the run of train_math.py in a directory, or {} where its config.json is that
    of a checkpoint."""
    options = read_object(path / "config.json").get("options")
    if options is None and not is_finished_run(path):
        return {}
    number = isinstance(options, dict) and options.get("calibration_max_tokens", 256)
    need(isinstance(options, dict) and isinstance(options.get("model"), str)
         and isinstance(number, int) and options.get("dtype", "auto") in DTYPES,
         f"{path}/config.json is not that of a run of train_math.py")
    return options


def pick_device(dtype="auto"):
    """The GPU if there is one, and a dtype's name; auto: bfloat16 on a GPU, else float32."""
    cuda = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return "cuda" if cuda else "cpu", dtype


def judge(name):
    """(tokenizer, config) of a MODEL. Refuses all that can be found wrong with it without reading
    its weights, so that it does not show when others have been scored for an hour."""
    path, adapter, run = find_model(name)
    with blame(f"cannot load the model {name}"):
        if adapter:
            tokenizer, config = judge(run["model"])
            with torch.device("meta"):               # no memory
                adapted_layers(AutoModelForCausalLM.from_config(config), adapter)
            return tokenizer, config
        config = AutoConfig.from_pretrained(path)
        if Path(path).is_dir():
            files = [*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]
            need(files, f"{path} has no weights, *.safetensors")
            for file in files:
                if file.suffix == ".safetensors":
                    with safe_open(file, "pt"):      # refuses a file that is not complete
                        pass
        return load_tokenizer(path), config


def load_tokenizer(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    # BERT's kind has another name for what ends a text. Without any, a response has no end.
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    need(tokenizer.eos_token is not None, "its tokenizer has no eos_token: set one")
    return tokenizer


def load_model(name, device, dtype):
    """(model, tokenizer) in evaluation mode, an adapter merged into the weights."""
    path, adapter, run = find_model(name)
    with blame(f"cannot load the model {name}"):
        if adapter:
            model, tokenizer = load_model(run["model"], device, dtype)
            merge_adapter(model, adapter)
        else:
            tokenizer = load_tokenizer(path)
            model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype,
                                                               output_loading_info=True)
            # transformers only warns where weights are missing, and then makes them up.
            need(not info["missing_keys"] and not info["unexpected_keys"], f"wrong weights: {info}")
            rows = model.get_input_embeddings().num_embeddings
            need(max(tokenizer.vocab_size, tokenizer.eos_token_id + 1) <= rows,
                 f"its tokenizer has more tokens than the {rows} of its embedding")
        # NaN would show as wrong answers, or after an hour as a loss that is no number.
        for key, weight in model.named_parameters():
            if weight.is_floating_point() and weight.element_size() > 1:
                need(weight.isfinite().all(), f"{key} has numbers that are not finite")
    return model.to(device).eval(), tokenizer


def adapted_layers(model, folder):
    """[(name, κ)] of the layers that a PEFT adapter changes. Refuses anything else but a plain LoRA
    on nn.Linear layers of this model, which may be on the meta device: merge_adapter would compute
    it wrong, and broadcasting would hide a wrong shape."""
    config = read_object(folder / "adapter_config.json")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    odd = re.findall("pissa|olora|corda|loftq|lora_ga", str(config.get("init_lora_weights")))
    odd += [key for key in shapes if not re.search("lora_[AB].weight$", key)]
    odd += [key for key in ("alpha_pattern", "fan_in_fan_out", "alora_invocation_tokens",
                            "use_qalora", "use_dora") if config.get(key)]
    odd += [kind for kind in [config.get("peft_type", "LORA")] if kind != "LORA"]
    need(not odd, f"not plain LoRA, merge it with PEFT: {odd}")
    need(shapes, f"{folder}/adapter_model.safetensors has no weights")
    alpha, modules = config.get("lora_alpha"), dict(model.named_modules())
    need(type(alpha) in (int, float) and math.isfinite(alpha),
         f"{folder}/adapter_config.json has no number as lora_alpha")
    layers = {}
    for key in shapes:
        name, _, _ = key.removeprefix("base_model.model.").rpartition(".lora_")
        A, B = (shapes.get(weight) for weight in factor_names(name))
        layer = modules.get(name)
        need(isinstance(layer, torch.nn.Linear), f"{name} is no nn.Linear of the adapter's base")
        need(A and B, f"{name} has a lora_A or a lora_B, but not both")
        rank = A[0]
        need(rank == config.get("r") or config.get("rank_pattern"),
             f"{name} has the rank {rank}, and adapter_config.json has another r")
        need((A, B) == ([rank, layer.in_features], [layer.out_features, rank]),
             f"{name} has factors {A} and {B} on a weight {[*layer.weight.shape]}")
        layers[name] = alpha / (rank ** 0.5 if config.get("use_rslora") else rank)
    return layers.items()


def factor_names(name):
    """What PEFT calls A and B of a layer."""
    return [f"base_model.model.{name}.lora_{part}.weight" for part in "AB"]


@torch.no_grad()
def merge_adapter(model, folder):
    """Add a PEFT adapter's κ B A to the model's weights: in float32, and rounded once."""
    layers = adapted_layers(model, folder)
    weights = load_file(folder / "adapter_model.safetensors", str(model.device))
    for name, kappa in layers:
        A, B = (weights[key].float() for key in factor_names(name))
        model.get_submodule(name).weight += kappa * B @ A


def positions(config):
    """The greatest number of tokens in a text that a model of this config was made for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


# ---- Data ----------------------------------------------------------------------------------------

def read_rows(source, split="train", limit=None):
    """The rows (dicts) of a .jsonl file or of a hub data set, owner/name[:configuration]."""
    if not source.lower().endswith((".jsonl", ".json")):
        # What is meant as a file must not be looked for on the hub, nor be read as the hub does.
        is_file = Path(source).exists() or re.search(r"\.(csv|tsv|txt|parquet|gz)$", source, re.I)
        is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[^/]+)?", source)
        need(is_id and not is_file, f"{source}: no .jsonl file, and no hub id (owner/name)")
        name, _, config = source.partition(":")
        with blame(f"{source}: no such file or hub data set can be read"):
            import datasets  # needed for the hub alone
            return list(datasets.load_dataset(name, config or None, split=split))[:limit]
    with blame(f"{source}: no such file can be read"):
        # Lines of bytes: those of a str would also end at U+2028, which a text may hold.
        lines = Path(source).read_bytes().rstrip().splitlines()[:limit]
    need(lines, f"{source}: no rows")
    rows = []
    for number, line in enumerate(lines, 1):
        with blame(f"{source}, line {number}: not JSON with fields, {{...}}, in UTF-8"):
            row = json.loads(line)
            need(isinstance(row, dict), f"a row is one line, not {str(row)[:20]}")
            # Half of a surrogate pair, "\\ud800", is in no text, and no tokenizer takes it.
            json.dumps(row, ensure_ascii=False).encode()
            rows.append(row)
    return rows


def texts_in(row, names, where):
    """The texts in the first of the fields "a or b" that is not empty: one text, a list of texts,
    or TriviaQA's {"aliases": list}."""
    value = next((row[name] for name in names.split(" or ") if row.get(name)), None)
    if isinstance(value, dict):
        value = value.get("aliases")
    if not isinstance(value, list):
        value = [value]
    are_texts = all(isinstance(text, str) for text in value)
    texts = [text for text in value if are_texts and text.strip()]
    need(texts, f"{where}: no field called {names} with a text in it: {[*row]}")
    return texts


def text_in(row, names, where):
    """The text in the first of these fields that is not empty. A list would lose all but one."""
    [text, *_] = texts_in(row, names, where)
    need(text in row.values(), f"{where}: {names} takes one text, not a list")
    return text


def given_texts(rows, source):
    """The texts of rows that have nothing else."""
    return [text_in(row, "text or question", f"{source}, line {number}")
            for number, row in enumerate(rows, 1)]


def to_pairs(rows, source):
    """[(instruction, accepted responses)], whatever the data set calls them."""
    pairs = []
    for number, row in enumerate(rows, 1):
        where = f"{source}, line {number}"
        asked = text_in(row, "question or query or instruction or problem", where)
        if row.get("input"):                         # Alpaca's second field
            asked = f"{asked}\n{text_in(row, 'input', where)}"
        texts = texts_in(row, "answers or answer or response or output or solution", where)
        # GSM8K's "#### 18" becomes "The answer is: 18", as in MetaMathQA, and its <<calculator>>
        # notes are removed.
        texts = [re.sub(r"<<[^<>]*>>", "", text) for text in texts]
        texts = [re.sub(r"\n#### *(.+)\s*$", r"\nThe answer is: \1", text) for text in texts]
        pairs.append((asked, texts))
    return pairs


def sources_of(names):
    """{task: file, hub id or ""} of "gsm8k,nq_open=dev.jsonl,drift"."""
    sources = {}
    for item in filter(None, names.split(",")):
        name, sign, path = item.partition("=")
        need(name in TASKS, f"unknown task {name}: there are {', '.join(TASKS)}")
        need(name not in sources, f"the task {name} is named twice")
        need(path or not sign, f"{item} names no file")
        need(name != "drift" or not path, "drift takes no file: the model writes its texts")
        sources[name] = path or TASKS[name].source
    return sources


def load_tasks(names, limit=None):
    """{task: pairs} of "gsm8k,nq_open=dev.jsonl,drift". prose has texts instead, and drift nothing.
    All data is read and checked now, so that a mistake in it does not show after an hour."""
    tasks = {}
    for name, source in sources_of(names).items():
        rows = read_rows(source, TASKS[name].split, limit) if source else []
        tasks[name] = given_texts(rows, source) if name == "prose" else to_pairs(rows, source)
        if name == "gsm8k":
            for number, (_, answers) in enumerate(tasks[name], 1):
                need(final_number(answers[0]) is not None, f"{source}, line {number}: its answer "
                     "has no number after #### or The answer is:")
    need(tasks, "nothing to score: give --tasks")
    return tasks


# ---- The prompt and its labels -------------------------------------------------------------------

def encode(tokenizer, texts):
    """The token lists of texts, with what the tokenizer puts before a text, such as BOS, but
    without what it puts behind it, such as EOS or BERT's [SEP]. A prompt that ends so is not the
    beginning of prompt and answer, and models have nothing to say behind it."""
    lists = tokenizer(texts)["input_ids"]
    whole, bare = lists[0], tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    # `whole` is some tokens, `bare`, and some more.
    ends = [end for end in range(len(bare), len(whole) + 1) if whole[end - len(bare):end] == bare]
    behind = len(whole) - max(ends, default=len(whole))
    return [ids[:len(ids) - behind] for ids in lists]


def encode_texts(tokenizer, texts, longest, source):
    """Token lists of texts, of at most `longest` tokens. A first token is not predicted, so that
    texts of one token have no loss, and no model reads a text of none."""
    lists = encode(tokenizer, texts)
    need(all(lists), f"{source}: the tokenizer finds no token in a text")
    need(any(len(ids) > 1 for ids in lists), f"{source}: all texts have a single token")
    cut = sum(len(ids) > longest for ids in lists)
    if cut:
        say(f"{source}: {cut} of {len(lists)} texts are cut at {longest} tokens")
    return [ids[:longest] for ids in lists]


def encode_all(tokenizer, pairs, max_length):
    """[{"ids", "labels"}] of the pairs' first responses, in the prompt that is also scored with.

    The prompt has labels of -100, which bear no loss; the response and the end of sequence do. An
    example whose prompt alone fills max_length is left out; more than half is an error."""
    prompts = [(MATHS if "The answer is:" in response else ALPACA).format(instruction)
               for instruction, (response, *_) in pairs]
    # Both are tokenised with the same start of text. The space begins a new token.
    wholes = [f"{prompt} {response}" for prompt, (_, (response, *_)) in zip(prompts, pairs)]
    examples, cut = [], 0
    for prompt_ids, ids in zip(encode(tokenizer, prompts), encode(tokenizer, wholes)):
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        if len(prompt_ids) < max_length:
            cut += len(ids) > max_length
            ids = ids[:max_length]
            labels = [-100] * len(prompt_ids) + ids[len(prompt_ids):]
            examples.append({"ids": ids, "labels": labels})
    need(2 * len(examples) >= len(pairs), f"most prompts fill {max_length} tokens: --max-length")
    left_out = len(pairs) - len(examples)
    if cut or left_out:
        say(f"{cut} of {len(pairs)} responses are cut at {max_length} tokens, and {left_out} are "
            "left out, for their prompts fill these")
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
    with blame("held-out text"):
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
        batch = collate(encode(tokenizer, prompts[i:i + 32]), model.device, side="left")
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
    [start, *wholes] = encode(tokenizer, [prompt, *(f"{prompt} {answer}" for answer in answers)])
    for whole in wholes:
        wanted = whole[len(start):]
        if tokens[:len(wanted)] == wanted:
            return True
    return False


def prompts_of(task, pairs, tokenizer, config):
    """(prompts, the greatest number of tokens in an answer) of a task. Refuses a prompt that leaves
    too little of the model's positions for an answer: it would write behind their end."""
    prompts, length = [TASKS[task].prompt.format(question) for question, _ in pairs], 64
    if task == "gsm8k":                              # a solution: half of a small model's context
        length = min(512, positions(config) // 2)
    room = positions(config) - length
    for number, ids in enumerate(encode(tokenizer, prompts), 1):
        need(len(ids) <= room, f"{task}, row {number}: a prompt of {len(ids)} tokens and {length} "
             f"for an answer exceed the model's {positions(config)} positions")
    return prompts, length


def check_prompts(tasks, tokenizer, config):
    """Refuse prompts that are too long before any model has been loaded."""
    for task, pairs in tasks.items():
        if role_of(task) != "measure":
            prompts_of(task, pairs, tokenizer, config)


def count_right(model, tokenizer, pairs, task):
    """How many of a task's (question, accepted answers) are answered right."""
    prompts, longest = prompts_of(task, pairs, tokenizer, model.config)
    stops = ["\n", ".", ","]
    if task == "gsm8k":
        stops = ["### Instruction", "Question:"]
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
    and `texts` its held-out text. Without them the model itself is the untouched one.
    FloatingPointError: a score is not finite. A table would have an empty cell."""
    scores, longest = {}, min(1024, positions(model.config))
    for name, pairs in tasks.items():
        if name == "nll":
            scores[name] = mean_nll(model, encode_all(tokenizer, pairs, longest))
        elif name == "prose":
            ids = encode_texts(tokenizer, pairs, longest, "prose")
            scores[name] = mean_nll(model, [{"ids": text, "labels": text} for text in ids])
        elif name == "drift":
            scores[name] = 0.0 if reference is None else drift(model, reference, texts)
        else:
            scores[name] = 100 * count_right(model, tokenizer, pairs, name) / len(pairs)
        if not math.isfinite(scores[name]):
            raise FloatingPointError(f"{name}: the score is {scores[name]}")
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


def shown_score(row, score):
    return f"{score:.4f}" if role_of(row) == "measure" else f"{score:.2f}"


def table(columns):
    """{column: scores} as aligned text. A single column has nothing to be compared with."""
    first = next(iter(columns.values())) if len(columns) > 1 else None
    full = {name: scores | summarise(scores, first) for name, scores in columns.items()}

    def formatted(row):
        return row.map(lambda score: shown_score(row.name, score), "ignore")

    shown = pandas.DataFrame(full).apply(formatted, axis=1)
    shown.index = [shown.index, [UNITS[role_of(row)] for row in shown.index]]        # two columns
    return shown.to_string(na_rep="")


# ---- The command ---------------------------------------------------------------------------------

def one_line_parser(description):
    """An ArgumentParser that raises UserError, and so prints one line without the usage."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, message)
    return parser


def between(kind, low, high=1e9):
    """An argparse type: a number of this kind from `low` to `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:                 # also refuses nan
            raise ArgumentTypeError(f"must be from {low} to {high:g}, not {text}")
        return value
    return number


def check_drift(judged):
    """Refuse to compare what models predict where their tokens are not the same."""
    tokens = {name: (tokenizer.get_vocab(), config.get_text_config().vocab_size)
              for name, (tokenizer, config) in judged.items()}
    untouched, *others = tokens
    for name in others:
        need(tokens[name] == tokens[untouched],
             f"{name} has other tokens than {untouched}: leave drift out of --tasks")


@one_line
def main(arguments=None):
    parser = one_line_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="directory or hub id")
    parser.add_argument("--tasks", help="NAME or NAME=FILE.jsonl, by commas (default: see above)")
    parser.add_argument("--limit", type=between(int, 1), help="the first so many rows of each task")
    options = parser.parse_args(arguments)
    names = options.models
    need(len({*names}) == len(names), "a model is named twice")

    # The untouched model is the base of the first run or adapter, or else the first model.
    runs = [find_model(name)[2] for name in names]
    run = next((run for run in runs if run), {})
    untouched = run.get("model", names[0])
    device, dtype = pick_device(run.get("dtype", "auto"))

    # All names, adapters and rows are judged before the first model is loaded.
    chosen = default_tasks(untouched) if options.tasks is None else options.tasks
    tasks = load_tasks(chosen, options.limit)
    judged = {name: judge(name) for name in {untouched: None, **dict.fromkeys(names)}}
    for tokenizer, config in judged.values():
        check_prompts(tasks, tokenizer, config)
    if "drift" in tasks:
        check_drift(judged)

    reference = texts = None
    if "drift" in tasks:
        reference, tokenizer = load_model(untouched, device, dtype)
        longest = min(256, run.get("calibration_max_tokens", 256), positions(reference.config) - 1)
        texts = held_out(reference, tokenizer, longest)
    columns = {}
    try:
        for name in names:
            model, tokenizer = load_model(name, device, dtype)
            scores = {}
            for task, pairs in tasks.items():
                scores |= evaluate(model, tokenizer, {task: pairs}, reference, texts)
                say(f"{name}: {task} {shown_score(task, scores[task])}")
            columns[name] = scores
    finally:                                         # what has been scored stays
        if columns:
            print(table(columns))


if __name__ == "__main__":
    main()
