"""What FoLoRA costs beside LoRA: time and memory of every stage, the two measured alternately in one run.

    python assets/bench.py --model SMOLLM2_DIR             # all rows; the ones of a GPU only where there is one
    python assets/bench.py --model tiny --quick            # every row at small shapes: does the script run?

Rows go to assets/bench.json: median, least and greatest of the repetitions, the machine, the versions. A time in it belongs to its
machine; the ratios are what to compare.
"""
import argparse
import copy
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval as ev                                          # noqa: E402
import folora                                              # noqa: E402
import train_math                                          # noqa: E402

QWEN3 = dict(hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=6144,
             vocab_size=151936, max_position_embeddings=4096, tie_word_embeddings=True)                  # Qwen3-1.7B's shapes
QWEN2_5 = dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, head_dim=128, intermediate_size=8960,
               vocab_size=151936, max_position_embeddings=4096, tie_word_embeddings=True)                # Qwen2.5-1.5B's
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=128, vocab_size=1000)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work):
    start = now()
    work()
    return now() - start


def alternate(works, repetitions, desc):
    """{name: [seconds]}: A B A B, after one of each that does not count."""
    for work in works.values():
        work()
    out = {name: [] for name in works}
    for _ in tqdm(range(repetitions), desc=desc):
        for name, work in works.items():
            out[name].append(seconds(work))
    return out


def row(name, values, unit, paper=None, bar=None):
    return {"row": name, "median": round(statistics.median(values), 4), "least": round(min(values), 4), "greatest": round(max(values), 4),
            "n": len(values), "unit": unit, "paper": paper, "bar": bar, "device": device_name()}


def counted(name, gigabytes, paper=None, bar=None, unit="GB"):
    return {**row(name, [gigabytes], unit, paper, bar), "device": "counted, not measured"}


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def random_model(shape, dtype, device):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(Qwen3Config(**shape)).to(dtype).eval()


def examples(model, count, length):
    """Random encoded examples, a label on the second half of each: GSM8K's share."""
    ids = torch.randint(10, model.config.vocab_size, (count, length)).tolist()
    return [{"ids": row, "labels": [-100] * (length // 2) + row[length // 2:]} for row in ids]


def blank_sites(model, rank):
    """Sites with the right shapes and no preparation: what a step costs does not depend on the numbers in a basis."""
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    targets, sites = folora.find_targets(model), []
    for names in ([n for n in targets if n.startswith(f"model.layers.{i}.") and n.endswith(group)] for i in range(len(model.model.layers)) for group in groups):
        d, device = targets[names[0]].in_features, model.device
        sites.append({"modules": names, "A0": torch.randn(rank, d, device=device) / 8, "gamma": torch.rand(d, device=device), "V": torch.eye(d, device=device)})
    return sites


HOW = {"folora": "", "offload": ", bases on the host"}


def adapted(model, method, rank):
    """(loss module, optimiser): folora; offload, which has its bases on the host; or lora under torch's AdamW (foreach on a CPU and fused on a GPU)."""
    if method != "lora":
        return train_math.SummedNLL(model), folora.attach(model, blank_sites(model, rank), 1e-4, offload_bases=method == "offload")
    optimizer = train_math.add_adapters(train_math.parse_options(["--method", "lora", "--rank", str(rank), "--lr", "1e-4"]), model)
    groups = [{key: value for key, value in group.items() if key in ("params", "lr")} for group in optimizer.param_groups]
    return train_math.SummedNLL(model), torch.optim.AdamW(groups, weight_decay=0.0, **({"fused": True} if model.device.type == "cuda" else {"foreach": True}))


def floor(model, rank, tokens):
    """FoLoRA's operations / LoRA's, at least: 4 r d_in² a projection for G V and ΔĀ Vᵀ, beside 4 a weight and token for forward and backward."""
    more = sum(4 * rank * module.in_features ** 2 for module in folora.find_targets(model).values())
    return 1 + more / (4 * sum(p.numel() for p in model.parameters()) * tokens)


def steps(model, name, rank, batch, length, micro, repetitions, paper, bar, methods=("lora", "folora")):
    """A training step and its optimiser's part, FoLoRA / LoRA."""
    what = f"{name}, rank {rank}, {batch} x {length} tokens"
    least = floor(model, rank, batch * length)
    texts, works, optimisers = examples(model, batch, length), {}, {}
    for method in methods:
        loss, optimiser = adapted(copy.deepcopy(model), method, rank)
        works[method] = lambda loss=loss, optimiser=optimiser: train_math.train_step(loss, optimiser, texts, micro)
        optimisers[method] = optimiser
    whole = alternate(works, repetitions, "steps")
    for optimiser in optimisers.values():
        for p in (p for group in optimiser.param_groups for p in group["params"]):
            p.grad = torch.randn_like(p)
    own = alternate({name: optimiser.step for name, optimiser in optimisers.items()}, max(5, repetitions), "optimisers")
    ratios = [row(f"training step, {what}{HOW[method]}: FoLoRA / LoRA (by operations: {least:.3f})", [a / b for a, b in zip(whole[method], whole["lora"])], "ratio", paper, bar)
              for method in methods[1:]]
    return [*ratios, row(f"training step, {what}: LoRA", whole["lora"], "s"),
            row(f"training step, {what}: LoRA again / before (noise)", [b / a for a, b in zip(whole["lora"], whole["lora"][1:])], "ratio"),
            row(f"optimiser step, {what}: FoLoRA - LoRA, share of LoRA's training step",
                [(a - b) / statistics.median(whole["lora"]) for a, b in zip(own["folora"], own["lora"])], "ratio")]


# ---- memory without a GPU: every storage that is alive, counted over tensors that have shapes and no numbers -----------------------

class Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and their greatest sum."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakKeyDictionary()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen and tensor.device.type != "meta":          # which stands for the host
            self.seen[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out


def blank_model(shape):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def count_step(shape, method, rank, batch, length, checkpointing):
    """GB at the peak of two training steps on `batch` x `length` tokens in bfloat16. No fragmentation, no library's workspace."""
    # Numbers that are not there cannot be asked whether they are zero: B0.any(), which decides if W_res takes W0's place.
    with FakeTensorMode(), mock.patch.object(torch.Tensor, "any", lambda tensor: False):
        model = blank_model(shape)
        _, optimiser = adapted(model, method, rank)
        train_math.recompute(model, checkpointing)
        spectral = [group for group in optimiser.param_groups if group.get("basis") is not None]
        for group in spectral if method == "offload" else ():                  # what is sent is counted
            group["basis"] = group["basis"].to("meta")
        with Alive() as alive:
            for tensor in (*model.parameters(), *model.buffers(), *(group["basis"] for group in spectral)):
                alive.add(tensor)
            for _ in range(2):
                ids = torch.randint(10, 100, (batch, length))
                states = model.base_model(input_ids=ids, use_cache=False)[0][:, length // 2:-1].flatten(0, 1)      # a label on the second half
                nll = lambda h, y: torch.nn.functional.cross_entropy(ev.logits_of(model, h), y, reduction="sum")
                sum(ev.checkpoint(nll, *part, use_reentrant=False) for part in ev.pieces(model, states, ids[:, length // 2 + 1:].flatten())).backward()
                optimiser.step()
                optimiser.zero_grad()
        return alive.peak / 1e9


def count_preparation(shape, rank, length):
    """GB at the peak of covariances and eigenproblems at train_math.py's defaults, a batch of each text; what it moves to the host is not counted."""
    options = train_math.parse_options(["--model", "any", "--rank", str(rank)])
    texts = [[1] * length] * options.micro_batch_size
    with FakeTensorMode(), mock.patch.object(torch.Tensor, "any", lambda tensor: False), mock.patch.object(torch.Tensor, "all", lambda tensor: True), \
            mock.patch.object(torch.Tensor, "cpu", lambda tensor: tensor.to("meta")), mock.patch.object(folora, "_checked", lambda name, tokens, gram: gram):
        model = blank_model(shape)
        with Alive() as alive:
            for parameter in model.parameters():
                alive.add(parameter)
            train_math.solve(options, model, texts, [{"ids": ids} for ids in texts], {})
        return alive.peak / 1e9


def counts(quick):
    rank, length, rows = 8 if quick else 128, 32 if quick else 512, []
    for checkpointing, what in enumerate(("", ", gradient checkpointing")):
        peaks = {method: count_step(SMALL if quick else QWEN3, method, rank, 16, length, checkpointing) for method in ("lora", "folora", "offload")}
        for method in HOW:
            name = f"peak memory of a step, Qwen3-1.7B's shapes, rank 128, 16 x 512 tokens{what}{HOW[method]}"
            rows += [counted(f"{name}: FoLoRA / LoRA", peaks[method] / peaks["lora"], 1.148, 1.06, "ratio"), counted(f"{name}: FoLoRA", peaks[method], 56.9, 30)]
    shape, name = SMALL if quick else QWEN2_5, "Qwen2.5-1.5B's shapes, the script's defaults: FoLoRA"
    return rows + [counted(f"peak memory of a step, {name}", count_step(shape, "folora", rank, 16, length, 1), None, 23.6),
                   counted(f"peak memory of covariances and eigenproblems, {name}", count_preparation(shape, rank, length), None, 23.6)]


# ---- preparation, each measurement in a process of its own (its peak memory is its own) --------------------------------------------

def first_layers(name, layers):
    model, _ = ev.load_model(name, *ev.pick_device("auto", "bfloat16"))
    model.model.layers = model.model.layers[:layers]
    return model


def prepare_folora(name, layers, texts, rank, passes):
    model = first_layers(name, layers)
    sequences = torch.randint(10, model.config.vocab_size, texts).tolist()
    options = argparse.Namespace(micro_batch_size=8, rank=rank, tau=0.01, passes=passes, task_samples=len(sequences))
    return lambda: train_math.solve(options, model, sequences, [{"ids": ids} for ids in sequences], {})


def prepare_corda(name, layers, texts, rank):
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    model = first_layers(name, layers)
    sequences = torch.randint(10, model.config.vocab_size, texts).tolist()

    @torch.no_grad()
    def forward():
        for ids in sequences:                              # PEFT's hooks take one text at a time
            model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    config = LoraConfig(r=rank, init_lora_weights="corda", target_modules=list(folora.TARGET_MODULES), corda_config=CordaConfig(corda_method="kpm"))
    return lambda: preprocess_corda(model, config, run_model=forward)


def child(make, arguments, pipe):
    torch.manual_seed(0)
    work = make(*arguments)
    reset_peak()
    before = peak()
    pipe.send((seconds(work), peak() - before))


def reset_peak():
    """From here on, the peak is the present. On a CPU by Linux's own counter: VmHWM."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak():
    """GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1e6


def in_a_process(make, *arguments):
    """(seconds, GB of peak memory that the work added)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(make, arguments, theirs))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def preparations(name, layers, texts, rank, repetitions):
    """FoLoRA's preparation against PEFT's CorDA: each reads the same text, FoLoRA twice (for C_pre and for C_task)."""
    import peft
    works = {"": (prepare_folora, 1), ", --passes 3": (prepare_folora, 3), "CorDA": (prepare_corda,)}
    runs = [{how: in_a_process(make, name, layers, texts, rank, *passes) for how, (make, *passes) in works.items()} for _ in tqdm(range(repetitions), desc="preparations")]
    rows, corda = [], [run.pop("CorDA") for run in runs]
    for how in runs[0]:
        what, ours = f"preparation of {layers} layers, {texts[0]} x {texts[1]} tokens, rank {rank}{how}", [run[how] for run in runs]
        rows += [row(f"{what}: PEFT {peft.__version__}'s CorDA / FoLoRA", [theirs[0] / mine[0] for mine, theirs in zip(ours, corda)], "ratio", None, 4),
                 row(f"{what}: FoLoRA", [mine[0] for mine in ours], "s"),
                 row(f"{what}: peak memory added, FoLoRA / CorDA", [mine[1] / theirs[1] for mine, theirs in zip(ours, corda)], "ratio", None, 1),
                 row(f"{what}: peak memory added, FoLoRA", [mine[1] for mine in ours], "GB")]
    return rows


# ---- how each stage grows -----------------------------------------------------------------------------------------------------------

def covariance_work(d=512, tokens=2048):
    layer, x = torch.nn.Sequential(torch.nn.Linear(d, 1)), torch.randn(tokens, d)
    return lambda: folora.collect_covariances(layer, [{"input": x}], ("0",))


def eigen_work(d=256, layers=1):
    C = {str(i): (lambda x: x.mT @ x / len(x))(torch.randn(2 * d, d)) for i in range(layers)}
    other = {name: (lambda x: x.mT @ x / len(x))(torch.randn(2 * d, d)) for name in C}
    return lambda: folora.decompose(dict(C), dict(other), min(32, d))


def sadam_work(d=1024, rank=64, layers=1):
    A = [torch.nn.Parameter(torch.randn(rank, d)) for _ in range(layers)]
    for p in A:
        p.grad = torch.randn_like(p)
    return folora.SAdam([{"params": [p], "basis": torch.randn(d, d), "gate": torch.rand(d)} for p in A], 1e-4).step


# stage, what grows, its sizes, the operations as a power of it, and their count
SCALING = [
    ("covariance", covariance_work, "d", (512, 1024, 2048, 4096), 2, "T d (d + 256), C being symmetric"),
    ("covariance", covariance_work, "tokens", (2048, 4096, 8192, 16384), 1, "T d (d + 256), C being symmetric"),
    ("eigenproblem", eigen_work, "d", (256, 512, 1024, 2048), 3, "two eigh, 9 d³ each, and 4 triangular d³ solves"),
    ("eigenproblem", eigen_work, "layers", (2, 4, 8, 16), 1, "one a distinct input"),
    ("SAdam step", sadam_work, "d", (512, 1024, 2048, 4096), 2, "4 r d²"),
    ("SAdam step", sadam_work, "rank", (64, 128, 256, 512), 1, "4 r d²"),
    ("SAdam step", sadam_work, "layers", (2, 4, 8, 16), 1, "4 r d² a parameter"),
]


def scaling(quick):
    """The exponent p of seconds ∝ size^p, by least squares of the logarithms of the medians."""
    rows = []
    for stage, make, what, sizes, power, count in SCALING:
        sizes = [size // 8 for size in sizes] if quick and what != "layers" else sizes
        medians = []
        for size in sizes:
            work = make(**{what: size})
            work()
            medians.append(statistics.median(seconds(work) for _ in range(5)))
        x, y = (torch.tensor([math.log(v) for v in values], dtype=torch.float64) for values in (sizes, medians))
        slope = ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()
        rows.append({"stage": stage, "grows": what, "sizes": list(sizes), "seconds": [float(f"{m:.3g}") for m in medians], "exponent": round(slope, 2),
                     "operations": power, "count": count})
    return rows


NEEDS_A_GPU = [("training step on an H100, Qwen3-1.7B's shapes, rank 128, 128 x 512 tokens: FoLoRA / LoRA", 1.016, 1.005),
               ("covariances of 2000 x 512 tokens there, s", 241, 30), ("all eigenproblems there, s", 28, 15),
               ("2000 generations of 128 to 512 tokens there, s", 1146, 200)]


# ---- a GPU ------------------------------------------------------------------------------------------------------------------------

def peak_of_a_step(shape, method, rank, batch, length, micro, dtype, device):
    """GB at the peak of two training steps (the second has the moments)."""
    model = random_model(shape, dtype, device)
    loss, optimiser = adapted(model, method, rank)
    texts = examples(model, batch, length)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        train_math.train_step(loss, optimiser, texts, micro)
    return torch.cuda.max_memory_allocated() / 1e9


def gpu_rows(quick):
    """The paper's setting on Qwen3-1.7B's shapes. At --quick on a CPU: the same calls at small shapes, but for the memory."""
    cuda = torch.cuda.is_available()
    shape, device, dtype = (SMALL if quick else QWEN3), "cuda" if cuda else "cpu", torch.bfloat16
    rank, length, batch, texts = (8, 32, 8, 16) if quick else (128, 512, 128, 2000)
    rows = steps(random_model(shape, dtype, device), "Qwen3-1.7B's shapes", rank, batch, length, 16, 5, 1.016, 1.005, ("lora", *HOW))
    if cuda:
        peaks = {method: peak_of_a_step(shape, method, rank, batch, length, 16, dtype, device) for method in ("lora", *HOW)}
        for method in HOW:
            rows += [row(f"peak memory of that step{HOW[method]}: FoLoRA / LoRA", [peaks[method] / peaks["lora"]], "ratio", 1.148, 1.06),
                     row(f"peak memory of that step{HOW[method]}: FoLoRA", [peaks[method]], "GB", 56.9, 30)]
    model, taken = random_model(shape, dtype, device), {}
    options = argparse.Namespace(micro_batch_size=16, rank=rank, tau=0.01, passes=1, task_samples=texts)
    sequences = torch.randint(10, shape["vocab_size"], (texts, length)).tolist()
    train_math.solve(options, model, sequences, [{"ids": ids} for ids in sequences[:256]], taken)
    rows += [row(f"covariances of {texts} + {min(256, texts)} x {length} tokens", [taken["covariances"]], "s", 241, 30),
             row("all eigenproblems", [taken["eigenproblems"]], "s", 28, 15)]
    tokenizer = argparse.Namespace(bos_token_id=1, eos_token_id=2, decode=str)
    folora.sample_calibration(model, tokenizer, 4, length // 4, length)
    took = seconds(lambda: folora.sample_calibration(model, tokenizer, texts, max(32, length // 4), max(40, length), batch_size=256))
    return rows + [row(f"{texts} generations of {length // 4} to {length} tokens", [took], "s", 1146, 200)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="for the rows on a CPU: hub id or directory")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small shapes, everything once; nothing is written")
    options = parser.parse_args()
    model, _ = ev.load_model(options.model, *ev.pick_device("auto", "bfloat16"))
    batch, length, layers, texts = (4, 32, 2, (8, 32)) if options.quick else (16, 200, 6, (32, 160))
    rank = 8 if options.quick else 64
    rows = steps(model, Path(options.model).name, rank, batch, length, 8, options.repetitions, 1.016, 1.03)
    rows += preparations(options.model, layers, texts, rank, options.repetitions)
    rows += counts(options.quick)
    if torch.cuda.is_available() or options.quick:
        rows += gpu_rows(options.quick)
    else:
        rows += [{"row": name, "median": None, "paper": paper, "bar": bar, "device": "not measured: no CUDA GPU"} for name, paper, bar in NEEDS_A_GPU]
    results = {"model": Path(options.model).name, "torch": torch.__version__, "rows": rows, "scaling": scaling(options.quick)}
    print_results(results)
    if not options.quick:
        (HERE / "bench.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))


def print_results(results):
    print("| what | median (least to greatest, n) | paper | bar |\n|---|---|---|---|")
    for r in results["rows"]:
        if r["median"] is None:
            print(f"| {r['row']} | {r['device']} | {r['paper'] or ''} | {r['bar'] or ''} |")
            continue
        print(f"| {r['row']} | {r['median']:.4g} {r['unit'] if r['unit'] != 'ratio' else ''} ({r['least']:.4g} to {r['greatest']:.4g}, {r['n']}) | {r['paper'] or ''} | {r['bar'] or ''} |")
    print("\n| stage | grows with | measured exponent | of the operations |\n|---|---|---|---|")
    for r in results["scaling"]:
        print(f"| {r['stage']} | {r['grows']}: {', '.join(map(str, r['sizes']))} | {r['exponent']} | {r['operations']} ({r['count']}) |")


if __name__ == "__main__":
    main()
