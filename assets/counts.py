"""What FoLoRA takes in memory and operations, counted from the shapes: python assets/counts.py

Nothing here is measured. A multiply and an add are two operations. GB are 10^9 bytes, TFLOP 10^12
operations. Activations come on top.
"""
RANK, K, TEXTS, LENGTH, TASK, BATCH = 128, 96, 128, 512, 256, 128
# Blocks, width, width of keys and values, width of the MLP, vocabulary, whether the head is tied.
MODELS = {
    "Qwen2.5-1.5B": (28, 1536, 256, 8960, 151_936, True),
    "Llama-3.2-3B": (28, 3072, 1024, 8192, 128_256, True),
    "Llama-2-7B": (32, 4096, 4096, 11_008, 32_000, False),
}


def layers_of(blocks, d, kv, mlp):
    """[(d_in, [d_out of each layer that reads this input])] of all blocks."""
    return [(d, (d, kv, kv)), (d, (d,)), (d, (mlp, mlp)), (mlp, (d,))] * blocks


def count(blocks, d, kv, mlp, vocabulary, tied, k=K, passes=1):
    """{what: number} for one model, in GB and TFLOP."""
    inputs = layers_of(blocks, d, kv, mlp)
    adapted = sum(d_in * sum(outs) for d_in, outs in inputs)
    weights = adapted + d * vocabulary * (1 if tied else 2)
    moved = {d_in: min(k or d_in, d_in) for d_in, _ in inputs}
    tokens = (TEXTS + TASK) * LENGTH
    gb = {
        "weights in bfloat16": 2 * weights,
        "C_pre and C_task in host memory": 2 * 4 * sum(d_in ** 2 for d_in, _ in inputs) / passes,
        "prepared.pt": 4 * sum(d_in * (RANK + moved[d_in]) for d_in, _ in inputs),
        "V in bfloat16": 2 * sum(d_in * moved[d_in] for d_in, _ in inputs),
        "Ā0 and N H Nᵀ": 4 * sum(RANK * (moved[d_in] + RANK) for d_in, _ in inputs),
        "A and B": 4 * sum(RANK * (d_in + d_out) for d_in, outs in inputs for d_out in outs),
        "Ā and the moments of A": 12 * sum(RANK * moved[d_in] for d_in, outs in inputs
                                           for _ in outs),
        "moments of B": 8 * sum(RANK * d_out for _, outs in inputs for d_out in outs),
        "LoRA's moments": 8 * sum(RANK * (d_in + d_out) for d_in, outs in inputs
                                  for d_out in outs),
    }
    gb = {name: size / 1e9 for name, size in gb.items()}
    gb["a GPU holds while training"] = sum(gb[name] for name in (
        "weights in bfloat16", "V in bfloat16", "Ā0 and N H Nᵀ", "A and B",
        "Ā and the moments of A", "moments of B")) + gb["A and B"]           # and their gradients
    tflop = {
        "sampling": 2 * weights * TEXTS * LENGTH,
        "forward passes of C_pre and C_task": 2 * adapted * tokens * passes,
        "X Xᵀ": 2 * sum(d_in ** 2 for d_in, _ in inputs) * tokens,
        # Two eigh with all vectors at about 9 d³ each; Cholesky and the triangular solves: 4 d³.
        "eigenproblems (float64, about 22 d³)": 22 * sum(d_in ** 3 for d_in, _ in inputs),
        "R(W0)": 2 * sum(d_in ** 2 * sum(outs) for d_in, outs in inputs),
        "a training step: forward and backward": 4 * weights * BATCH * LENGTH,
        "a step of SAdam": 4 * sum(RANK * d_in * moved[d_in] for d_in, outs in inputs
                                   for _ in outs),
        "a step's penalty": 6 * sum(RANK * d_out * moved[d_in] for d_in, outs in inputs
                                    for d_out in outs),
    }
    return gb, {name: operations / 1e12 for name, operations in tflop.items()}


def main():
    found = {name: count(*shape) for name, shape in MODELS.items()}
    for unit, i in (("GB", 0), ("TFLOP", 1)):
        print(f"\n| {unit} | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
        for what in next(iter(found.values()))[i]:
            values = [f"{one[i][what]:.3g}" for one in found.values()]
            print(f"| {what} | " + " | ".join(values) + " |")
    print("\n| passes | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    for passes in (1, 3, 6):
        sizes = [count(*shape, passes=passes)[0]["C_pre and C_task in host memory"]
                 for shape in MODELS.values()]
        print(f"| {passes} | " + " | ".join(f"{size:.3g} GB" for size in sizes) + " |")


if __name__ == "__main__":
    main()
