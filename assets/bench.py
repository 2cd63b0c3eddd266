"""What FoLoRA costs beside LoRA in time and memory.

    python assets/bench.py --model SMOLLM2_DIR       # all rows; a GPU's only where there is one
    python assets/bench.py --model tiny --quick      # small and once: does the script run?

Where methods are compared, their runs alternate. assets/bench.json keeps the median, the least and
the greatest of the repetitions. Times belong to their machine; the ratios are what to compare.
"""
import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as ev  # noqa: E402
import folora  # noqa: E402
import train_math  # noqa: E402

METHODS = {"LoRA": None, "FoLoRA, k = 96": 96, "FoLoRA, k = all": 0}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPE = dict(hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
             head_dim=128, intermediate_size=6144, vocab_size=151936, tie_word_embeddings=True)
QWEN25_SHAPE = dict(SHAPE, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2,
                    intermediate_size=8960)
SMALL = dict(SHAPE, hidden_size=64, num_hidden_layers=2, head_dim=8, intermediate_size=128,
             vocab_size=2000)
# Each of Qwen3-1.7B's 28 blocks has four inputs: their widths, and those of what reads them.
QWEN3 = [(2048, (2048, 1024, 1024)), (2048, (2048,)), (2048, (6144, 6144)), (6144, (2048,))] * 28


def row(what, values, paper=None, bar=None):
    """One row: measured values, the paper's value, and the bar that FoLoRA should reach."""
    return {"row": what, "median": statistics.median(values), "least": min(values),
            "greatest": max(values), "n": len(values), "paper": paper, "bar": bar}


def seconds(work):
    """The time that work() takes, including what it leaves in a GPU's queue."""
    start = time.perf_counter()
    work()
    torch.get_device_module(DEVICE).synchronize()
    return time.perf_counter() - start


def alternate(works, repetitions, warm_up=1):
    """[[seconds of each repetition] of each work], run as A B A B, after a round that does not
    count."""
    rounds = [[seconds(work) for work in works] for _ in tqdm(range(warm_up + repetitions))]
    return list(zip(*rounds[warm_up:]))


def adapted(model, k, rank, batch, length, micro):
    """(a function that trains one step, its optimiser). Tokens are random, since the cost does not
    depend on them. LoRA (k None) gets the fastest AdamW that torch has for the device."""
    ids = torch.randint(10, model.config.vocab_size, (batch, length))
    if k is None:
        options = train_math.parse_options(["--method", "lora", "--rank", str(rank)])
        trained = train_math.add_adapters(options, model).param_groups[0]["params"]
        optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0, foreach=not CUDA, fused=CUDA)
    else:
        inputs = [{"input_ids": ids[:8].to(DEVICE)}]
        optimizer = folora.prepare(model, inputs, inputs, 1e-4, rank, basis_rank=k or None)
    half = length // 2
    texts = [{"ids": text, "labels": [-100] * half + text[half:]} for text in ids.tolist()]

    def step():
        train_math.gradients(model, optimizer, texts, micro)
        optimizer.step()
        optimizer.zero_grad()
    return step, optimizer


def step_rows(load, name, repetitions, bar, rank, batch, length, micro=8):
    """The whole training step, and the optimiser's part of it. `load` returns a new model."""
    steps, optimizers = zip(*(adapted(load(), k, rank, batch, length, micro)
                              for k in METHODS.values()))
    lora, *whole = alternate(steps, repetitions)
    for p in (p for o in optimizers for group in o.param_groups for p in group["params"]):
        p.grad = torch.randn_like(p)
    adam, *own = alternate([optimizer.step for optimizer in optimizers], repetitions)
    what = f"step, {name}, rank {rank}, {batch} x {length} tokens"
    yield row(f"training {what}: LoRA, s", lora)
    for method, times, parts in zip(list(METHODS)[1:], whole, own):
        ratios = [a / b for a, b in zip(times, lora)]
        shares = [(a - b) / statistics.median(lora) for a, b in zip(parts, adam)]
        yield row(f"training {what}: {method} / LoRA", ratios, 1.016, bar)
        yield row(f"optimiser {what}: {method} - LoRA as share of LoRA's training step", shares)


def memory_rows(rank=128):
    """Bases in bfloat16, the two moments and what the penalty needs in float32, computed from the
    layers' shapes."""
    for method, k in METHODS.items():
        size = 0
        for d_in, outputs in QWEN3:
            moved = min(k or d_in, d_in)                   # a moment of A is (rank, moved)
            size += 0 if k is None else 2 * moved * d_in   # V is (d_in, moved)
            size += sum(2 * 4 * rank * (moved + d_out) for d_out in outputs)
            if k is not None:                              # Ā0 and N H Nᵀ, and an Ā for each layer
                size += 4 * rank * (moved + rank) + 4 * rank * moved * len(outputs)
        yield row(f"bases and moments by formula, Qwen3-1.7B, r={rank}: {method}, GB", [size / 1e9])


@torch.no_grad()
def corda(model, texts, rank):
    """PEFT's preparation of CorDA. Its hooks take one text at a time."""
    from peft.tuners.lora import config, corda
    lora = config.LoraConfig(r=rank, target_modules=list(folora.TARGET_MODULES),
                             corda_config=config.CordaConfig(corda_method="kpm"))
    corda.preprocess_corda(model, lora, run_model=lambda: [
        model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
        for ids in texts])


def preparation(name, layers, rank, k, *sizes):
    """(seconds, GB added to the peak memory), on the CPU, for a process of its own. `sizes` are
    the numbers and lengths of the texts: for C_pre and C_task, or for CorDA."""
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
    model, _ = ev.load_model(name, "cpu", torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    texts, *more = (torch.randint(10, model.config.vocab_size, size).tolist() for size in sizes)
    options = f"--micro-batch-size 16 --rank {rank} --basis-rank {k}".split()
    solve = lambda examples: train_math.solve(train_math.parse_options(options), model, texts,
                                              [{"ids": ids} for ids in examples])
    Path("/proc/self/clear_refs").write_text("5")          # resets VmHWM, on Linux
    before = peak()
    work = lambda: solve(*more) if more else corda(model, texts, rank)
    return seconds(work), peak() - before


def preparation_rows(name, repetitions, layers, rank, k, ours, theirs):
    """FoLoRA's, without sampling, on texts of the sizes `ours`, and CorDA's."""
    runs = {ours: [], theirs: []}
    for sizes in tqdm([*runs] * repetitions, desc="preparation"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            runs[sizes].append(pool.submit(preparation, name, layers, rank, k, *sizes).result())
    read = lambda sizes: " and ".join(f"{count} x {length}" for count, length in sizes)
    what = f"preparation, {layers} layers, r={rank}, k = {k or 'all'}, {read(ours)} tokens"
    for i, part, unit, bar in ((0, "time", "s", 3), (1, "peak memory added", "GB", 1)):
        yield row(f"{what}: {part}, {unit}", [mine[i] for mine in runs[ours]])
        ratios = [rival[i] / mine[i] for mine, rival in zip(*runs.values())]
        yield row(f"{what}: {part}, PEFT's CorDA on {read(theirs)} / FoLoRA", ratios, None, bar)


def eigen_rows(d, rank=128):
    """The basis and the null space of one input of width d, with a decaying spectrum."""
    scale = torch.logspace(0, -3, d)
    x = [(torch.randn(12000, d) * scale[torch.randperm(d)]).to(DEVICE) for _ in range(2)]
    C_pre, C_task = (folora.unit_energy(x.mT @ x) for x in x)
    parts = {"basis": lambda: folora.generalized_eigenbasis(C_task, C_pre, 0.01),
             "null space": lambda: folora.null_space(C_pre, rank)}
    for part, work in parts.items():
        yield row(f"one input of d_in = {d}: {part}, s", [seconds(work)])


def random_model(shape):
    """Qwen3's architecture in a shape, with random weights: in bfloat16 on a GPU."""
    with DEVICE:
        model = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    return model.bfloat16() if CUDA else model


def peak_gb(work):
    """(seconds, peak GB while work() runs). Without a GPU the memory is nan."""
    if not CUDA:
        return seconds(work), math.nan
    torch.cuda.reset_peak_memory_stats()
    return seconds(work), torch.cuda.max_memory_allocated() / 1e9


# What is trained side by side on a GPU, as train_math.py's options.
RIVALS = {"LoRA": "--method lora", "FoLoRA": "--penalty 0", "FoLoRA + penalty": "--penalty 3",
          "LoRA + KL": "--method lora --kl 1"}


def gpu_step_rows(shape, name, rank, batch, length, repetitions):
    """Seconds and peak memory of a training step of each of RIVALS, alternating."""
    for checkpointing in (0, 1):
        steps = []
        for flags in RIVALS.values():
            options = f"{flags} --rank {rank} --micro-batch-size {batch}"
            options = train_math.parse_options(options.split())
            model = random_model(shape)
            ids = torch.randint(10, shape["vocab_size"], (batch, length)).tolist()
            examples = [{"ids": text, "labels": [-100] * (length // 2) + text[length // 2:]}
                        for text in ids]
            bases = None
            if options.method == "folora":
                bases = train_math.solve(options, model, ids[:2], examples[:2])
            optimizer = train_math.add_adapters(options, model, bases)
            steps.append(functools.partial(gpu_step, options, model, optimizer, examples, ids[:4],
                                           checkpointing))
        rounds = [[peak_gb(step) for step in steps] for _ in range(1 + repetitions)][1:]
        what = f"{name}, rank {rank}, {batch} x {length} tokens, checkpointing {checkpointing}"
        for method, values in zip(RIVALS, zip(*rounds)):
            times, peaks = zip(*values)
            yield row(f"step, {what}: {method}, s", times)
            yield row(f"step, {what}: {method}, peak GB", peaks)


def gpu_step(options, model, optimizer, examples, texts, checkpointing):
    train_math.recompute(model, checkpointing)
    train_math.gradients(model, optimizer, examples, options.micro_batch_size, options.kl,
                         texts if options.kl else ())
    optimizer.step()
    optimizer.zero_grad()


def gpu_preparation_rows(shape, name, rank, texts, length):
    """The parts of `prepare`: sampling, covariances, eigenproblems by width and null spaces."""
    model = random_model(shape)
    tokenizer = argparse.Namespace(bos_token_id=1, eos_token_id=2, decode=str)
    options = train_math.parse_options(["--micro-batch-size", "16"])
    ids = torch.randint(10, shape["vocab_size"], (texts, length)).tolist()
    parts = {
        f"{texts} texts of up to {length} tokens sampled": lambda: folora.sample_calibration(
            model, tokenizer, texts, length // 2, length, 64),
        f"covariances, {texts} x {length} tokens": lambda: train_math.covariances(
            options, model, ids, "covariances"),
        "PEFT's CorDA, two blocks, the same tokens": lambda: corda(
            random_model(shape | {"num_hidden_layers": 2}), ids, rank)}
    for d in sorted({shape["hidden_size"], shape["intermediate_size"]}):
        x = torch.randn(2, 2 * d, d, device=DEVICE) * torch.logspace(0, -3, d, device=DEVICE)
        pre, task = folora.unit_energy(x.mT @ x)
        parts |= {
            f"one eigenproblem, d_in = {d}": lambda pre=pre, task=task:
                folora.generalized_eigenbasis(task, pre, 0.01),
            f"four in a stack, d_in = {d}": lambda pre=pre, task=task:
                folora.generalized_eigenbasis(task.expand(4, -1, -1), pre.expand(4, -1, -1), 0.01),
            f"one null space, d_in = {d}": lambda pre=pre: folora.null_space(pre, rank)}
    for part, work in parts.items():
        time, peak = peak_gb(work)
        yield row(f"{name}, {part}, s", [time])
        yield row(f"{name}, {part}, peak GB", [peak])


def gpu_rows(quick):
    """What assets/gpu.sh measures: at two models' shapes, with random weights in bfloat16."""
    shapes = {"Qwen2.5-1.5B's shapes": QWEN25_SHAPE, "Qwen3-1.7B's shapes": SHAPE}
    rank, batch, length, texts, count = 128, 16, 512, 64, 2
    if quick:
        shapes, (rank, batch, length, texts, count) = {"small shapes": SMALL}, (8, 2, 32, 2, 1)
    for name, shape in shapes.items():
        for rows in (gpu_step_rows(shape, name, rank, batch, length, count),
                     gpu_preparation_rows(shape, name, rank, texts, length)):
            try:
                yield from rows
            except (RuntimeError, ValueError) as error:        # such as too little memory
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)


def print_row(r):
    spread = f"{r['median']:.4g} ({r['least']:.4g} to {r['greatest']:.4g}, {r['n']})"
    print(f"| {r['row']} | {spread} | {r['paper'] or ''} | {r['bar'] or ''} |", flush=True)


def device_name():
    return torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"


def write_gpu_rows(out, quick):
    """Each row is printed and kept as soon as it is measured: the time limit may come first."""
    rows = []
    print("| what | median (least to greatest, n) | paper | bar |\n|---|---|---|---|")
    for r in gpu_rows(quick):
        rows.append(r)
        print_row(r)
        results = {"torch": torch.__version__, "device": device_name(), "rows": rows}
        Path(out).write_text(json.dumps(results, indent=1))


def write_random_checkpoint(directory, quick):
    """For a run of train_math.py from end to end: Qwen2.5-1.5B's shapes, or small ones, with random
    weights, and the embedded model's tokenizer. Nothing, where no directory is given."""
    if not directory:
        return
    tokenizer = ev.load_model("tiny", "cpu", torch.float32)[1]
    model = random_model(SMALL if quick else QWEN25_SHAPE)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
        setattr(model.config, name, getattr(tokenizer, name))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="small, once, nothing written")
    parser.add_argument("--gpu", action="store_true", help="the rows of assets/gpu.sh alone")
    parser.add_argument("--out", help="where --gpu writes its rows")
    parser.add_argument("--random-checkpoint", metavar="DIR", help="with --gpu: write one here")
    options = parser.parse_args()
    if options.gpu:
        write_random_checkpoint(options.random_checkpoint, options.quick)
        return write_gpu_rows(options.out, options.quick)
    name, quick = Path(options.model).name, options.quick
    count, rank, layers, batch, length = (1, 8, 2, 4, 32) if quick else (3, 64, 6, 16, 200)
    load = lambda: ev.load_model(options.model, DEVICE, torch.bfloat16)
    same, (texts, tokens) = ((32, length),), (4, 40) if quick else (128, 512)
    sample = lambda: folora.sample_calibration(*load(), texts, tokens // 4, tokens)
    # What is read by default: by FoLoRA in train_math.py, and by CorDA in PEFT's example.
    ours, theirs = ((texts, tokens), (2 * texts, 200)), ((2 * texts, 4 * tokens),)
    rows = [*step_rows(lambda: load()[0], name, count, 1.003, rank, batch, length),
            *preparation_rows(options.model, count, layers, rank, 96, same * 2, same),
            *preparation_rows(options.model, count, layers, rank, 0, same * 2, same),
            *memory_rows(),
            *(row for d in ((64, 320) if quick else (1536, 8960)) for row in eigen_rows(d)),
            *preparation_rows(options.model, 1, layers, rank, 96, ours, theirs),
            row(f"{texts} texts of up to {tokens} tokens sampled, s", [seconds(sample)])]
    print("| what | median (least to greatest, n) | paper | bar |\n|---|---|---|---|")
    for r in rows:
        print_row(r)
    results = {"model": name, "torch": torch.__version__, "device": device_name(), "rows": rows}
    if not quick:
        Path(__file__).with_name("bench.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
