"""Make the embedded model and its data: a small world whose whole pretraining text is known.

    python tiny/make_tiny.py                     # remakes all of tiny/, in 25 minutes on 2 cores
    python tiny/make_tiny.py --data-only         # remakes the JSONL files only, in a second
    python tiny/make_tiny.py --documents 2000 --kinds biography,quiz > calibration.jsonl

The last command prints text of the pretraining distribution. Its world has 80 invented people with
four facts each, told and asked in several ways, and three skills: sorting words, reversing words,
plain sums. Stories of one step are there too, so that the model knows the words of a word problem
as any real model does. The target task, problems of two steps in GSM8K's form, is *not* part of
pretraining, so fine-tuning on it can be watched damaging what was known. All strings are invented.

The checkpoint is model.safetensors, config.json and tokenizer.json. The word problems (question,
answer) are in train.jsonl and test.jsonl. What the model knows is asked in facts.jsonl, sort.jsonl,
reverse.jsonl and sums.jsonl, where the answer is a list as in NQ-Open.
"""
import json
import math
import random
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEOPLE, CONTEXT, BATCH, LEARNING_RATE = 80, 256, 16, 2.5e-3
VOCABULARY, HIDDEN, LAYERS, INTERMEDIATE, HEADS = 1024, 192, 5, 512, 6   # This is 2.4M parameters.

SYLLABLES = ("ba be bo da do du fa fe ga go ha ho ja jo ka ke ki ko la le lo lu ma me mi mo na ne "
             "no pa pe po ra re ri ro sa se so ta te to tu va ve vi za zo").split()
TOWNS = ("Arvale Brenick Coldmere Dunlow Estory Farwick Glenby Harrowin Istmoor Jarlow Kestrin "
         "Lowmark Marsley Norwin Oakham Pellby Quarley Rivton Saltby Thornley").split()
JOBS = ("baker carpenter dentist farmer gardener jeweller lawyer miller nurse painter pilot "
        "plumber sailor singer tailor teacher weaver writer").split()
PETS = ("cat crow dog duck ferret goat goose hamster hedgehog horse lizard parrot pig pony rabbit "
        "snail tortoise turtle").split()
COLOURS = ("amber black blue brown coral gold green grey indigo ivory olive orange pink purple red "
           "silver teal white").split()
WORDS = ("anchor apple arrow basket bell boat bottle branch bread bridge bucket button candle "
         "carpet castle chair cloud coin copper corner desk door drum engine feather fence field "
         "flower forest garden glass hammer hill island jacket kettle ladder lamp leaf lemon "
         "letter market mirror needle ocean onion paper pencil pepper pillow plate pocket river "
         "road rope salt shadow ship shoe spoon stone street sugar table thunder tower train "
         "tunnel valley village wagon wheel window winter").split()
NAMES = ("Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa "
         "Sam Tina Will").split()
THINGS = "apples books cards cookies eggs flowers marbles pens shells stamps stickers toys".split()
ANSWER_FIRST = "Answer these questions:\n\n"         # Prompts of lm-eval's nq_open begin like this.
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n### Response:")

# Each attribute has values, statements and questions. {p} is the person, {v} the value and answer.
FACTS = {
    "born": (TOWNS, ["{p} was born in {v}.", "The birthplace of {p} is {v}.",
                     "{v} is where {p} was born.", "{p} comes from the town of {v}."],
             ["where was {p} born", "what is the birthplace of {p}",
              "which town does {p} come from"]),
    "job": (JOBS, ["{p} works as a {v}.", "The job of {p} is {v}.",
                   "{p} is a {v} by trade.", "People know {p} as a {v}."],
            ["what is the job of {p}", "what does {p} work as", "what is {p} by trade"]),
    "pet": (PETS, ["{p} keeps a {v}.", "The pet of {p} is a {v}.",
                   "At home, {p} has a {v}.", "A {v} lives with {p}."],
            ["what pet does {p} keep", "what is the pet of {p}", "which animal lives with {p}"]),
    "colour": (COLOURS, ["{p} likes the colour {v}.", "The favourite colour of {p} is {v}.",
                         "{p} always wears {v}.", "Of all colours, {p} prefers {v}."],
               ["what is the favourite colour of {p}", "which colour does {p} like",
                "which colour does {p} always wear"]),
}


def make_world(seed=0):
    """Invent PEOPLE people and return {person: {attribute: value}}."""
    rng, world = random.Random(seed), {}
    while len(world) < PEOPLE:
        first, last = ("".join(rng.choice(SYLLABLES) for _ in range(2)).capitalize()
                       for _ in range(2))
        world[f"{first} {last}"] = {a: rng.choice(values) for a, (values, _, _) in FACTS.items()}
    return world


def ask_fact(rng, world):
    person, attribute = rng.choice(list(world)), rng.choice(list(FACTS))
    return rng.choice(FACTS[attribute][2]).format(p=person), world[person][attribute]


def ask_sort(rng, world=None):
    words = rng.sample(WORDS, 3)
    return "sort these words: " + " ".join(words), " ".join(sorted(words))


def ask_reverse(rng, world=None):
    words = rng.sample(WORDS, rng.choice((3, 4)))
    return "reverse these words: " + " ".join(words), " ".join(reversed(words))


def ask_sum(rng, world=None):
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    if rng.random() < 0.5:
        return f"what is {a} + {b}", str(a + b)
    return f"what is {max(a, b)} - {min(a, b)}", str(max(a, b) - min(a, b))


SKILLS = {"sort": ask_sort, "reverse": ask_reverse, "sums": ask_sum}


def biography(rng, world):
    p = rng.choice(list(world))
    attributes = rng.sample(list(FACTS), len(FACTS))
    return " ".join(rng.choice(FACTS[a][1]).format(p=p, v=world[p][a]) for a in attributes) + "\n\n"


def quiz(rng, world):
    ask = rng.choices([ask_fact, *SKILLS.values()], [5, 1.2, 1.2, 2])[0]
    question, answer = ask(rng, world)
    return f"Q: {question}?\nA: {answer}\n"


def exercise(rng, world):
    """Ask for a skill, or tell a story of one step, in the Alpaca form."""
    if rng.random() < 0.6:
        question, answer = tell(rng)
        answer += f"\nThe answer is: {re.findall('[0-9]+', answer)[-1]}"
    else:
        question, answer = rng.choice(list(SKILLS.values()))(rng)
        question = question[0].upper() + question[1:] + rng.choice((".", ""))
    return (ALPACA.format(question) + rng.choice((" ", " Let's think step by step. "))
            + f"{answer}\n\n")


def drill(rng, world):
    """Show a sum of one or two steps, or a line of the small multiplication table."""
    n, m, more = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 60)
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    first, value = rng.choice(((f"{n} x {m}", n * m), (f"{a} + {b}", a + b),
                               (f"{max(a, b)} - {min(a, b)}", abs(a - b))))
    second = (f"{value} - {more} = {value - more}" if value > more and rng.random() < 0.5
              else f"{value} + {more} = {value + more}")
    return f"{first} = {value}" + rng.choice(("\n", f". {second}\n"))


def tell(rng):
    """Return a question and its answer, of one step at most, in the words of word_problem."""
    p, q = rng.sample(NAMES, 2)
    t, u = rng.sample(THINGS, 2)
    a, b = rng.randint(12, 80), rng.randint(5, 60)
    c, n, m = rng.randint(2, a - 1), rng.randint(2, 9), rng.randint(2, 9)
    plus, minus, times = f"{a} + {b} = {a + b}", f"{a} - {c} = {a - c}", f"{n} x {m} = {n * m}"
    has, many = f"{p} has {a} {t}", f"How many {t}"
    return rng.choice((
        (f"{has} and {q} has {b} {u}. {many} does {p} have?", f"{has}."),
        (f"{p} had {b} {u} before and has {a} {t} now. How many {u} did {p} have?",
         f"{p} had {b} {u}."),
        (f"{has}. {p} gets {b} more. {many} does {p} have now?", f"{p} has {plus} {t}."),
        (f"{has} and then gives {c} to {q}. {many} are left?", f"Then {minus} {t} are left."),
        (f"{has} and {q} has {b} more than {p}. {many} does {q} have?", f"{q} has {plus} {t}."),
        (f"{has} and {q} has {b} {t}. {many} do they have together?",
         f"Together they have {plus} {t}."),
        (f"{p} buys {n} boxes with {m} {t} in each box. {many} are in the boxes?",
         f"The boxes hold {times} {t}."),
        (f"{p} packs {n} bags of {m} {t}. {many} does {p} have in total?",
         f"{p} packs {times} {t}."),
        (f"{q} has {a} {t}. {p} takes {c} of them away. How many are left?",
         f"After that {minus} are left."),
        (f"A shop has {a} {t}. It sells {c} on Monday. {many} does the shop have then?",
         f"After Monday it has {minus} {t}."),
        (f"The shop has {a} {t} and receives {b} on Tuesday. {many} does it have in total?",
         f"After Tuesday it has {plus} {t}."),
        (f"{p} buys {b} {t} and had {a} before. {many} does {p} have in total?",
         f"In total {p} has {plus} {t}."),
    ))


def story(rng, world):
    return rng.choice((" ", "\n")).join(tell(rng)) + "\n\n"


# Each kind of document has its share of all documents, how one opens, and what it is made of.
KINDS = {"biography": (0.12, "", biography), "quiz": (0.28, ANSWER_FIRST, quiz),
         "exercise": (0.28, "", exercise), "drill": (0.10, "", drill), "story": (0.22, "", story)}


def document(rng, world, tokenizer, kinds=tuple(KINDS)):
    """Join pieces of one kind to a document that fits into CONTEXT together with BOS and EOS."""
    _, opening, piece = KINDS[rng.choices(kinds, [KINDS[k][0] for k in kinds])[0]]
    length, text = rng.randint(150, CONTEXT - 12), opening
    while True:
        longer = text + piece(rng, world)
        if len(tokenizer.encode(longer, add_special_tokens=False)) > length:
            return text
        text = longer


def word_problem(rng, world):
    """Return a problem of two steps in GSM8K's form, with <<a+b=c>> notes and "#### N"."""
    p, q = rng.sample(list(world), 2)
    t, a, b = rng.choice(THINGS), rng.randint(12, 60), rng.randint(5, 35)
    c, n, m = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    has, many = f"{p} has {a} {t}", f"How many {t}"
    note = lambda x, sign, y, z: f"{x} {sign} {y} = <<{x}{sign.replace('x', '*')}{y}={z}>>{z}"
    kind = rng.randrange(5)
    if kind == 0:
        d = rng.randint(2, a + b - 1)
        question = f"{has}. {p} gets {b} more and then gives {d} to {q}. {many} does {p} have now?"
        steps, result = (f"{p} has {note(a, '+', b, a + b)} {t}.\n"
                         f"Then {note(a + b, '-', d, a + b - d)} {t} are left."), a + b - d
    elif kind == 1:
        question = f"{has} and {q} has {b} more than {p}. {many} do they have together?"
        steps, result = (f"{q} has {note(a, '+', b, a + b)} {t}.\n"
                         f"Together they have {note(a, '+', a + b, 2 * a + b)} {t}."), 2 * a + b
    elif kind == 2:
        question = (f"{p} buys {n} boxes with {m} {t} in each box. {p} had {a} {t} before. "
                    f"{many} does {p} have in total?")
        steps, result = (f"The boxes hold {note(n, 'x', m, n * m)} {t}.\n"
                         f"In total {p} has {note(a, '+', n * m, a + n * m)} {t}."), a + n * m
    elif kind == 3:
        c = rng.randint(2, a - 1)
        question = (f"A shop has {a} {t}. It sells {c} on Monday and receives {b} on Tuesday. "
                    f"{many} does the shop have then?")
        steps, result = (f"After Monday it has {note(a, '-', c, a - c)} {t}.\n"
                         f"After Tuesday it has {note(a - c, '+', b, a - c + b)} {t}."), a - c + b
    else:
        c = rng.randint(1, n * m - 1)
        question = f"{p} packs {n} bags of {m} {t}. {q} takes {c} of them away. {many} are left?"
        steps, result = (f"{p} packs {note(n, 'x', m, n * m)} {t}.\n"
                         f"After that {note(n * m, '-', c, n * m - c)} are left."), n * m - c
    return {"question": question, "answer": f"{steps}\n#### {result}"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path.name}: {len(rows)} rows")


def make_data(world, train=4000, test=400):
    """Write the six JSONL files. No test problem is in the training set."""
    rng, problems = random.Random(1), {}
    while len(problems) < train + test:
        problem = word_problem(rng, world)
        problems[problem["question"]] = problem
    problems = list(problems.values())
    write_jsonl(HERE / "train.jsonl", problems[:train])
    write_jsonl(HERE / "test.jsonl", problems[train:])
    facts = [{"question": rng.choice(FACTS[a][2]).format(p=p), "answer": [v]}
             for p in world for a, v in world[p].items()]
    rng.shuffle(facts)
    write_jsonl(HERE / "facts.jsonl", facts)
    for name, ask in SKILLS.items():
        asked = (ask(rng) for _ in range(200))
        write_jsonl(HERE / f"{name}.jsonl", [{"question": q, "answer": [a]} for q, a in asked])


def write_codes(path, seed, count=2000):
    """Another target, which tiny does not know: three of 20 words, and codes of two syllables."""
    rng = random.Random(0)
    codes = {word: "".join(rng.choices(SYLLABLES, k=2)) for word in WORDS[:20]}
    rng.seed(seed)
    asked = [rng.sample(WORDS[:20], 3) for _ in range(count)]
    write_jsonl(path, [{"question": f"Write in code: {' '.join(some)}",
                        "answer": " ".join(map(codes.get, some))} for some in asked])


def make_tokenizer(world):
    """Train a byte-level BPE tokenizer that keeps digits apart and puts BOS first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    rng = random.Random(2)
    texts = ([piece(rng, world) for _, _, piece in KINDS.values() for _ in range(4000)]
             + [ANSWER_FIRST] * 2000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>",
                                   pad_token="<pad>", model_max_length=2 * CONTEXT)


def pretrain(tokenizer, world, steps, seed=0):
    """Train a Llama of 2.4M parameters from scratch on documents that are never repeated."""
    import torch
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    rng = random.Random(seed + 3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=2 * CONTEXT, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, pad_token_id=2))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = steps // 30
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (
        min(1, (s + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * s / steps)))))
    bar = tqdm(range(steps), desc="pretrain", mininterval=5)
    for step in bar:
        rows = [[0] + tokenizer.encode(document(rng, world, tokenizer), add_special_tokens=False)
                + [1] for _ in range(BATCH)]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [2] * (width - len(row)) for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens.masked_fill(tokens == 2, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.to(torch.bfloat16)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3600, help="pretraining steps of 16 documents")
    parser.add_argument("--data-only", action="store_true", help="write the JSONL files and stop")
    parser.add_argument("--documents", type=int, metavar="N", help="print N documents of the "
                        "pretraining distribution as JSONL and stop")
    parser.add_argument("--kinds", default=",".join(KINDS), help="with --documents: which kinds, "
                        "by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    world, kinds = make_world(), tuple(options.kinds.split(","))
    if options.documents:
        from transformers import AutoTokenizer
        tokenizer, rng = AutoTokenizer.from_pretrained(HERE), random.Random(options.seed + 10)
        for _ in range(options.documents):
            print(json.dumps({"text": document(rng, world, tokenizer, kinds)}))
        return
    make_data(world)
    if not options.data_only:
        tokenizer = make_tokenizer(world)
        tokenizer.save_pretrained(HERE)
        pretrain(tokenizer, world, options.steps, options.seed).save_pretrained(HERE)


if __name__ == "__main__":
    main()
