"""Score models on what they were trained for and on what they knew before.

    python eval.py tiny runs/mine --tasks gsm8k=tiny/test.jsonl,facts,sums,drift
    python eval.py Qwen2.5-1.5B runs/mine --tasks gsm8k,nq_open,webqs,triviaqa,drift --limit 500

This prints a table with one column per model and one row per task. A model is a run directory of
train_math.py, a PEFT adapter's directory, a checkpoint directory, a hub id, or a short name
(Qwen2.5-1.5B). The data of a task comes from the hub, or from a file as in nq_open=dev.jsonl.

    gsm8k               target: the model answers greedily, and the number after "The answer is:"
                        is compared, as in CorDA
    nll                 the loss per token of GSM8K's reference solutions, in nat
    nq_open, triviaqa   preservation: exact match, by the prompts and rules of lm-eval 0.4.13
    webqs               preservation: 1 if an accepted answer is the greedy continuation, as lm-eval
    facts, sort, reverse, sums   preservation: what tiny/ was pretrained on, asked as in nq_open
    drift               KL(untouched || this model) per token, in nat, on held-out text that the
                        untouched model wrote

The rows below are Avg1, the mean preservation score; Avg1(%), relative to the first column; Avg2,
the mean target score; GM, the root of Avg1 times Avg2. train_math.py shares what this file holds.
"""
import argparse
import functools
import importlib
import json
import os
import re
import string
import sys
import traceback
from pathlib import Path

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import folora

TINY = Path(__file__).resolve().parent / "tiny"
OWNERS = {"Qwen": "Qwen/", "Llama": "meta-llama/", "SmolLM": "HuggingFaceTB/"}     # of short names
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n### Response:")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Each task has a role and a source: a hub id with configuration and split, or a file.
TASKS = {
    "gsm8k": ("target", "openai/gsm8k", "main", "test"),
    "nq_open": ("preserve", "google-research-datasets/nq_open", None, "validation"),
    "triviaqa": ("preserve", "mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "webqs": ("preserve", "stanfordnlp/web_questions", None, "test"),
    "nll": ("measure", "openai/gsm8k", "main", "test"), "drift": ("measure", None, None, None)}
TASKS |= {name: ("preserve", str(TINY / f"{name}.jsonl"), None, None)
          for name in ("facts", "sort", "reverse", "sums")}
UNITS = {"target": "target, %", "preserve": "preserved, %", "measure": "nat/token", "": ""}
HELD_OUT_SEED, HELD_OUT_SAMPLES = 1000, 16
LOGITS = 2 ** 27          # At most so many logits are computed at a time: half a GB in float32.
# Of the scores that lm-eval gives a task, the first in this list is shown, else the task's first.
HARNESS_SCORES = ("HasAns_exact", "prompt_level_strict_acc", "pass@1", "pass_at_1", "exact_match",
                  "em", "acc")
# lm-eval's tasks that begin so count as target tasks, all others as preservation.
HARNESS_TARGETS = ("humaneval", "mbpp", "gsm8k", "hendrycks_math", "minerva_math")
# How torch and safetensors report a full disk or memory, for which they have no error types.
FULL = re.compile(r"CPUAllocator|PytorchStreamWriter|inline_container|\(os error (12|27|28)\)")
CODE_ALLOWED = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"


# ---- errors and files ----------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that the user can mend. Its text is one line."""


def need(condition, message):
    if not condition:
        raise UserError(message)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refuse(what, error):
    """Raise UserError with the first line of an error. The hub alone raises a dozen types."""
    raise UserError(f"{what}: {first_line(error)}") from error


def is_the_users(error):
    """Whether the user can mend an error. That includes what folora.py raises by itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (isinstance(error, (UserError, OSError, MemoryError, torch.OutOfMemoryError,
                               FloatingPointError, KeyboardInterrupt)) or FULL.search(str(error))
            or last.filename == folora.__file__ and last.line.startswith("raise "))


def one_line(main):
    """Let main end in one line on stderr and exit status 2 if the user can mend the error, and in
    status 1 if a run failed by itself (FloatingPointError). Other errors keep their traceback."""
    @functools.wraps(main)
    def guarded(arguments=None):
        try:
            return main(arguments)
        except (Exception, KeyboardInterrupt) as error:
            if not is_the_users(error):
                raise
            full = "is the disk full, or the memory? " if FULL.search(str(error)) else ""
            stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
            status = 1 if isinstance(error, FloatingPointError) else 2
        tqdm.write(full + stopped, file=sys.stderr)  # the bars of the failed main are closed by now
        sys.exit(status)
    return guarded


@functools.cache
def reach_hub():
    """Ask once whether the hub can be reached. If not, its clients would repeat every request for
    half a minute; in offline mode they use what has been downloaded before, or fail at once."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


# ---- models --------------------------------------------------------------------------------------

def is_tiny(name):
    return name == "tiny" or Path(name).resolve() == TINY


def run_options(name):
    """The options of a finished run, or {} if this is not its directory."""
    finished = (Path(name) / "summary.json").exists()
    return json.loads((Path(name) / "config.json").read_text())["options"] if finished else {}


def adapter_of(name):
    """The directory of a MODEL's PEFT adapter, or None. Of a run it counts if nothing is merged."""
    path = Path(name)
    path = path / "adapter" if run_options(name) and not (path / "merged").exists() else path
    return path if (path / "adapter_config.json").exists() else None


def base_of(name):
    """The model that a run or an adapter started from, or None."""
    config = adapter_of(name) and json.loads((adapter_of(name) / "adapter_config.json").read_text())
    return run_options(name).get("model") or config and config["base_model_name_or_path"]


def resolve_model(name):
    """The directory or hub id with the weights of a MODEL, without its adapter if it has one."""
    if adapter_of(name):
        return resolve_model(base_of(name))
    path = TINY if name == "tiny" else Path(name)
    if path.exists():
        path = path / "merged" if run_options(path) else path
        need((path / "tokenizer_config.json").exists(), f"{name}: neither a checkpoint, nor a PEFT "
             "adapter, nor a finished run (one that was interrupted?)")
        return str(path)
    owner = "" if "/" in name else OWNERS.get(re.match("[A-Za-z]*", name)[0], "")
    need(re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", owner + name),
         f"{name}: no such directory, and no short name (Qwen2.5-1.5B) or hub id (owner/name)")
    return owner + re.sub("^Llama-2-7b$", "Llama-2-7b-hf", name)


def pick_device(device, dtype):
    """torch's device and dtype; auto: bfloat16 on a GPU if there is one, else float32 on a CPU."""
    count = torch.cuda.device_count()
    device = device.replace("auto", "cuda" if count else "cpu")
    need(re.fullmatch(r"cpu|cuda(:\d+)?", device), f"--device {device}: it is cpu, cuda or cuda:1")
    need(device == "cpu" or int(device[5:] or 0) < count,
         f"--device {device}: this torch sees {count or 'no'} CUDA GPU; use --device cpu")
    dtype = dtype.replace("auto", "float32" if device == "cpu" else "bfloat16")
    return torch.device(device), DTYPES[dtype]


@torch.no_grad()
def add_adapter(model, folder):
    """Add scaling * B A of a PEFT adapter to the weights, in float32, and round once."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors", str(model.device))
    changed = re.match("pissa|olora|corda|loftq|lora_ga", str(config.get("init_lora_weights")))
    need(not changed and not config.get("alpha_pattern"), "an alpha_pattern, or a start that has "
         "changed the base, is not supported: merge it with PEFT")
    for key in [key for key in weights if key.endswith(".lora_A.weight")]:
        A, B = (weights.pop(key.replace("lora_A", side)).float() for side in ("lora_A", "lora_B"))
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = config["lora_alpha"] / len(A) ** (0.5 if config.get("use_rslora") else 1) * B @ A
        weight = model.get_submodule(name).weight
        weight.copy_(weight + (update.T if config.get("fan_in_fan_out") else update))
    need(not weights, f"more than LoRA: {next(iter(weights), '')} (merge it with PEFT)")


def load_model(name, device, dtype):
    """(model, tokenizer), ready for inference."""
    where, adapter = resolve_model(name), adapter_of(name)
    try:
        if adapter:
            model, tokenizer = load_model(base_of(name), device, dtype)
            add_adapter(model, adapter)
            return model, tokenizer
        if not Path(where).exists():
            reach_hub()
        tokenizer = AutoTokenizer.from_pretrained(where)
        model, info = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:
        refuse(f"cannot load the model {adapter or where}", error)
    for problem, weights in info.items():            # missing_keys, unexpected_keys and so on
        need(not weights, f"{where}: {problem} in the weights, such as {next(iter(weights), '')}")
    return model.to(device).eval(), tokenizer


def positions(model):
    """The greatest number of tokens in a text that the model was made for."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


# ---- data ----------------------------------------------------------------------------------------

def read_rows(source, config=None, split="train", limit=None):
    """The rows (dicts) of a .jsonl file or of a hub data set. The lines of a file are those of its
    bytes, because a text may hold U+2028 and other line separators."""
    rows, problem = [], f"{source}: no such file or hub data set can be read"
    try:
        if source.endswith((".jsonl", ".json")):
            for number, line in enumerate(Path(source).read_bytes().strip().splitlines(), 1):
                problem = f"{source}, line {number}: not JSON with fields, {{...}}, in UTF-8"
                rows.append({**json.loads(line.decode("utf-8-sig"))})
        else:
            reach_hub()
            rows = list(datasets.load_dataset(source, config, split=split))
    except Exception as error:
        refuse(problem, error)
    need(rows, f"{source}: no rows")
    return rows[:limit]


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def field(row, names, source, number):
    """The text in the first of the fields `names` that is not empty."""
    text = next((row[name] for name in names if row.get(name)), None)
    need(is_text(text), f"{source}, line {number}: no field called {' or '.join(names)} with a "
         f"text in it; it has: {', '.join(row)}")
    return text


def given_texts(source, limit):
    """The texts of a .jsonl file or of a hub data set."""
    rows = enumerate(read_rows(source, limit=limit), 1)
    return [field(row, ("text", "question"), source, number) for number, row in rows]


def to_pairs(rows, source):
    """[(instruction, response)]. GSM8K's "#### 18" becomes "The answer is: 18", as in MetaMathQA,
    and its <<calculator>> notes are removed."""
    pairs = []
    for number, row in enumerate(rows, 1):
        task = field(row, ("question", "query", "instruction", "problem"), source, number)
        task += f"\n{row['input']}" if row.get("input") else ""
        response = field(row, ("answer", "response", "output", "solution"), source, number)
        response = re.sub(r"<<[^<>]*>>", "", response)
        pairs.append((task, re.sub(r"\n#### *(.+)\s*$", r"\nThe answer is: \1", response)))
    return pairs


def answers_of(row, source, number):
    """The accepted answers: the list of NQ-Open or WebQuestions, or TriviaQA's aliases."""
    answers = row.get("answers") or row.get("answer")
    answers = answers.get("aliases") if isinstance(answers, dict) else answers
    texts = list(filter(is_text, answers if isinstance(answers, list) else [answers]))
    need(texts, f"{source}, line {number}: no field called answers or answer with a text in it")
    return texts


def to_questions(rows, source):
    """[(question, accepted answers)]."""
    return [(field(row, ("question",), source, number), answers_of(row, source, number))
            for number, row in enumerate(rows, 1)]


def prompt_of(instruction, maths):
    """The Alpaca prompt, for maths with CorDA's addition. Training and scoring use the same one."""
    return ALPACA.format(instruction) + " Let's think step by step." * maths


def encode_all(tokenizer, pairs, max_length):
    """[{"ids", "labels"}]. The prompt has labels of -100, which bear no loss; the response and the
    end of sequence do. An example whose prompt alone fills max_length is left out."""
    examples = []
    for instruction, response in pairs:
        prompt = prompt_of(instruction, "The answer is:" in response)
        # Both are tokenised with the same start of text. The space begins a new token.
        start, ids = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {response}"))
        ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
        if len(start) < max_length:
            labels = [-100] * len(start) + ids[len(start):max_length]
            examples.append({"ids": ids[:max_length], "labels": labels})
    dropped = f"{len(pairs) - len(examples)} of {len(pairs)} examples"
    need(2 * len(examples) >= len(pairs), f"{dropped} have prompts that fill --max-length "
         f"{max_length}: raise it")
    if len(examples) < len(pairs):
        tqdm.write(f"{dropped} are left out: their prompts fill {max_length} tokens", sys.stderr)
    return examples


def collate(examples, device, side="right"):
    """A padded batch of encoded examples, or of token lists, which are their own labels."""
    examples = [e if isinstance(e, dict) else {"ids": e, "labels": e} for e in examples]
    ids, labels = ([torch.LongTensor(e[key]) for e in examples] for key in ("ids", "labels"))
    pad = lambda rows, fill: torch.nn.utils.rnn.pad_sequence(rows, True, fill, side).to(device)
    return {"input_ids": pad(ids, 0), "attention_mask": pad([torch.ones_like(i) for i in ids], 0),
            "labels": pad(labels, -100)}


def by_length(examples, batch_size, length=len):
    """Batches of similar length, the longest first, so that a lack of memory shows at once."""
    ordered = sorted(examples, key=length, reverse=True)
    return [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]


def process():
    """(rank, world size) of torch.distributed, or (0, 1) if it does not run."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def share(items):
    """This process's share of the items."""
    return items[process()[0]::process()[1]]


def mean(total, count):
    """total / count, both summed over the processes."""
    both = torch.tensor([total, count], dtype=torch.float64)
    if process()[1] > 1:
        dist.all_reduce(both)
    return (both[0] / both[1]).item()


# ---- loss and drift ------------------------------------------------------------------------------

def label_states(model, batch):
    """(hidden states, labels) at the positions that predict a label, so that the output layer need
    not run at the others. Position t predicts token t + 1."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden, labels = model.get_decoder()(**inputs, use_cache=False)[0], batch["labels"][:, 1:]
    return hidden[:, :-1][labels != -100], labels[labels != -100]


class BodyOutput(tuple):
    """What a model's body returns: (hidden states,). Whatever else a head looks for is None."""

    def __getattr__(self, name):
        return self[0] if name == "last_hidden_state" else None


def logits_of(model, states):
    """The logits at these hidden states, in float32. The model's own forward computes them, without
    its body, because some models scale or cap what the output layer gives."""
    body, nothing = model.get_decoder(), torch.zeros(1, 1, dtype=torch.long, device=states.device)
    body.forward = lambda *args, **kwargs: BodyOutput([states[None]])
    try:
        return model(nothing).logits[0].float()
    finally:
        del body.forward                             # the class has the real one


def pieces(model, *tensors):
    """The tensors' rows in pieces of at most LOGITS logits, which would take most of the memory."""
    size = max(1, LOGITS // model.get_output_embeddings().weight.shape[0])
    return list(zip(*(tensor.split(size) for tensor in tensors)))


def summed_nll(model, batch):
    """The sum of the losses at the batch's labels, in nat. If there are several pieces, their
    logits are computed again in the backward pass instead of being kept."""
    nll = lambda states, labels: F.cross_entropy(logits_of(model, states), labels, reduction="sum")
    parts = pieces(model, *label_states(model, batch))
    if len(parts) == 1:
        return nll(*parts[0])
    return sum(checkpoint(nll, *part, use_reentrant=False) for part in parts)


@torch.inference_mode()
def mean_nll(model, examples, batch_size=8):
    """The mean loss per response token of encoded examples, in nat."""
    total = count = 0
    batches = by_length(share(examples), batch_size, lambda e: len(e["ids"]))
    for batch in tqdm(batches, desc="nll", leave=False):
        total += summed_nll(model, collate(batch, model.device)).item()
        count += sum(label != -100 for e in batch for label in e["labels"][1:])
    return mean(total, count)


def summed_kl(log_p, model, states):
    """The sum over positions of KL(p || the model's distribution), in nat."""
    log_q = logits_of(model, states).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


@torch.inference_mode()
def drift(model, reference, texts, batch_size=4):
    """The mean of KL(reference || model) over all next-token positions of the texts, in nat."""
    total = count = 0
    batches = by_length([text.tolist() for text in share(texts)], batch_size)
    for batch in tqdm(batches, desc="drift", leave=False):
        batch = collate(batch, model.device)
        states = (label_states(m, batch)[0] for m in (reference, model))
        for theirs, ours in pieces(model, *states):
            log_p = logits_of(reference, theirs).log_softmax(-1)
            total += summed_kl(log_p, model, ours).item()
            count += len(ours)
    return mean(total, count)


def held_out(model, tokenizer, max_new_tokens, samples=HELD_OUT_SAMPLES, seed=HELD_OUT_SEED):
    """Text that the model writes and that calibration never sees, because its seed differs."""
    bar = tqdm(total=samples, desc="held-out text", leave=False)
    return folora.sample_calibration(model, tokenizer, samples, min(128, max_new_tokens),
                                     max_new_tokens, seed=seed, progress=bar.update)


# ---- answers -------------------------------------------------------------------------------------

@torch.inference_mode()
def greedy(model, tokenizer, prompts, max_new_tokens, stops=(), desc=None):
    """The greedy continuation (a token list) of each prompt. generate takes every option that a
    call leaves open, such as beams or a repetition penalty, from the checkpoint's
    generation_config. folora.plain_mode sets it aside; only its end-of-sequence tokens are used."""
    encoded, out = [tokenizer(prompt)["input_ids"] for prompt in prompts], {}
    longest = max(map(len, encoded), default=0) + max_new_tokens
    need(longest <= positions(model), f"{desc}: a prompt and its answer take {longest} tokens, and "
         f"the model was made for {positions(model)}")
    how = dict(do_sample=False, max_new_tokens=max_new_tokens, stop_strings=list(stops) or None,
               tokenizer=tokenizer, pad_token_id=tokenizer.eos_token_id,
               eos_token_id=model.generation_config.eos_token_id)
    batches = by_length(range(len(prompts)), 32, lambda i: len(encoded[i]))
    for batch in tqdm(batches, desc=desc, leave=False):
        inputs = collate([encoded[i] for i in batch], model.device, "left")
        width = inputs.pop("labels").shape[1]
        with folora.plain_mode(model):
            rows = model.generate(**inputs, **how)
        out.update(zip(batch, rows[:, width:].tolist()))
    return [out[i] for i in range(len(prompts))]


def exact_match(text, answers, articles=True):
    """lm-eval's exact_match. nq_open removes articles, before the text is put in lower case."""
    def normal(text):
        text = re.sub(r"\b(?:The |the |An |A |The |a |an )", "", text) if articles else text
        return text.lower().translate(str.maketrans("", "", string.punctuation))
    return normal(text) in map(normal, answers)


def until(text, stops):
    """The text before the first stop, without surrounding white space."""
    return text[:min([text.find(s) for s in stops if s in text], default=len(text))].strip()


def shortest_prefixes(answers):
    """webqs drops an answer that begins with another accepted one."""
    return [answer for answer in sorted(set(answers))
            if not any(answer.startswith(other) for other in answers if other != answer)]


def final_number(text):
    """The number after the last "The answer is:", or None."""
    _, marker, stated = text.rpartition("The answer is:")
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", stated if marker else "")
    return float(found.group().replace(",", "")) if found else None


# ---- tasks: each returns whether each pair is answered right -------------------------------------

def score_questions(model, tokenizer, pairs, task):
    """nq_open, triviaqa, tiny's facts and skills. No accepted answer is longer than 64 tokens."""
    trivia, stops = task == "triviaqa", ("\n", ".", ",")
    form = "Question: {}?\nAnswer:" if trivia else "Answer these questions:\n\nQ: {}?\nA:"
    tokens = greedy(model, tokenizer, [form.format(q) for q, _ in pairs], 64, stops, task)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [exact_match(until(t, stops), some, not trivia) for t, (_, some) in zip(texts, pairs)]


def score_webqs(model, tokenizer, pairs, task):
    """Every token of an answer is the likeliest one if and only if the greedy continuation of the
    prompt begins with these tokens."""
    prompts, choices = [f"Question: {question}\nAnswer:" for question, _ in pairs], []
    for prompt, (_, answers) in zip(prompts, pairs):
        start, *whole = (tokenizer(prompt + end)["input_ids"]
                         for end in ("", *(f" {a}" for a in shortest_prefixes(answers))))
        choices.append([ids[len(start):] for ids in whole])
    longest = max((len(tokens) for some in choices for tokens in some), default=1)
    written = greedy(model, tokenizer, prompts, longest, desc=task)
    return [any(w[:len(tokens)] == tokens for tokens in some) for w, some in zip(written, choices)]


def score_gsm8k(model, tokenizer, pairs, task):
    """At most 512 new tokens, and half of a small model's context."""
    longest, stops = min(512, positions(model) // 2), ("### Instruction", "Question:")
    prompts = [prompt_of(question, True) for question, _ in pairs]
    tokens = greedy(model, tokenizer, prompts, longest, stops, task)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [final_number(t) == final_number(answer) for t, (_, answer) in zip(texts, pairs)]


def default_tasks(model):
    """What is scored if --tasks says nothing."""
    tiny = f"gsm8k={TINY / 'test.jsonl'},facts,sort,reverse,sums,drift"
    return tiny if is_tiny(model) else "gsm8k,nq_open,webqs,triviaqa,drift"


def load_tasks(names, limit=None):
    """{task: pairs} of "gsm8k,nq_open=dev.jsonl,drift". All data is read and checked now, so that a
    mistake in it does not show after an hour."""
    tasks = {}
    for name, _, path in (item.partition("=") for item in names.split(",") if item):
        need(name in TASKS, f"unknown task {name}: there are {', '.join(TASKS)}")
        kind, source, config, split = TASKS[name]
        source = path or source
        rows = read_rows(source, config, split, limit) if source else []
        tasks[name] = (to_questions if kind == "preserve" else to_pairs)(rows, source)
        for number, (_, answer) in enumerate(tasks[name], 1):
            need(name != "gsm8k" or final_number(answer) is not None, f"{source}, line {number}: "
                 'its answer has no number after #### or "The answer is:"')
    return tasks


def evaluate(model, tokenizer, tasks, reference=None, texts=None):
    """{task: score}, in per cent, or in nat for nll and drift. `reference` is the untouched model
    and `texts` its held-out text. Without them the model itself is the untouched one."""
    scores, score = {}, {"gsm8k": score_gsm8k, "webqs": score_webqs}
    for name, pairs in tasks.items():
        if name == "nll":
            examples = encode_all(tokenizer, pairs, min(1024, positions(model)))
            scores[name] = mean_nll(model, examples)
        elif name == "drift":
            scores[name] = drift(model, reference, texts) if reference is not None else 0.0
        else:
            right = score.get(name, score_questions)(model, tokenizer, share(pairs), name)
            scores[name] = 100 * mean(sum(right), len(right))
    return scores


# ---- lm-eval -------------------------------------------------------------------------------------

def lm_eval(module):
    """A module of lm-eval, which is optional."""
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        refuse("--harness needs lm-eval: pip install lm-eval==0.4.13", error)


def harness_tasks(names, metadata=None):
    """(lm-eval's task manager, task names) of --harness. Each must have a score of its own: tags
    and some groups only stand for several tasks. FOLDER/NAME is a task with a YAML file there."""
    folders, names = zip(*(name.rpartition("/")[::2] for name in names.split(",")))
    folders = [folder for folder in folders if folder]
    manager = lm_eval("tasks").TaskManager(include_path=folders or None, metadata=metadata)
    groups = [group for group in manager.all_groups
              if manager.task_index[group].cfg.get("aggregate_metric_list")]
    for name in names:
        need(name in manager.all_subtasks + groups, f"lm-eval has no task {name} with a score of "
             "its own: lm-eval ls tasks lists them, and FOLDER/NAME is one of yours")
        need(CODE_ALLOWED or not name.startswith(("humaneval", "mbpp")), f"{name} runs code that "
             "the model writes: set HF_ALLOW_CODE_EVAL=1 to allow it")
    reach_hub()
    try:
        manager.load(list(names))
    except Exception as error:                       # data out of reach, or a package is missing
        refuse(f"lm-eval cannot load {','.join(names)} (pip install lm-eval[ifeval,math] has what "
               "ifeval and mathematics need)", error)
    return manager, list(names)


def harness(model, tokenizer, manager, names, limit=None):
    """{task: per cent} by lm-eval, with the examples, prompt and stops of its configuration."""
    size = "auto" if model.device.type == "cuda" else 8
    wrapped = lm_eval("models.huggingface").HFLM(model, tokenizer=tokenizer, batch_size=size)
    done = lm_eval("evaluator").simple_evaluate(
        wrapped, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0,
        log_samples=False, confirm_run_unsafe_code=CODE_ALLOWED)
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
    full = {name: {**scores, **summarise(scores, first)} for name, scores in columns.items()}
    rows = list(dict.fromkeys(row for scores in full.values() for row in scores))
    label, width = (max(map(len, names)) + 2 for names in ([*rows, " " * 8], [*full, " " * 10]))
    lines = [" " * (label + 14) + "".join(f"{name:>{width}}" for name in full)]
    for row in rows:
        lines += ["-" * len(lines[0])] * (row == "Avg1")
        digits = 4 if role(row) == "measure" else 2
        cells = [f"{scores[row]:.{digits}f}" if row in scores else "" for scores in full.values()]
        start = f"{row:{label}}{UNITS[role(row)]:14}"
        lines.append(start + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


@one_line
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, parser.error = parser.add_argument, lambda message: need(False, message)
    add("models", nargs="+", metavar="MODEL", help="directory (run, adapter, checkpoint) or hub id")
    add("--tasks", help=f"NAME or NAME=FILE.jsonl, by commas (default: {default_tasks('Qwen')}; "
        "tiny has its own)")
    add("--harness", metavar="NAMES", help="lm-eval's tasks, by commas: mmlu,ifeval,humaneval...")
    add("--harness-metadata", type=json.loads, metavar="JSON",
        help="for tasks that take it: babilong_longctx with '{\"max_seq_lengths\": \"4k\"}'")
    add("--limit", type=int, help="the first so many rows of each task (default: all)")
    add("--dtype", choices=["auto", *DTYPES], help="default: the run's, else auto")
    add("--device", default="auto", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    options, columns, loaded = parser.parse_args(arguments), {}, None
    need(options.limit is None or options.limit > 0, "--limit must be at least 1")
    need(options.tasks != "" or options.harness, "nothing to score: give --tasks or --harness")
    for name in options.models:
        resolve_model(name)                          # wrong names show before the first hour
    bases = [base_of(name) for name in options.models]
    run = next(filter(None, map(run_options, options.models)), {})
    device, dtype = pick_device(options.device, options.dtype or run.get("dtype", "auto"))
    extra = options.harness and harness_tasks(options.harness, options.harness_metadata)
    names = default_tasks(bases[0] or options.models[0]) if options.tasks is None else options.tasks
    tasks, reference, texts = load_tasks(names, options.limit), None, None
    try:
        for name, base in zip(options.models, bases):
            model, tokenizer = load_model(name, device, dtype)
            source = base or next(filter(None, bases), options.models[0])
            if "drift" in tasks and source != loaded:
                reference, _ = load_model(source, device, dtype)
                length = min(run.get("calibration_max_tokens", 256), 256, positions(reference) - 1)
                texts, loaded = held_out(reference, tokenizer, length), source
            scores = columns[name.rstrip("/")] = evaluate(model, tokenizer, tasks, reference, texts)
            if extra:
                scores.update(harness(model, tokenizer, *extra, options.limit))
    finally:                                         # a model that fails does not cost the others
        if columns:
            print(table(columns))


if __name__ == "__main__":
    main()
