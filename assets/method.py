"""Draw assets/method.png: what FoLoRA does in one layer of a real model.

    python assets/method.py --model DIR --data TRAIN.jsonl

The layer is q_proj in the middle of the model. Left: γ of the directions of its input, and the
gate. Right: the forgetting R of one step of A, if its size is such that all steps bring the same
utility U. The step is taken with a real gradient, after five steps in which B has left 0.
"""
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval as ev  # noqa: E402
import folora  # noqa: E402
import train_math  # noqa: E402

STEPS, LR, TAU, LAM, K, RANK = 5, 3e-3, 0.01, 1.0, 96, 32
OPTIONS = ("--rank 32 --batch-size 8 --micro-batch-size 4 --gradient-checkpointing 0 "
           "--dtype float32 --calibration-samples 24 --calibration-max-tokens 160 "
           "--max-samples 200 --tasks drift").split()


def measure(arguments):
    """γ, and R at equal U of each kind of step."""
    options = train_math.parse_options([*OPTIONS, *arguments])
    train_math.resolve(options)
    model, tokenizer, examples, _ = train_math.load(options)
    layers = model.get_decoder().layers
    name = f"layers.{len(layers) // 2}.self_attn.q_proj"
    options.target_modules = name
    texts = train_math.sample(options, model, tokenizer)
    task = [example["ids"] for example in examples[100:164]]
    old, new = (train_math.covariances(options, model, some, "covariance")
                for some in (texts, task))
    (C_pre,), (C_task,) = old.values(), new.values()
    C_pre, C_task = folora.unit_energy(C_pre), folora.unit_energy(C_task)
    H = folora.with_ridge(C_pre, TAU)
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, TAU)

    optimizer = folora.attach(model, folora.decompose(model, old, new, RANK, TAU), LR)
    A = optimizer.param_groups[0]["params"][0]
    for step in range(STEPS + 1):                    # the last gradient is kept
        batch = examples[8 * step:8 * step + 8]
        optimizer.zero_grad()
        train_math.gradients(model, optimizer, batch, options.micro_batch_size)
        if step < STEPS:
            optimizer.step()
    G = A.grad.float()

    gate = folora.spectral_gate(gamma, LAM, 0.0)
    ones = torch.ones_like(gamma)

    def moments(k):
        return torch.zeros(RANK, k), torch.zeros(RANK, k)

    d = len(gamma)
    steps = {
        "LoRA's Adam": folora.adam_direction(G, *moments(d), t=1),
        "Adam along V, no gate": folora.sadam_direction(G, V, ones, *moments(d), t=1)[0],
        "+ gate": folora.sadam_direction(G, V, gate, *moments(d), t=1)[0],
        f"+ only the first {K} (default)":
            folora.sadam_direction(G, V[:, :K], gate[:K], *moments(K), t=1)[0],
    }
    cost = {kind: (folora.energy(step, H) / folora.energy(step, C_task)).item()
            for kind, step in steps.items()}
    return {"layer": name, "gamma": gamma.tolist(), "R at equal U": cost}


def draw(found):
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 11})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    gamma = torch.tensor(found["gamma"])
    gate = folora.spectral_gate(gamma, LAM, 0.0)
    x = range(1, len(gamma) + 1)
    left.set_title("What each input direction of a layer is worth", loc="left")
    left.plot(x, gamma.clamp(min=1e-3), "C0", lw=2)
    left.set(yscale="log", xlabel="direction, by falling γ")
    left.set_ylabel("γ: utility per unit of forgetting", color="C0")
    left.axhline(LAM, color="0.5", lw=0.8, ls=":")
    left.text(len(gamma), LAM * 1.15, "γ = λ: gate 1/2", ha="right", color="0.4", fontsize=9)
    left.axvspan(K, len(gamma), color="0.93", zorder=0)
    left.text(K + 8, gamma.max() * 0.5, f"cut: A moves in the first {K}", color="0.4", fontsize=9)
    other = left.twinx()
    other.plot(x, gate, "C3", lw=2)
    other.set_ylim(0, 1.02)
    other.set_ylabel("gate: the share of the step that passes", color="C3")

    cost = found["R at equal U"]
    right.set_title("Forgetting R of a step, at equal U", loc="left")
    base = cost["LoRA's Adam"]
    names, shares = list(cost), [100 * value / base for value in cost.values()]
    bars = right.barh(names, shares, color=["0.4", "0.6", "C3", "C3"], height=0.6)
    right.bar_label(bars, [f"{share:.3g}%" for share in shares], padding=4)
    right.invert_yaxis()
    right.set(xlabel="% of Adam's", xlim=(0, 1.15 * max(shares)))
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    figure.savefig(HERE / "method.png", dpi=130)


if __name__ == "__main__":
    path = HERE / "method.json"
    if sys.argv[1:]:
        path.write_text(json.dumps(measure(sys.argv[1:])))
    ev.need(path.exists(), "give --model and --data first")
    draw(json.loads(path.read_text()))
