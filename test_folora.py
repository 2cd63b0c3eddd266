"""Tests of FoLoRA, on a CPU: python -m pytest -q test_folora.py

Equations are held against scipy, numpy, torch.optim.Adam, PEFT, or a literal slow version here.
"""
import ast
import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tokenize
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import eval as ev
import folora
import train_math
from assets import baselines

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)
close = torch.testing.assert_close
CPU = torch.device("cpu")
# file, lines, lines of code
BUDGETS = [("folora.py", 565, 335), ("train_math.py", 555, 420), ("eval.py", 585, 380),
           ("assets/experiments.py", 445, 325)]


def covariance(d, tokens, condition=1.0, seed=0):
    """X Xᵀ / T in float64, with X's rows scaled so that its spectrum spans about `condition`."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    scale = torch.logspace(0, -0.5 * math.log10(condition), d, dtype=torch.float64)
    X = rotation @ (scale[:, None] * torch.randn(d, tokens, generator=g, dtype=torch.float64))
    return X @ X.mT / tokens


def energy(rows, C):
    return torch.trace(rows.double() @ C @ rows.double().mT).item()


class Block(nn.Module):
    """q, k and v read one input; q is called by keyword, and up on flat tokens, as an expert is.
    k_reads: "other" for an input of its own, "nothing" to leave it out."""

    def __init__(self, d=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(d, d, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x, attention_mask=None, k_reads="x"):
        q, v = self.q_proj(input=x), self.v_proj(x)
        k = 1 if k_reads == "nothing" else self.k_proj(x if k_reads == "x" else 2 * x)
        mixed = torch.tanh(q * k + v)
        y = x + self.o_proj(mixed)
        up = torch.relu(self.up_proj(y.flatten(0, -2)))
        self.inputs = dict(zip(BLOCK_TARGETS, (x, x, x, mixed, y, up)))
        return y + self.down_proj(up).view(y.shape)


BLOCK_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class MLP(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.first, self.second = nn.Linear(d, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def tiny():
    return ev.load_model("tiny", CPU, torch.float32)


# ---- 3.1: targets and covariances ----------------------------------------------------------------

def literal_covariance(model, batches, name):
    """Σ x xᵀ / T in float64, one token after the other, of what a layer of a Block reads."""
    tokens = []
    for batch in batches:
        model(**batch)
        real = batch.get("attention_mask", torch.ones(batch["x"].shape[:-1])).flatten()
        rows = model.inputs[name].detach().double().flatten(0, -2)
        tokens += [x for x, counts in zip(rows, real) if counts]
    return sum(torch.outer(x, x) for x in tokens) / len(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("names", [BLOCK_TARGETS, ("q_proj",)])
def test_covariances_are_means_of_x_xT_over_real_tokens(names, inference, dtype):
    """In float32 whatever the model's dtype. The same tensor counts again in a new batch."""
    torch.manual_seed(0)
    model, few = Block().to(dtype), torch.randn(2, 4, 8, dtype=dtype)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 2 + [1] * 3])
    padded = {"x": torch.randn(3, 5, 8, dtype=dtype), "attention_mask": mask}
    batches = [padded, {"x": few}, {"x": few}]
    with torch.inference_mode(inference):
        ours = folora.collect_covariances(model, batches, names)
    assert tuple(ours) == names
    for name, C in ours.items():
        assert C.dtype == torch.float32 and not C.is_inference()
        close(C.double(), literal_covariance(model, batches, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["x", "other", "nothing"])
@pytest.mark.parametrize("then", ["x", "other", "nothing"])
def test_layers_share_an_input_and_its_covariance_always_or_never(first, then):
    batches = [{"x": torch.randn(2, 3, 8), "k_reads": what} for what in (first, then)]
    collect = lambda: folora.collect_covariances(Block(), batches, BLOCK_TARGETS)
    if first == then == "nothing" or first != then and "x" in (first, then):
        with pytest.raises(ValueError, match="shares its input|no token reached k_proj"):
            collect()
    else:
        C = collect()
        assert C["q_proj"] is C["v_proj"] and (C["q_proj"] is C["k_proj"]) == (first == "x")
        assert len({id(c) for c in C.values()}) == (4 if first == "x" else 5)


def test_token_counts_beyond_float32_are_exact():
    total = torch.ones(1, 1, dtype=torch.float64)
    assert folora._mean_over_processes("x", total, 2 ** 24 + 1).item() == 1 / (2 ** 24 + 1)


def test_a_target_is_a_whole_name_or_its_end():
    model = nn.Sequential(Block())
    assert [*folora.find_targets(model, "q_proj")] == ["0.q_proj"]
    assert [*folora.find_targets(model, ["0.q_proj"])] == ["0.q_proj"]


def test_hooks_and_modes_are_put_back_also_when_the_forward_fails():
    model = Block().train()
    model.q_proj.register_forward_pre_hook(lambda module, args: None)
    model.o_proj.eval()                      # a mode of its own, which must survive
    with pytest.raises(TypeError):
        folora.collect_covariances(model, [{"nonsense": 1}], BLOCK_TARGETS)
    assert [len(m._forward_pre_hooks) for m in (model.q_proj, model.k_proj)] == [1, 0]
    assert model.training and model.q_proj.training and not model.o_proj.training


# ---- 3.2: the generalized eigenbasis -------------------------------------------------------------

CASES = {                                    # two covariances, and the ridge
    "full rank": (covariance(100, 500, 1e3), covariance(100, 500, 1e3, seed=1), 1e-2),
    "condition 1e6": (covariance(100, 500, 1e6), covariance(100, 500, 1e6, seed=1), 1e-7),
    "fewer tokens than d": (covariance(100, 15), covariance(100, 20, seed=1), 1e-5),
    "rank two": (covariance(100, 2), covariance(100, 500, seed=1), 1e-2)}


@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("case", CASES)
def test_eigenbasis_against_scipy(case, k):
    """As a stack of two. With k = 6, 38 random columns are iterated, fewer than d = 100."""
    *pair, tau = CASES[case]
    C_task = torch.stack(pair).float()
    stack, again = (folora.generalized_eigenbasis(C_task, C_task.flip(0), tau, k) for _ in range(2))
    assert all(map(torch.equal, stack, again))
    for gamma, V, C, H in zip(*stack, C_task.double(), C_task.double().flip(0)):
        gamma, V, H = gamma.double(), V.double(), H + tau * torch.eye(100)
        mu, U = map(torch.tensor, scipy.linalg.eigh(C.numpy(), H.numpy()))       # ascending
        mu, U = mu.flip(0)[:k], U.flip(1)[:, :k]
        within = dict(rtol=0, atol=5e-3 * mu[0].item())
        assert (gamma.diff() <= 0).all() and (gamma >= 0).all()
        close(gamma, mu, **within)
        close(V.mT @ H @ V, torch.eye(len(mu)).double(), rtol=0, atol=1e-2)
        close(V.mT @ C @ V, gamma.diag(), **within)
        alone = ((mu[:, None] - mu).abs() > 0.02 * mu[0]).sum(1) == len(mu) - 1
        overlap = (V.mT @ H @ U).diagonal().abs()    # up to sign, where no eigenvalue is repeated
        assert alone.any() and (overlap[alone] > 0.99).all()


def test_eigh_that_fails_is_tried_in_float64_and_again(monkeypatch):
    real, M, tried = torch.linalg.eigh, covariance(5, 20).float(), []

    def eigh(M):
        tried.append(M.dtype)
        if len(tried) == 1:
            raise torch.linalg.LinAlgError("no convergence")
        return (torch.full((5,), math.nan), torch.eye(5)) if len(tried) == 2 else real(M)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = folora._eigh(M)
    assert tried == [torch.float32, torch.float64, torch.float64]
    close(vectors * values @ vectors.mT, M)  # in float32 again


# ---- 3.3: gate and optimiser ---------------------------------------------------------------------

def literal_sadam(A, gradients, V, gate, lr, beta1, beta2, eps):
    """Eq. 18-24 in float64, one number at a time: a row of A along a column of V."""
    A, V = A.double().clone(), V.double()
    for row, i in numpy.ndindex(len(A), V.shape[1]):
        m = v = 0.0
        for t, G in enumerate(gradients, 1):
            g = sum(float(G[row, j]) * float(V[j, i]) for j in range(len(V)))
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            m_hat, v_hat = m / (1 - beta1 ** t), v / (1 - beta2 ** t)
            A[row] -= lr * m_hat / (math.sqrt(v_hat) + eps) * float(gate[i]) * V[:, i]
    return A


def take_steps(optimizer, p, gradients):
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        assert torch.equal(p.grad, G)        # never written
    return p.detach()


@pytest.fixture(params=[None, 4])
def spectral(request):
    """(A, gradients, V, gate, H), V square or narrow. Nearly all of H is in one direction, as it is
    where a first token has a huge input."""
    torch.manual_seed(3)
    C_task, C_pre = covariance(6, 30).float(), covariance(6, 30, seed=1).float()
    C_pre = (C_pre + 1000) / 1000
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, 0.01, request.param)
    gradients = torch.randn(4, 3, 6) * 10 ** torch.tensor([0, -1, 0.5, -8])[:, None, None]
    gate, H = folora.spectral_gate(gamma, 100.0, 0.3), C_pre.double() + 0.01 * torch.eye(6)
    return torch.randn(3, 6), gradients, V, gate, H


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-8), (torch.bfloat16, 1e-3)])
def test_sadam_against_eq_18_to_24_one_number_at_a_time(spectral, dtype, error):
    """A bfloat16 basis leaks little into what must not move."""
    A, gradients, V, gate, H = spectral
    assert gate.max() - gate.min() > 0.1
    p = nn.Parameter(A.clone())
    group = {"params": [p], "basis": V.to(dtype), "gate": gate, "scale": 0.5}
    optimizer = folora.SAdam([group], 0.02, betas=(0.8, 0.95), eps=1e-7)
    moved = take_steps(optimizer, p, gradients).double() - A
    literal = literal_sadam(A, gradients, V, gate, 0.01, 0.8, 0.95, 1e-7) - A
    for metric in (H, torch.eye(6).double()):
        assert energy(moved - literal, metric) < error * energy(literal, metric)


@pytest.mark.parametrize("group", [{}, {"basis": torch.eye(6), "gate": torch.ones(6)}])
def test_sadam_is_adam_without_a_basis_and_with_the_trivial_one(group):
    """Also under a schedule and beside a parameter that has no gradient."""
    torch.manual_seed(0)
    p, unused = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.ones(3, 6))
    q, gradients = nn.Parameter(p.detach().clone()), torch.randn(5, 3, 6)
    sadam, adam = folora.SAdam([{"params": [unused, p], **group}], 0.1), torch.optim.Adam([q], 0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (sadam, adam)]
    for G in gradients:
        take_steps(sadam, p, [G]), take_steps(adam, q, [G])
        for schedule in schedules:
            schedule.step()
    close(p, q, rtol=1e-6, atol=1e-7)
    assert torch.equal(unused, torch.ones(3, 6)) and unused not in sadam.state
    assert sadam.step(lambda: p.sum().backward() or 5.0) == 5.0      # a closure and its loss


@pytest.mark.parametrize("wrapped", [False, True])
def test_sadam_goes_on_from_its_state_dict(spectral, tmp_path, wrapped):
    """Also through accelerate, as under a Trainer. The moments belong to the saved basis."""
    A, gradients, V, gate, _ = spectral
    straight, p = nn.Parameter(A.clone()), nn.Parameter(A.clone())
    wrap = lambda optimizer: optimizer
    if wrapped:
        wrap = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare
    make = lambda p, V, lr: wrap(folora.SAdam([{"params": [p], "basis": V, "gate": gate}], lr))
    take_steps(make(straight, V, 0.01), straight, gradients)
    first, second = make(p, V, 0.01), make(p, -2 * V, 0.5)
    take_steps(first, p, gradients[:2])
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state"))
    take_steps(second, p, gradients[2:])
    assert torch.equal(p, straight)
    moments = second.state_dict()["state"][0]
    assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == (3, V.shape[1])


@pytest.mark.parametrize("saved, message", [
    (dict(basis=None, gate=None), "in other groups"), (dict(gate=torch.ones(4)), "do not fit")])
def test_sadam_refuses_a_state_that_does_not_fit_and_stays_as_it_was(saved, message):
    basis, p = torch.eye(4)[:, :3], nn.Parameter(torch.zeros(2, 4))
    optimizer = folora.SAdam([{"params": [p], "basis": basis, "gate": torch.ones(3)}], 0.1)
    state = optimizer.state_dict()
    state["param_groups"][0].update(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["basis"] is basis


# ---- B.3: the start ------------------------------------------------------------------------------

def test_null_space_holds_the_least_energy():
    """In a stack, at any scale, and where one direction, as a first token makes, has nearly all."""
    C = covariance(60, 400, 1e3)
    C = torch.stack([C, C + 200, 1e-9 * C]).float()
    for rows, one in zip(folora.null_space(C, 7), C.double()):
        close(rows @ rows.mT, torch.eye(7), rtol=0, atol=1e-5)
        assert energy(rows, one) <= 1.02 * scipy.linalg.eigvalsh(one.numpy())[:7].sum()


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (32.0, 2.0)])
def test_an_adapter_starts_as_its_layer(alpha, kappa):
    """From LoRA's start, where B = 0; from B.3's, with B0 = κ⁻¹ W0 A0ᵀ; from given ones."""
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48), torch.randn(100, 64)
    W0, before = base.weight.detach().clone(), base(x).detach()
    plain = folora.LoRALinear(copy.deepcopy(base), 16, alpha)
    assert torch.equal(plain(x), before) and torch.equal(plain.base_layer.weight, W0)
    assert plain.lora_A.shape == (16, 64) and 0.9 / 8 < plain.lora_A.abs().max() <= 1 / 8
    A0 = folora.null_space(covariance(64, 300), 16).float()
    for B0 in (None, torch.randn(48, 16)):
        layer = folora.LoRALinear(copy.deepcopy(base), 16, alpha, A0, B0)
        assert layer.scaling == kappa and torch.equal(layer.lora_A, A0)
        close(layer.lora_B.detach(), W0 @ A0.mT / kappa if B0 is None else B0)
        close(layer.base_layer.weight, W0 - kappa * layer.lora_B @ A0, rtol=1e-5, atol=1e-5)
        close(layer(x), before, rtol=1e-4, atol=1e-4)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


# ---- the recipe ----------------------------------------------------------------------------------

def low_rank_inputs(d=16, seed=0):
    """Pretraining inputs in 10 of 16 dimensions, task inputs in 4 of those and 4 others, and what
    of the task lies in the others."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    pre = torch.randn(400, 10, generator=g) @ basis[:, :10].mT
    task = torch.randn(300, 8, generator=g) @ basis[:, 6:14].mT
    return pre, task, task @ basis[:, 10:13]


def fit(model, optimizer, x, y, steps=150):
    """The last loss over the first."""
    losses = []
    for _ in range(steps):
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses[-1] / losses[0]


@pytest.mark.parametrize("how", [dict(lr=1e-2, zero_start=False), dict(lr=3e-2, basis_rank=8)])
def test_prepare_on_a_bare_mlp_learns_and_keeps_more_than_lora(how):
    pre, task, new = low_rank_inputs()
    torch.manual_seed(0)
    model = MLP()
    lora, before = copy.deepcopy(model).requires_grad_(False), model(pre).detach()
    lora.first = folora.LoRALinear(lora.first, 4)
    adam = torch.optim.Adam([lora.first.lora_A, lora.first.lora_B], 1e-2)
    optimizer = folora.prepare(model, [{"x": pre}], [{"x": task}], rank=4, target_modules="first",
                               lam=3.0, **how)
    close(model(pre), before, rtol=1e-4, atol=1e-5)                  # the start does not perturb
    assert (model.first.lora_B.abs().max() == 0) == how.get("zero_start", True)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["first.lora_A", "first.lora_B"]
    learned = fit(model, optimizer, task, torch.sin(new))
    fit(lora, adam, task, torch.sin(new))
    moved = [(m(pre) - before).norm() for m in (model, lora)]
    assert learned < 0.7 and moved[0] < 0.5 * moved[1], (learned, moved)
    adapted, merged = model(task).detach(), folora.merge(model)
    assert type(merged.first) is nn.Linear
    close(merged(task), adapted, rtol=1e-4, atol=1e-4)


def test_prepare_is_its_parts_literally():
    """One layer by hand in float64, every option at a value of its own."""
    pre, task, _ = low_rank_inputs()
    model, k = MLP(), 5
    W0 = model.first.weight.detach().clone().double()
    a, b = folora.prepare(model, [{"x": pre}], [{"x": 100 * task}], 0.1, rank=3, alpha=6, tau=0.05,
                          lam=2.0, s_min=0.2, target_modules="first", zero_start=False,
                          basis_rank=k).param_groups
    unit = lambda X: X.mT.double() @ X.double() / (X.double() ** 2).sum() * X.shape[1]
    C_pre, C_task = unit(pre), unit(task)    # the task's factor of 100 divides out
    gamma, V = scipy.linalg.eigh(C_task.numpy(), C_pre.numpy() + 0.05 * numpy.eye(16))
    gamma, V = torch.tensor(gamma).flip(0)[:k], torch.tensor(V).flip(1)[:, :k]
    assert (a["lr"], b["lr"], b["basis"], a["scale"], b["scale"]) == (0.1, 0.1, None, 1.0, 1.0)
    assert (a["params"], b["params"]) == ([model.first.lora_A], [model.first.lora_B])
    gate = torch.clamp(gamma / (gamma + 2.0), min=0.2)
    close(a["gate"].double(), gate, rtol=1e-3, atol=1e-4)
    ours = (a["basis"] * a["gate"]).double() @ a["basis"].mT.double()
    close(ours, V * gate @ V.mT, rtol=1e-2, atol=1e-2)
    A0 = model.first.lora_A.detach().double()
    assert A0.shape == (3, 16) and energy(A0, C_pre) < 1e-5          # 16 - 10 null directions
    close(2.0 * model.first.lora_B.detach().double(), W0 @ A0.mT, rtol=1e-4, atol=1e-5)


def test_defaults_are_the_scripts_and_b4s():
    wanted = {**train_math.PRESETS["tuned"], "rank": 128, "tau": 0.01, "min_new_tokens": 128,
              "max_new_tokens": 512, "batch_size": 64, "seed": 0,
              "target_modules": folora.TARGET_MODULES}
    for function in (folora.prepare, folora.attach, folora.sample_calibration):
        for name, parameter in inspect.signature(function).parameters.items():
            assert parameter.default in (inspect.Parameter.empty, wanted.get(name)), name


def test_one_learning_rate_serves_every_scale():
    """From B = 0: weights 8 times as large train 8 times as far, and alpha changes nothing."""
    pre, task, _ = low_rank_inputs()
    target = 1e3 * torch.randn(300, 32)      # large gradients: Adam's eps is no part of this
    updates = []
    for scale, alpha in ((1.0, None), (8.0, None), (1.0, 16.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32, bias=False))
        W0 = model[0].weight.detach().mul_(scale).clone()
        optimizer = folora.prepare(model, [{"input": pre}], [{"input": task}], 1e-2, rank=4,
                                   alpha=alpha, target_modules="0")
        size = W0.norm().item() / math.sqrt(4 * 32) / model[0].scaling
        assert optimizer.param_groups[1]["scale"] == pytest.approx(size, rel=1e-5)
        fit(lambda x: model(x) / scale, optimizer, task, target, 5)
        updates.append((folora.merge(model)[0].weight - W0) / scale)
    for update in updates[1:]:
        close(update, updates[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("basis_rank", [None, 3, 8, 17])
def test_each_distinct_input_is_solved_once_and_then_free(basis_rank):
    model, left, widths = Block(), [], {"down_proj": 16}
    C_pre, C_task = (folora.collect_covariances(model, [{"x": torch.randn(4, 20, 8)}],
                                                BLOCK_TARGETS) for _ in range(2))
    alive = [weakref.ref(C) for C in (*C_pre.values(), *C_task.values())]
    bases = folora.decompose(C_pre, C_task, 2, basis_rank=basis_rank, progress=lambda one: (
        left.append((one, len(C_pre), len(C_task), sum(C() is not None for C in alive)))))
    assert left == [(1, n, n, 2 * n) for n in (3, 2, 1, 0)]          # after q, k, v; o; up; down
    assert [basis["modules"] for basis in bases] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["up_proj"], ["down_proj"]]
    for basis in bases:
        d = widths.get(basis["modules"][0], 8)
        shapes = [tuple(basis[name].shape) for name in ("A0", "V", "gamma")]
        assert shapes == [(2, d), (d, min(basis_rank or d, d)), (min(basis_rank or d, d),)]
    groups = folora.attach(model, bases, 0.1).param_groups
    attention = [getattr(model, f"{name}_proj").lora_A for name in "qkv"]
    assert all(p is A for p, A in zip(groups[0]["params"], attention, strict=True))


@pytest.mark.parametrize("dtype, wanted", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_adapters_are_float32_a_basis_may_be_bfloat16_and_merge_rounds_once(dtype, wanted):
    model, C = nn.ModuleDict({"f": nn.Linear(16, 12).to(dtype)}), covariance(16, 40).float()
    optimizer = folora.attach(model, folora.decompose({"f": C}, {"f": C}, 4), lr=0.1, alpha=8)
    layer, before = model["f"], model["f"].base_layer.weight.double()
    assert optimizer.param_groups[0]["basis"].dtype == wanted
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.ones(5, 16, dtype=dtype)).dtype == dtype
    W = before + 2 * nn.init.normal_(layer.lora_B).double() @ layer.lora_A.double()
    assert (folora.merge(model)["f"].weight == W.to(dtype)).float().mean() > 0.98


def test_the_file_stands_alone(tmp_path):
    shutil.copy(HERE / "folora.py", tmp_path)
    code = "import sys, folora; assert not {'transformers', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# ---- B.4: calibration text -----------------------------------------------------------------------

@pytest.mark.parametrize("distinct, n, equal, reason", [
    (99, 31, 0, "fewer than 32 tokens"), (99, 32, 0, None),
    (40, 40, 20, "a run of 20 equal tokens"), (40, 40, 19, None),
    (15, 127, 0, None), (15, 128, 0, "too few distinct tokens"), (16, 128, 0, None),
    (23, 200, 0, "too few distinct tokens"), (24, 200, 0, None),     # 24 of 200 are 0.12
    (60, 255, 0, None), (63, 256, 0, "too few distinct 4-grams"), (64, 256, 0, None),
    (63, 259, 0, "too few distinct 4-grams"), (64, 259, 0, None)])   # 64 of 256 4-grams are 0.25
def test_screen_rejects_degenerate_text_and_nothing_just_short_of_it(distinct, n, equal, reason):
    """n tokens that go round so many distinct ones, and then so many equal ones."""
    assert folora.reject_reason([i % distinct for i in range(n)] + [777] * equal) == reason


class FakeGenerator(nn.Module):
    """Stands in for a language model: `generate` returns what `script` says, or random tokens."""

    def __init__(self, script=lambda: torch.randint(3, 9999, (40,)).tolist(), **config):
        super().__init__()
        self.weight, self.script, self.calls = nn.Parameter(torch.zeros(1)), script, []
        self.generation_config = SimpleNamespace(**config)

    def generate(self, ids, attention_mask, pad_token_id, **settings):
        self.calls.append({**settings, "count": len(ids)})
        assert not self.training and not vars(self.generation_config)
        assert ids.shape == attention_mask.shape == (len(ids), 1) and attention_mask.all()
        rows = [self.script() for _ in range(len(ids))]
        rows = [row + [pad_token_id] * (max(map(len, rows)) - len(row)) for row in rows]
        return torch.cat([ids, torch.tensor(rows)], dim=1)


def sample(model, *how, bos=1, **options):
    tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=2, decode=str)
    return [text.tolist() for text in folora.sample_calibration(model, tokenizer, *how, **options)]


def test_sampling_draws_decoding_from_the_mixture_in_batches():
    count = iter(range(10 ** 6))
    numbered = lambda: [3 + next(count), *range(10 ** 6, 10 ** 6 + 39)]
    model, bar, share = FakeGenerator(numbered), [], Counter()
    texts = sample(model, 2000, 60, 60, batch_size=128, progress=bar.append)
    assert len(texts) == 2000 and bar == [1] * 2000 and model.training
    written = [text[1] for text in texts]
    assert sorted(written[:500]) != sorted(written)[:500]            # a slice is a sample
    assert all(len(text) == 41 and text[0] == 1 for text in texts)
    for call in model.calls:
        assert call["do_sample"] and call["count"] <= 128 and call["eos_token_id"] == [2]
        assert (call["min_new_tokens"], call["max_new_tokens"]) == (60, 60)
        share[call["temperature"], call["top_p"], call["top_k"]] += call["count"] / 2000
    mixture = {(1.0, 1.0, 0): 0.7, (1.0, 0.95, 0): 0.2, (1.2, 0.98, 50): 0.1}
    assert share == pytest.approx(mixture, abs=0.04)
    assert len(model.calls) <= 2 * 3 + 2000 // 128


def test_sampling_replaces_rejects_and_duplicates_and_cuts_at_end_of_sequence():
    good = lambda k: list(range(k, k + 50))
    queue = [good(10), good(10), [5] * 50, good(70), good(3000)[:20], good(130) + [2, 7, 7],
             good(190) + [8, 9], good(250), good(310), good(370)]
    model = FakeGenerator(lambda: queue.pop(0), eos_token_id=[2, 8])
    assert sorted(sample(model, 4, 32, 64)) == [[1] + good(k) for k in (10, 70, 130, 190)]
    assert model.calls[0]["eos_token_id"] == [2, 8] == model.generation_config.eos_token_id


@pytest.mark.parametrize("own, configured, wanted", [(5, 6, 5), (None, 6, 6), (None, None, 2)])
def test_a_text_starts_with_bos_or_else_the_configurations_or_else_eos(own, configured, wanted):
    model = FakeGenerator(bos_token_id=configured)
    assert {text[0] for text in sample(model, 3, 1, 1, bos=own)} == {wanted}


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    draw = lambda **seed: sample(FakeGenerator(), 5, **seed)
    state = torch.random.get_rng_state()
    assert draw() == draw(seed=0) != draw(seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("accepted, wanted, rejected", [(0, 100, 64), (2, 10, 64), (2, 100, 100)])
def test_sampling_gives_up_after_so_many_rejects_in_a_row(accepted, wanted, rejected):
    queue = [list(range(k + 3, k + 53)) for k in range(accepted)]
    model = FakeGenerator(lambda: queue.pop() if queue else [5] * 50)
    with pytest.raises(RuntimeError, match=f"text: .*'exact duplicate': {rejected - 1}}}"):
        sample(model, wanted)
    assert model.training


def test_sampling_from_a_real_model_is_plain_whatever_it_is_configured_for(tiny):
    (model, tokenizer), texts = copy.deepcopy(tiny), []
    config = dict(repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.9, num_beams=2)
    for _ in range(2):
        texts.append(folora.sample_calibration(model, tokenizer, 6, 128, 140))
        vars(model.generation_config).update(config)
    assert config.items() <= vars(model.generation_config).items()
    # it says what it was pretrained on: known words, in known forms
    forms, known = r"Q: .*\?\nA: |### Instruction|\d [+-] \d+ = \d|\.\n\n", 0
    for text, again in zip(*texts, strict=True):
        assert text[0] == tokenizer.bos_token_id and 129 <= len(text) <= 141
        assert tokenizer.eos_token_id not in text and torch.equal(text, again)
        known += bool(re.search(forms, tokenizer.decode(text)))
    assert known >= 5


# ---- bad input -----------------------------------------------------------------------------------

def unread():
    raise AssertionError("a forward pass was about to run")
    yield


def collect(batches=(), model=None, targets=BLOCK_TARGETS):
    return folora.collect_covariances(model or Block(), batches, targets)


def prepare(model=None, batches=None, **how):
    how = dict(lr=0.1, rank=2, target_modules="first") | how
    return folora.prepare(model or MLP(), batches or unread(), batches or unread(), **how)


def attach(model, *names):
    """Adapters on these layers, from bases for inputs as wide as those of an MLP."""
    C = {name: torch.eye(16 if name == "first" else 32) for name in names}
    folora.attach(model, folora.decompose(dict(C), dict(C), 2) if C else [], 0.1)
    return model


partial, nan, inf = functools.partial, math.nan, math.inf
I3, ONES = torch.eye(3), torch.ones(2, 4)
TIED = nn.ModuleDict(dict.fromkeys(("q_proj", "k_proj"), nn.Linear(8, 8)))
REFUSED = [                                  # (message, call, options that are wrong, others, ...)
    ("rank . is not from 1 to 8, q_proj's width", partial(folora.find_targets, Block(), "q_proj"),
     dict(rank=0), dict(rank=9)),
    ("gate_proj, but down_proj, k_", collect, dict(targets=(*BLOCK_TARGETS, "gate_proj"))),
    ("called .nothing., but down_proj", collect, dict(targets=())),
    ("called proj, but down_proj", collect, dict(targets="proj")),
    ("q_proj is quantised", collect, dict(model=Block().to(torch.float8_e4m3fn))),
    ("q_proj shares its weight", collect, dict(model=TIED, targets=["q_proj"])),
    ("no token reached q_proj", collect, dict(batches=[])),
    ("inputs of q_proj are not finite", collect, dict(batches=[{"x": nan * torch.ones(2, 8)}])),
    (r"received \(5, 2\) rows where attention_mask is \(2, 5\)", collect,
     dict(batches=[{"x": torch.ones(5, 2, 8), "attention_mask": torch.ones(2, 5)}])),
    (r"a covariance \+ 0.1 I is not positive", partial(folora.generalized_eigenbasis, I3, tau=0.1),
     dict(C_pre=-I3), dict(C_pre=I3 / 0), dict(C_pre=nan * I3)),
    ("eigenproblem of a layer", partial(folora.generalized_eigenbasis, C_pre=I3, tau=0.1),
     dict(C_task=nan * I3)),
    ("rank . is not from 1 to 3, the input", partial(folora.null_space, I3),
     dict(rank=0), dict(rank=4)),
    ("is out of range", partial(folora.SAdam, [ONES], lr=0.1), dict(lr=-1), dict(lr=inf),
     dict(betas=(1, 0.9)), dict(betas=(0.9, -0.1)), dict(eps=-1), dict(eps=inf), dict(eps=nan)),
    ("needs both|do not fit", lambda **group: folora.SAdam([{"params": [ONES], **group}], 0.1),
     dict(basis=torch.eye(4)), dict(gate=torch.ones(4)), dict(basis=I3, gate=torch.ones(3)),
     dict(basis=torch.eye(4), gate=torch.ones(3)), dict(basis=ONES[0], gate=torch.ones(()))),
    ("rank . is not from 1 to 6, the input width, or not A0's",
     partial(folora.LoRALinear, nn.Linear(6, 5), rank=2), dict(rank=0), dict(rank=7),
     dict(A0=torch.ones(3, 6)), dict(A0=torch.ones(2, 5))),
    ("alpha must be > 0", partial(folora.LoRALinear, nn.Linear(6, 5), 2),
     dict(alpha=0), dict(alpha=inf)),
    ("rank .* is not from 1 to 16, first", prepare, dict(rank=17), dict(rank=0)),
    ("tau and alpha must be > 0", prepare,
     dict(tau=0), dict(tau=inf), dict(alpha=0), dict(alpha=inf)),
    ("lr must be >= 0 and basis_rank >= 1", prepare,
     dict(lr=-1), dict(lr=inf), dict(lr=nan), dict(basis_rank=0)),
    ("lam must be > 0, s_min in", prepare, dict(lam=0), dict(lam=-1), dict(lam=inf), dict(lam=nan),
     dict(s_min=1.1), dict(s_min=-0.1)),
    ("need the same layers", partial(folora.decompose, rank=2), dict(C_pre={}, C_task={}),
     dict(C_pre={"a": I3, "b": I3}, C_task={"a": I3})),
    ("no bases", partial(attach, MLP()), {}),
    ("leave torch.inference_mode", torch.inference_mode()(partial(attach, MLP(), "first")), {}),
    ("has adapters already", lambda: attach(attach(MLP(), "first"), "second"), {}),
    (".* to 50 new tokens", partial(sample, None, 1, max_new_tokens=50),
     dict(min_new_tokens=100), dict(min_new_tokens=0)),
]
MISUSED = [                                  # what folora.py does not say yet
    ("has adapters already", lambda: prepare(attach(MLP(), "first")), {}),
    ("batch.*dict", prepare, dict(batches=[ONES]), dict(batches=[(ONES,)]), dict(batches={"x": 1})),
]


@pytest.mark.parametrize("message, call, how", [
    *((message, call, how) for message, call, *hows in REFUSED for how in hows),
    *(pytest.param(message, call, how, marks=pytest.mark.xfail(strict=True))
      for message, call, *hows in MISUSED for how in hows)])
def test_misuse_of_folora_is_refused(message, call, how):
    with pytest.raises(ValueError, match=message):
        call(**how)


def test_the_bounds_themselves_are_allowed():
    """A rank as large as the input, one direction, no learning, an open gate, an eps of zero."""
    folora.SAdam([ONES], lr=0, betas=(0, 0), eps=0)
    x = torch.randn(40, 16)
    group, _ = prepare(batches=[{"x": x}], rank=16, basis_rank=1, lr=0, s_min=1).param_groups
    assert group["params"][0].shape == (16, 16) and group["basis"].shape == (16, 1)
    assert group["lr"] == 0 and group["gate"] == 1


@pytest.mark.xfail(strict=True)
@pytest.mark.parametrize("model, names", [
    (MLP(8), ["first"]), (MLP(), ["first", "third"]),
    (nn.ModuleDict({"first": nn.Linear(16, 4), "second": nn.ReLU()}), ["first", "second"])])
def test_bases_of_another_model_are_refused_and_leave_it_as_it_was(model, names):
    with pytest.raises(ValueError, match=names[-1]):
        attach(model, *names)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, folora.LoRALinear) for module in model.modules())


# ---- eval.py -------------------------------------------------------------------------------------

# (text, answers, correct on nq_open, on triviaqa), as lm-eval 0.4.13 scores them: see below
EXACT = [
    ("Paris", ["Paris", "Lutetia"], 1, 1),
    ("paris", ["Paris"], 1, 1),
    ("the Eiffel Tower", ["Eiffel Tower"], 1, 0),
    ("The Eiffel tower!", ["eiffel tower"], 1, 0),
    ("Eiffel", ["Eiffel Tower"], 0, 0),
    ("U.S.A", ["USA"], 1, 1),
    ("", ["Paris"], 0, 0),
    ("an apple", ["a apple"], 1, 0),
    ("banana the", ["banana"], 0, 0),
    ("December 14 1972", ["14 December 1972 UTC", "December 14, 1972"], 1, 1),
    ("theatre", ["atre"], 0, 0),
    ("THE WHO", ["who"], 0, 0),
]


@pytest.mark.parametrize("text, answers, nq, trivia", EXACT)
def test_exact_match(text, answers, nq, trivia):
    assert (ev.exact_match(text, answers), ev.exact_match(text, answers, articles=False)) == (
        bool(nq),
        bool(trivia),
    )


def test_metrics_agree_with_lm_eval():
    metrics = pytest.importorskip(
        "lm_eval.api.metrics",
        reason="pip install lm-eval==0.4.13 to compare with it; its verdicts stand in EXACT",
    )
    from lm_eval.tasks.webqs.utils import doc_to_choice

    nq = dict(
        ignore_case=True,
        ignore_punctuation=True,
        regexes_to_ignore=["\\b(?:The |the |An |A |The |a |an )"],
    )
    for text, answers, on_nq, on_trivia in EXACT:
        score = lambda **how: max(
            metrics.exact_match_hf_evaluate([text], [a], **how)["exact_match"] for a in answers
        )
        assert (
            score(**nq) == on_nq and score(ignore_case=True, ignore_punctuation=True) == on_trivia
        )
    for answers in (["Spanish", "Spain", "Spanish Language"], ["b", "a", "ab"]):
        assert ev.shortest_prefixes(answers) == doc_to_choice({"answers": list(answers)})


def test_text_is_cut_at_the_first_stop():
    assert (
        ev.until(" Paris, France.\nQ: next", ("\n", ".", ",")) == "Paris"
        and ev.until(" Paris ", ("\n",)) == "Paris"
    )


def test_numbers_after_the_answer_is():
    assert [
        ev.final_number(t)
        for t in (
            "The answer is: 18",
            "The answer is: $1,234.50.",
            "The answer is: 3. The answer is: -4",
            "18",
            "The answer is: none",
            "so\nThe answer is: 5%",
        )
    ] == [18, 1234.5, -4, None, None, 5]
    assert ev.boxed(r"first \boxed{1} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"


def test_fields_of_the_other_training_sets():
    """One row each of CodeFeedback-Filtered-Instruction, WizardLM_evol_instruct_70k, MetaMathQA."""
    rows = [
        {"query": "q", "answer": "a", "resource": "evolinstruct", "lang": "python"},
        {"instruction": "q", "output": "a"},
        {"type": "GSM_Rephrased", "query": "q", "original_question": "o", "response": "a"},
    ]
    assert ev.to_pairs(rows, "x") == [("q", "a")] * 3


def test_pairs_are_found_under_every_name_and_gsm8k_notes_go():
    rows = [
        {"question": "q", "answer": "2+3=<<2+3=5>>5.\n#### 5"},
        {"query": "q", "response": "r"},
        {"instruction": "q", "input": "i", "output": "r"},
        {"query": "q", "answer": "r"},
    ]
    assert ev.to_pairs(rows, "x") == [
        ("q", "2+3=5.\nThe answer is: 5"),
        ("q", "r"),
        ("q\ni", "r"),
        ("q", "r"),
    ]
    with pytest.raises(
        SystemExit,
        match="x, line 2: no field called question or query or instruction or problem .*has: text",
    ):
        ev.to_pairs([rows[0], {"text": "t"}], "x")




def test_loss_is_on_the_response_and_equals_the_models_own(tiny, monkeypatch):
    model, tokenizer = tiny
    examples = ev.encode_all(
        tokenizer,
        [
            ("What is 2 + 2?", "It is 4.\nThe answer is: 4"),
            ("Sort these words: b a", "a b, as asked and no more"),
        ],
        256,
    )
    for example in examples:
        prompt = [i for i, label in zip(example["ids"], example["labels"]) if label == -100]
        assert (
            tokenizer.decode(prompt).endswith(
                "### Response:"
                if example is examples[1]
                else "### Response: Let's think step by step."
            )
            and example["labels"][-1] == tokenizer.eos_token_id
        )
        assert example["labels"][len(prompt) :] == example["ids"][len(prompt) :]
    batch = ev.collate(examples, "cpu")
    states, targets = ev.label_states(model, batch)
    logits = ev.logits_of(model, states)
    own = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    torch.testing.assert_close(nn.functional.cross_entropy(logits, targets), own)
    assert ev.mean_nll(model, examples, batch_size=1) == pytest.approx(own.item(), rel=1e-4)
    monkeypatch.setattr(ev, "LOGITS", 3 * logits.shape[1])  # three positions a piece
    assert len(ev.pieces(model, states)) == -(-len(states) // 3) > 1
    assert ev.mean_nll(model, examples, batch_size=1) == pytest.approx(own.item(), rel=1e-4)
    weight = model.model.layers[0].mlp.down_proj.weight
    ours, theirs = (
        torch.autograd.grad(loss, weight)[0]
        for loss in (ev.summed_nll(model, batch) / len(targets), own)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_drift_is_the_kl_of_next_token_distributions(tiny, monkeypatch):
    model, tokenizer = tiny
    other, _ = ev.load_model("tiny", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    texts = [
        torch.tensor(tokenizer(t)["input_ids"])
        for t in ("12 + 7 = 19\n", "Q: what is 4 + 4?\nA: 8\nQ: ")
    ]
    total = count = 0
    for t in texts:
        p, q = (m(t[None]).logits[0, :-1].double().softmax(-1) for m in (model, other))
        total, count = total + (p * (p / q).log()).sum().item(), count + len(p)
    assert ev.drift(other, model, texts) == pytest.approx(total / count, rel=1e-3) and total > 0
    assert train_math.Probe(model, texts, positions=400)(other) == pytest.approx(
        total / count, rel=1e-3
    )
    monkeypatch.setattr(ev, "LOGITS", 5 * model.config.vocab_size)
    assert ev.drift(other, model, texts) == pytest.approx(total / count, rel=1e-3)
    assert len(train_math.Probe(model, texts, positions=3 * len(texts)).before) == 3 * len(
        texts
    )  # as many of each


def test_webqs_by_greedy_text_is_greedy_likelihood(tiny):
    """Against the definition: every token of an answer is the argmax given all before it."""
    model, tokenizer = tiny
    rows = [
        {"question": q, "answers": a}
        for q, a in (
            ("what is 12 + 7", ["19", "20"]),
            ("what is 12 + 7", ["x"]),
            ("what does one say", ["A: 1", "b"]),
        )
    ]
    literal = []
    for row in rows:
        prompt, greedy = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"], False
        rows_own = tokenizer.decode(
            ev.greedy(model, tokenizer, [f"Question: {row['question']}\nAnswer:"], 3)[0]
        )
        row["answers"] = row["answers"] + ([rows_own.strip()] if row is rows[0] else [])
        for answer in ev.shortest_prefixes(row["answers"]):
            ids = torch.tensor(
                tokenizer(f"Question: {row['question']}\nAnswer: {answer}")["input_ids"]
            )
            greedy |= bool(
                (
                    model(ids[None]).logits[0, len(prompt) - 1 : -1].argmax(-1)
                    == ids[len(prompt) :]
                ).all()
            )
        literal.append(float(greedy))
    assert ev.score_webqs(model, tokenizer, rows, "x", "webqs") == literal


def test_summary_rows():
    before, after = (
        {"gsm8k": 10.0, "nq_open": 20.0, "webqs": 30.0, "drift": 0.0},
        {"gsm8k": 40.0, "nq_open": 15.0, "webqs": 25.0, "drift": 0.1},
    )
    assert ev.summarise(after, before) == {
        "Avg1": 20.0,
        "Avg1(%)": 80.0,
        "Avg2": 40.0,
        "GM": pytest.approx(math.sqrt(800)),
    }
    assert "drift" in ev.table({"untouched": before, "folora": after}) and "Avg1(%)" in ev.table(
        {"untouched": before, "folora": after}
    )
    assert "Avg1(%)" not in ev.table({"folora": after}) and "Avg1(%)" not in ev.summarise(
        after, {**before, "nq_open": 0.0, "webqs": 0.0}
    )


def test_the_harness_scores_a_local_task_into_the_same_table(tmp_path, capsys, monkeypatch):
    """tiny's facts as a task of one's own: the built-in score, and in Avg1 like the others."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13 for --harness")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/world.yaml").write_text(f"""
task: world
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {HERE / "tiny/facts.jsonl"}}}}}
output_type: generate_until
validation_split: validation
description: "Answer these questions:\\n\\n"
doc_to_text: "Q: {{{{question}}}}?\\nA:"
doc_to_target: "{{{{answer[0]}}}}"
generation_kwargs: {{until: ["\\n", ".", ","], do_sample: false, max_gen_toks: 64}}
filter_list:
  - {{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match, ignore_case: true, ignore_punctuation: true}}]
""")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "eval.py",
            "tiny",
            "--tasks",
            "facts,sums",
            "--harness",
            f"{tmp_path}/tasks/world",
            "--limit",
            "8",
        ],
    )
    ev.main()
    row = {
        line.split()[0]: float(line.split()[-1])
        for line in capsys.readouterr().out.splitlines()
        if len(line.split()) > 1
    }
    assert row["world"] == row["facts"] > 0 and row["Avg1"] == pytest.approx(
        (row["world"] + row["facts"] + row["sums"]) / 3, abs=0.01
    )
    with pytest.raises(SystemExit, match="lm-eval has no task nothing_of_the_kind"):
        ev.harness_tasks("nothing_of_the_kind")


def test_the_harness_is_asked_for_by_its_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        ev.harness_tasks("mmlu")


def test_one_score_of_a_harness_result():
    assert (
        ev.harness_score(
            {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}
        )
        == 25
    )
    assert (
        ev.harness_score(
            {
                "exact,none": 10.0,
                "HasAns_exact,none": 20.0,
                "NoAns_exact,none": 5.0,
                "sample_len": 7,
            }
        )
        == 20
    )
    assert (
        ev.harness_score(
            {
                "prompt_level_loose_acc,none": 0.5,
                "inst_level_strict_acc,none": 0.6,
                "prompt_level_strict_acc,none": 0.4,
            }
        )
        == 40
    )
    assert ev.harness_score({"pass@1,create_test": 0.1}) == 10
    assert (
        ev.role("mmlu") == "preserve"
        and ev.role("humaneval") == ev.role("gsm8k") == "target"
        and ev.role("GM") == ""
    )


def changed(folder, change):
    """A copy of tiny/ whose weights went through `change`."""
    shutil.copytree(ev.TINY, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_without_torch_distributed_there_is_one_process():
    assert ev.process() == (0, 1)
    assert ev.share([1, 2, 3]) == [1, 2, 3] and ev.mean(3, 2) == 1.5


def test_each_process_has_its_share(monkeypatch):
    monkeypatch.setattr(ev, "process", lambda: (1, 2))
    assert ev.share([1, 2, 3, 4]) == [2, 4]


def test_given_texts_are_the_texts_of_the_first_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"question": "b"}\n{"text": "c"}\n')
    assert ev.given_texts(str(path), 2) == ["a", "b"]


@pytest.mark.parametrize("row", ['{"text": 5}', '{"text": ["a"]}', '{"b": "a"}', '{"text": ""}'])
def test_a_row_without_a_text_is_named(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + row + "\n")
    with pytest.raises(SystemExit, match="a.jsonl, line 2: no field called text or question"):
        ev.given_texts(str(path), None)


def test_a_line_of_a_file_ends_at_a_line_feed_only(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"text": "a\u2028b\u0085c\u000cd\x1ce"}, {"text": "é"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n\n")
    assert ev.read_rows(str(path)) == rows
    assert ev.read_rows(str(path), limit=1) == rows[:1]


@pytest.mark.parametrize("line", [b'{"text": "\xff"}', b'{"text"', b"[1]", b"5", b'"a"', b"null"])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(SystemExit, match="a.jsonl, line 2: not JSON") as stopped:
        ev.read_rows(str(path))
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\r\n"])
def test_a_file_without_rows_gets_one_line(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="a.jsonl: no rows"):
        ev.read_rows(str(path))


def test_a_missing_file_and_a_data_set_out_of_reach_get_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="a.jsonl: no such file"):
        ev.read_rows(str(tmp_path / "a.jsonl"))

    def fails(*args, **kwargs):
        raise ConnectionError("no network\nand more")
    monkeypatch.setattr(ev.datasets, "load_dataset", fails)
    with pytest.raises(SystemExit, match="owner/data: .* no network$"):
        ev.read_rows("owner/data")


def test_greedy_ignores_the_checkpoints_penalties(tiny):
    model, tokenizer = tiny
    prompts = ["Question: what is 12 + 7\nAnswer:", "3 + 3 ="]
    expected, plain = ev.greedy(model, tokenizer, prompts, 12), model.generation_config
    options = dict(num_beams=3, no_repeat_ngram_size=1, repetition_penalty=9.0, min_p=0.1,
                   do_sample=True, suppress_tokens=expected[0][:1])
    model.generation_config = type(plain)(**{**plain.to_dict(), **options})
    try:
        assert ev.greedy(model, tokenizer, prompts, 12) == expected
        assert model.generation_config.num_beams == 3
    finally:
        model.generation_config = plain


def test_greedy_is_the_argmax_of_each_prompt_and_stops_at_the_models_own_end(tiny):
    model, tokenizer = tiny
    prompts, plain = ["Question: what is 12 + 7\nAnswer:", "3 + 3 ="], model.generation_config
    written = ev.greedy(model, tokenizer, prompts, 4)
    for prompt, tokens in zip(prompts, written):
        ids = tokenizer(prompt)["input_ids"]
        for token in tokens:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
    ends = [tokenizer.eos_token_id, written[0][1]]
    model.generation_config = type(plain)(**{**plain.to_dict(), "eos_token_id": ends})
    try:
        assert ev.greedy(model, tokenizer, prompts[:1], 4)[0] == written[0][:2]
    finally:
        model.generation_config = plain


def test_harness_names_have_a_score_of_their_own(monkeypatch):
    """Against a task manager with lm-eval's attributes: a task, a tag, and two groups."""
    index = {"task": SimpleNamespace(cfg={"task": "task"}), "tag": SimpleNamespace(cfg=None),
             "scored": SimpleNamespace(cfg={"aggregate_metric_list": [{"metric": "acc"}]}),
             "loose": SimpleNamespace(cfg={"group": "loose"})}
    manager = SimpleNamespace(all_subtasks=["task"], all_groups=["scored", "loose"],
                              all_tags=["tag"], all_tasks=sorted(index), task_index=index)
    seen = []
    manager_of = lambda include_path: seen.append(include_path) or manager
    monkeypatch.setattr(ev, "lm_eval", lambda module: SimpleNamespace(TaskManager=manager_of))
    assert ev.harness_tasks("own/task,scored") == (manager, ["task", "scored"])
    assert seen == [["own"]]
    for name in ("tag", "loose", "nothing"):
        with pytest.raises(SystemExit, match=f"lm-eval has no task {name} with a score of its own"):
            ev.harness_tasks(f"task,{name}")


def test_lm_eval_has_the_attributes_that_harness_tasks_reads():
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13 for --harness")
    assert ev.harness_tasks("truthfulqa_mc2,mmlu,ifeval,squadv2")[1][1] == "mmlu"
    for name in ("gpqa", "truthfulqa", "openllm"):
        with pytest.raises(SystemExit, match=f"no task {name} with a score of its own"):
            ev.harness_tasks(name)


def test_a_harness_name_is_refused_before_a_model_is_loaded(monkeypatch):
    def refuses(names):
        sys.exit(f"no task {names}")
    monkeypatch.setattr(ev, "harness_tasks", refuses)
    monkeypatch.setattr(ev, "load_model", None)
    monkeypatch.setattr(sys, "argv", ["eval.py", "tiny", "--tasks", "facts", "--harness", "gpqa"])
    with pytest.raises(SystemExit, match="no task gpqa"):
        ev.main()


def test_tied_weights_are_not_missing(tiny):
    assert tiny[0].get_output_embeddings().weight is tiny[0].get_input_embeddings().weight


def drop(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def add(weights):
    weights["model.layers.9.mlp.up_proj.weight"] = torch.ones(2)


def reshape(weights):
    weights["model.norm.weight"] = torch.ones(5)


@pytest.mark.parametrize("change, message", [
    (drop, "missing_keys in the weights, such as model.layers.1.mlp.up_proj.weight"),
    (add, "unexpected_keys in the weights, such as model.layers.9.mlp.up_proj.weight"),
    (reshape, "mismatched_keys in the weights, such as .*model.norm.weight")])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        ev.load_model(changed(tmp_path / "model", change), CPU, torch.float32)
    assert "\n" not in stopped.value.code


def test_weights_that_cannot_be_read_get_one_line(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ev.TINY, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
    with pytest.raises(SystemExit, match="cannot load the model") as stopped:
        ev.load_model(str(folder), CPU, torch.float32)
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize("error", [SystemExit("it is bad"), RuntimeError("it is bad")])
def test_finished_columns_are_printed_before_a_failure(tmp_path, monkeypatch, capsys, error):
    real, other = ev.load_model, shutil.copytree(ev.TINY, tmp_path / "other")

    def load_model(name, *where):
        if name == str(other):
            raise error
        return real(name, *where)
    monkeypatch.setattr(ev, "load_model", load_model)
    arguments = ["tiny", str(other), "--tasks", "facts", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    with pytest.raises(type(error), match="it is bad"):
        ev.main()
    printed = capsys.readouterr().out
    assert "facts" in printed and "Avg1" in printed and "other" not in printed


def test_logits_that_change_after_the_output_layer_are_refused(monkeypatch):
    from transformers import LlamaForCausalLM
    real = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out
    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(SystemExit, match="changes its logits after the output layer"):
        ev.load_model("tiny", CPU, torch.float32)


# ---- the baselines -------------------------------------------------------------------------------

@pytest.fixture
def layer():
    """A linear layer (10, 12) and the covariance of some inputs."""
    torch.manual_seed(0)
    X = torch.randn(400, 12) @ torch.randn(12, 12)
    return nn.Linear(12, 10), X.mT @ X / 400


def baseline(method, base, C, alpha=None):
    """(adapter, optimiser) of a baseline of rank 4 on a copy of a layer."""
    model = nn.ModuleDict({"q_proj": copy.deepcopy(base)})
    C_pre = {"q_proj": C} if method in baselines.NEEDS_C_PRE else None
    options = SimpleNamespace(rank=4, alpha=alpha, lr=1e-2)
    optimizer = baselines.add_adapters(method, model, options, C_pre, ("q_proj",))
    return model["q_proj"], optimizer


@pytest.mark.parametrize("alpha", [None, 12.0])
@pytest.mark.parametrize("method", baselines.STARTS)
def test_a_baseline_starts_as_its_layer_then_moves_and_merges(method, alpha, layer):
    base, C = layer
    x, (adapter, optimizer) = torch.randn(9, 12), baseline(method, base, C, alpha)
    near = dict(rtol=1e-5, atol=1e-5)
    close(adapter(x), base(x), **near)
    A, B = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
    fit(adapter, optimizer, x, torch.zeros(9, 10), 3)
    assert not torch.equal(adapter.lora_B, B)
    assert torch.equal(adapter.lora_A, A) == (method == "lora-null-v2")          # v2 freezes A
    assert not adapter.base_layer.weight.requires_grad
    y = adapter(x)
    close(adapter.merged()(x), y, **near)
    update = adapter.base_layer.weight.detach() - base.weight.detach()
    assert update.abs().max() > 1e-3
    if method == "oplora":                   # orthogonal to the top singular spaces on both sides
        U, _, Vh = torch.linalg.svd(base.weight.detach())
        assert max((U.mT @ update)[:4].abs().max(), (update @ Vh.mT)[:, :4].abs().max()) < 1e-5


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (12.0, 3.0)])
@pytest.mark.parametrize("method", ["milora", "lora-null", "lora-null-v2"])
def test_a_baselines_start_is_its_formula_in_numpy(method, alpha, kappa, layer):
    adapter = baseline(method, *layer, alpha)[0]
    A, B = (p.detach().double() for p in (adapter.lora_A, adapter.lora_B))
    W, C = layer[0].weight.detach().double().numpy(), layer[1].double().numpy()
    Q = numpy.linalg.svd(W)[2][6:10] if method == "milora" else numpy.linalg.eigh(C)[1][:, :4].T
    S = torch.tensor(numpy.linalg.svd(W @ Q.T)[1] / kappa).diag()    # of W in the span of Q's rows
    close(kappa * B @ A, torch.tensor(W @ Q.T @ Q), rtol=1e-4, atol=1e-4)
    for product in (A @ A.mT, B.mT @ B):
        close(product, S, rtol=1e-4, atol=1e-4)                      # both factors have √(S/κ)


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("method", ["lora", "corda"])
def test_a_start_is_pefts(method, alpha, layer, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import config, corda
    base, C = layer
    model = nn.ModuleDict({"q_proj": copy.deepcopy(base)})
    lora = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"])
    if method == "corda":
        torch.save({"q_proj": C.clone()}, tmp_path / "C.pt")
        lora.init_lora_weights, lora.corda_config = "corda", config.CordaConfig(
            corda_method="kpm", covariance_file=str(tmp_path / "C.pt"))
        corda.preprocess_corda(model, lora)
        ours = baseline("corda", base, C, alpha)[0]
    theirs = peft.get_peft_model(model, lora).base_model.model["q_proj"]
    if method == "lora":
        torch.manual_seed(3)
        theirs.reset_lora_parameters("default", True)
        torch.manual_seed(3)
        ours = folora.LoRALinear(base, 4, alpha)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    signs, near = torch.sign((ours.lora_A * A).sum(1)), dict(rtol=1e-3, atol=1e-4)
    close(ours.lora_A * signs[:, None], A, **near)                   # signs of singular vectors
    close(ours.lora_B * signs, B, **near)
    close(ours.base_layer.weight, theirs.base_layer.weight, **near)
    assert ours.scaling == theirs.scaling["default"]


# ---- the scripts, end to end ---------------------------------------------------------------------

FAST = ("--max-samples 64 --batch-size 8 --micro-batch-size 4 --max-steps 6 --log-every 2 --rank 8 "
        "--calibration-samples 4 --calibration-max-tokens 130 --task-samples 8 --eval-samples 4 "
        "--basis-rank 16 --compare no").split()
TASKS = f"gsm8k={ev.TINY / 'test.jsonl'},facts,nll={ev.TINY / 'test.jsonl'},drift"


METHODS = [("folora", ()), ("lora", ()), ("folora", ("--preset", "paper"))]


def script(name, *arguments):
    command = [sys.executable, str(HERE / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def read_json(path):
    return json.loads(path.read_text())


def metrics(out, leave=("tokens_per_s",)):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in leave} for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, what it printed) of a method with more options; each is trained once."""
    runs = {}

    def run(method, *more):
        if (method, *more) not in runs:
            out, printed = tmp_path_factory.mktemp("runs") / method, io.StringIO()
            with contextlib.redirect_stdout(printed):
                options = ["--method", method, "--tasks", TASKS, "--out", str(out)]
                train_math.main([*FAST, *options, *more])
            runs[method, *more] = out, printed.getvalue()
        return runs[method, *more]
    return run


@pytest.mark.parametrize("method, more", METHODS)
def test_training_writes_its_run(method, more, trained):
    out, printed = trained(method, *more)
    rows = ("untouched", method, "gsm8k", "facts", "nll", "drift", "Avg1", "Avg1(%)", "Avg2", "GM")
    assert all(row in printed for row in rows)
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "grad_norm", "drift"} == set(line) - {"step"} for line in lines)
    assert [line["drift"] is not None for line in lines] == [False, True] * 3
    assert lines[-1]["loss"] < lines[0]["loss"]
    summary, config = (read_json(out / f"{name}.json") for name in ("summary", "config"))
    assert config["options"]["rank"] == 8 and config["versions"]["torch"] == torch.__version__
    assert summary["seconds"]["train"] > 0 and summary["peak_memory_gb"] > 0
    left = sorted(p.name for p in out.iterdir())
    assert left == ["config.json", "merged", "metrics.jsonl", "summary.json"]
    tuned, untouched = summary["scores"][method], summary["scores"]["untouched"]
    assert tuned["nll"] < untouched["nll"] and tuned["drift"] > 0


def test_methods_start_at_the_same_function_and_end_at_different_ones(trained):
    runs = [trained("folora"), trained("lora"), trained("folora", "--preset", "paper")]
    losses = [[line["loss"] for line in metrics(out)] for out, _ in runs]
    assert all(line[0] == pytest.approx(losses[0][0], rel=1e-4) for line in losses)
    assert len({line[-1] for line in losses}) == 3


def test_lora_is_compared_in_the_same_run(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*FAST, "--tasks", f"nll={ev.TINY / 'test.jsonl'},drift", "--out", str(out)]
    train_math.main([*arguments, "--lr", "1e-2", "--compare", "lora"])
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.split()[:1] == ["untouched"])
    assert header.split() == ["untouched", "folora", "lora"]
    option = lambda run: json.loads((run / "config.json").read_text())["options"]
    assert (option(out)["method"], option(out / "lora")["method"]) == ("folora", "lora")
    assert option(out / "lora")["lr"] == 4e-3
    train_math.main([*arguments, "--lr", "1e-2", "--compare", "lora"])           # prints the table
    assert header in capsys.readouterr().out


def test_eval_reads_a_run(trained):
    out, _ = trained("folora")
    scores = json.loads((out / "summary.json").read_text())["scores"]
    tasks = f"nll={ev.TINY / 'test.jsonl'},facts,drift"
    done = script("eval.py", str(out), "tiny", "--tasks", tasks, "--limit", "4")
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    row = {line[0]: [float(x) for x in line[-2:]] for line in words if line[0] in ("nll", "drift")}
    columns = [scores["folora"], scores["untouched"]]
    assert row["nll"] == pytest.approx([s["nll"] for s in columns], abs=2e-3)
    assert row["drift"] == pytest.approx([s["drift"] for s in columns], abs=1e-4)


@pytest.mark.parametrize("method, more", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_numbers(method, more, trained, tmp_path,
                                                        monkeypatch):
    whole, _ = trained(method, *more)
    cut = tmp_path / "cut"
    arguments = [*FAST, "--method", method, "--tasks", TASKS, "--out", str(cut), *more]
    real, calls = train_math.train_step, []

    def fails_in_step_4(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_math, "train_step", fails_in_step_4)
    with pytest.raises(SystemExit, match=f"interrupted: the same command with --out {cut} goes on"):
        train_math.main(arguments)
    monkeypatch.setattr(train_math, "train_step", real)
    assert len(metrics(cut)) == 3
    with pytest.raises(SystemExit, match="holds a run with --rank 8"):
        train_math.main([*arguments, "--rank", "4"])
    with pytest.raises(SystemExit, match="interrupted"):
        ev.resolve_model(str(cut))
    train_math.main(arguments)
    assert metrics(whole) == metrics(cut)
    weights = [(run / "merged/model.safetensors").read_bytes() for run in (whole, cut)]
    assert weights[0] == weights[1]


def test_a_run_resumes_on_another_gpu_but_not_on_another_kind_of_device(tmp_path):
    options = train_math.parse_options(["--out", str(tmp_path)])
    options.device = "cuda:3"
    (tmp_path / "config.json").write_text(json.dumps({"options": vars(options)}))
    options.device = "cuda:0"
    train_math.check_run(options)
    options.device = "cpu"
    with pytest.raises(SystemExit, match="holds a run with --device cuda:3"):
        train_math.check_run(options)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(tmp_path, monkeypatch):
    real, calls = train_math.SummedNLL.forward, []

    def nan_in_step_3(self, examples):
        calls.append(1)
        return real(self, examples) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(train_math.SummedNLL, "forward", nan_in_step_3)
    arguments = [*FAST, "--method", "lora", "--tasks", "", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="not a finite number: loss nan.*the last checkpoint"):
        train_math.main(arguments)
    assert len(metrics(tmp_path / "run")) == 2
    assert torch.load(tmp_path / "run/checkpoint.pt")["step"] == 2


def some_examples(tokenizer, count):
    rows = ev.read_rows(str(ev.TINY / "train.jsonl"), limit=count)
    return ev.encode_all(tokenizer, ev.to_pairs(rows, "train"), 256)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    model, tokenizer = ev.load_model("tiny", torch.device("cpu"), torch.float32)
    examples, seen, parameters = some_examples(tokenizer, 6), [], list(model.parameters())
    for micro in (6, 2):
        model.zero_grad()
        spy = SimpleNamespace(param_groups=[{"params": parameters}], zero_grad=lambda: None,
                              step=lambda: seen.append([p.grad.clone() for p in parameters]))
        _, _, tokens = train_math.train_step(train_math.SummedNLL(model), spy, examples, micro)
        assert tokens == sum(len(e["ids"]) for e in examples)
    for a, b in zip(*seen):
        close(a, b, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_runs_the_layers_again_for_the_same_gradient():
    model, tokenizer = ev.load_model("tiny", torch.device("cpu"), torch.float32)
    example, calls, seen = some_examples(tokenizer, 1), [], []
    layers = model.requires_grad_(False).model.layers
    weight = layers[0].mlp.down_proj.weight.requires_grad_()
    layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (1, 0):
        train_math.recompute(model, on)
        inner = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Dropout))]
        assert not any(m.training for m in inner)
        seen.append(torch.autograd.grad(train_math.SummedNLL(model)(example), weight)[0])
    close(*seen)
    assert len(calls) == 3                   # twice with, once without


def torchrun(*command):
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, cwd=HERE,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    """The same global batch under torchrun: the same losses, scores and merged weights. Both start
    from one prepared.pt, because two sums of the same tokens differ in their last digit."""
    arguments = [*FAST, "--tasks", f"facts,nll={ev.TINY / 'test.jsonl'},drift"]
    real, one, two = train_math.train, tmp_path / "one", tmp_path / "two"
    copied = lambda *args: shutil.copytree(one, two) and real(*args)
    monkeypatch.setattr(train_math, "train", copied)
    train_math.main([*arguments, "--out", str(one)])
    done = torchrun("train_math.py", *arguments, "--out", two)
    assert done.stdout.count("Avg1(%)") == 1 and "eigenproblems" not in done.stderr
    for a, b in zip(metrics(one), metrics(two), strict=True):
        a, b = ({name: value or 0 for name, value in line.items()} for line in (a, b))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    scores = [read_json(run / "summary.json")["scores"]["folora"] for run in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-6)
    load = lambda run: ev.load_model(str(run), torch.device("cpu"), torch.float32)[0].state_dict()
    one, two = load(one), load(two)
    assert all((one[name] - two[name]).norm() < 1e-5 * one[name].norm() for name in one)


SHARED_WORK = """
import copy, os, sys, torch, torch.distributed.nn, folora
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_folora import Block, BLOCK_TARGETS
torch.manual_seed(0)
model, texts = Block(), [{"x": torch.randn(n, 8)} for n in (90, 70, 40)]
scaled = [{"x": t["x"] * torch.arange(1, 9)} for t in texts]
process, world = 0, 1
if len(sys.argv) > 2:
    torch.distributed.init_process_group("gloo")
    process, world = torch.distributed.get_rank(), 2
C = [folora.collect_covariances(model, t[process::world], BLOCK_TARGETS) for t in (texts, scaled)]
bases = folora.decompose(*map(dict, C), 2)
torch.save((*C, bases), f"{sys.argv[1]}-{process}.pt")
if world == 1:
    sys.exit()
nn, x = torch.nn, texts[0]["x"]
whole = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
spectral = folora.prepare(whole, [{"input": x}], [{"input": scaled[0]["x"]}], lr=1e-2, rank=4,
                          target_modules=("0", "2"), basis_rank=5)
sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (2,)))
groups = [{**{k: group[k] for k in ("basis", "gate")}, "params": [sharded[i].lora_A]}
          for i, group in zip((0, 2), spectral.param_groups)]
groups += [{"params": [sharded[i].lora_B], "scale": group["scale"]}
           for i, group in zip((0, 2), spectral.param_groups[2:])]
for net, optimizer in ((whole, spectral), (sharded, folora.SAdam(groups, lr=1e-2))):
    for _ in range(3):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
for a, b in zip(whole.parameters(), sharded.parameters()):
    torch.testing.assert_close(a, b.full_tensor())
    assert len(b.to_local()) * 2 == len(a)
torch.distributed.destroy_process_group()
os._exit(0)                                  # gloo's threads may abort an ordinary exit
"""


def test_two_processes_share_covariances_and_bases(tmp_path):
    """Each sees its share of the text, and both have the covariances and the bases of the whole.
    Where FSDP2 shards A, SAdam moves the shards as it moves the whole."""
    (tmp_path / "work.py").write_text(SHARED_WORK)
    subprocess.run([sys.executable, str(tmp_path / "work.py"), str(tmp_path / "one")], check=True,
                   env={**os.environ, "PYTHONPATH": str(HERE)})
    torchrun(tmp_path / "work.py", tmp_path / "two", "distributed")
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    for a, b, c in zip(one[2], two[0][2], two[1][2], strict=True):
        assert a["modules"] == b["modules"] == c["modules"]
        close(a["gamma"], b["gamma"], rtol=1e-4, atol=1e-5)
        close(a["V"].abs(), b["V"].abs(), rtol=1e-3, atol=1e-3)
        close(a["A0"].abs(), b["A0"].abs(), rtol=1e-3, atol=1e-3)
        assert all(torch.equal(b[name], c[name]) for name in ("A0", "gamma", "V"))
    for i in (0, 1):
        for name in one[i]:
            close(one[i][name], two[0][i][name], rtol=1e-5, atol=1e-5)
            assert torch.equal(two[0][i][name], two[1][i][name])


def test_schedule_and_order_of_the_data():
    rates = [train_math.schedule(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[3] == max(rates) == 1
    assert 0 < rates[-1] < 1e-3
    order = train_math.data_order(10, 4, 2, None, 0)
    assert [len(batch) for batch in order] == [4] * 5
    assert sorted(sum(order, []))[::2] == list(range(10))
    assert order != train_math.data_order(10, 4, 2, None, 1)
    assert len(train_math.data_order(10, 4, 1, 7, 0)) == 7


@pytest.mark.parametrize("arguments, message", [
    ("--model nowhere", "nowhere: no such directory, and no short name"),
    ("--model runs/nowhere", "runs/nowhere: no such directory"),
    ("--data nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--rank 193", "rank 193 is not from 1 to 192, model.layers.0.self_attn.q_proj's width"),
    ("--device cuda", "no CUDA GPU"), ("--device banana", "--device banana: it is cpu, cuda"),
    ("--tasks math", "pip install lm-eval"), ("--tasks facts,trivia", "unknown task trivia"),
    ("--max-steps 0", "--max-steps: must be finite and at least 1, not 0"),
    ("--batch-size 0", "--batch-size: must be"), ("--max-length 20", "raise it"),
    ("--seed 1000", "--seed 1000 is reserved for the held-out text"),
    ("--lam 0", "--lam: must be"), ("--s-min 2", "--s-min and"), ("--alpha 1e-300", "--alpha: "),
    ("--lr -1", "--lr: must be"), ("--lr inf", "--lr: must be"), ("--tau nan", "--tau: must be"),
    ("--method milora", "invalid choice: 'milora'"), ("--compare folora", "invalid choice"),
])
def test_bad_input_gets_one_line_before_any_work(arguments, message, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "math" in arguments and importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is there")
    with pytest.raises(SystemExit) as stopped:
        train_math.main([*FAST, "--out", str(tmp_path / "run"), *arguments.split()])
    code = stopped.value.code
    text = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert message in text and "\n" not in text
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(SystemExit, match="holds something else"):
        train_math.main([*FAST, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="cannot be made: Not a directory"):
        train_math.main([*FAST, "--out", str(tmp_path / "config.json" / "run")])


GOOD = '{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize("flag, content, message", [
    ("--data", GOOD + '{"question": "q"}\n', "line 2: no field called answer"),
    ("--data", GOOD + "[1, 2]\n", "line 2: not JSON with fields"),
    ("--data", GOOD + '{"question"\n', "line 2: not JSON"),
    ("--calibration", '{"a": 1}\n', "line 1: no field called text or question"),
    ("--calibration", '{"text": 5}\n', "line 1: no field called text or question with a text"),
    ("--tasks", GOOD, "line 1: its answer has no number after ####"),
])
def test_a_bad_line_of_a_file_is_named(flag, content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    value = f"gsm8k={path}" if flag == "--tasks" else str(path)
    with pytest.raises(SystemExit, match=f"rows.jsonl, {message}"):
        train_math.main([*FAST, flag, value, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory"), "lower --micro-batch-size"),
    (OSError(28, "No space left on device"), "the disk of .* is full")])
def test_out_of_memory_and_disk_say_what_to_do(error, message, monkeypatch):
    def fail(*_):
        raise error
    monkeypatch.setattr(train_math, "run", fail)
    with pytest.raises(SystemExit, match=message):
        train_math.main([])


def test_short_names_and_defaults():
    names = {"Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B", "Llama-2-7b": "meta-llama/Llama-2-7b-hf",
             "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M", "owner/name": "owner/name"}
    assert {name: ev.resolve_model(name) for name in names} == names
    paper = train_math.parse_options("--model Qwen2.5-1.5B --preset paper".split())
    wanted = dict(rank=128, lam=1.0, s_min=0.3, batch_size=128, max_length=512, basis_rank=0,
                  calibration_samples=2000, task_samples=256, zero_start=0, compare="no")
    assert {name: getattr(paper, name) for name in wanted} == wanted
    tuned = train_math.parse_options(["--lam", "2"])
    wanted = dict(lam=2.0, s_min=0.0, zero_start=1, compare="lora", **train_math.TINY)
    assert {name: getattr(tuned, name) for name in wanted} == wanted
    assert train_math.parse_options(["--model", str(ev.TINY)]).rank == 32
    assert "facts" in ev.default_tasks(str(ev.TINY))


def test_help_says_whose_each_default_is():
    for flag, _, _, text in train_math.OPTIONS:
        assert "ours" in text or "the paper's" in text, flag
    assert "--basis-rank" in script("train_math.py", "--help").stdout


# ---- the measurements ----------------------------------------------------------------------------

@pytest.fixture
def experiments(tmp_path, monkeypatch):
    from assets import experiments
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(experiments, "CACHE", tmp_path)
    return experiments


def test_an_experiments_run_is_the_command_lines(trained, experiments):
    row = experiments.run((*FAST, "--tasks", TASKS), False, "folora", [], None, 0)
    scores = read_json(trained("folora")[0] / "summary.json")["scores"]["folora"]
    del scores["Avg1(%)"]
    assert row["scores"] == pytest.approx(scores, abs=1e-5)


def test_changes_do_what_they_say(experiments):
    moved = {}
    for change in (None, *experiments.CHANGES):
        A, B = nn.Parameter(torch.zeros(4, 12)), nn.Parameter(torch.zeros(10, 4))
        spectral = {"params": [A], "basis": torch.eye(12), "gate": torch.full((12,), 0.6)}
        optimizer = folora.SAdam([spectral, {"params": [B], "scale": 0.7}], lr=0.1)
        if change:
            experiments.CHANGES[change](optimizer, SimpleNamespace(rank=4))
        A.grad, B.grad = torch.ones(4, 12), torch.ones(10, 4)
        optimizer.step()
        moved[change] = [round(-p.mean().item(), 4) for p in (A, B)]
    assert moved == {None: [0.06, 0.07], "A frozen": [0, 0.07], "plain Adam": [0.1, 0.07],
                     "A slow": [0.02, 0.07], "one lr": [0.06, 0.1]}


def test_a_front_is_read_between_its_points(experiments):
    line = [("", {"nll": (x, 0, 1), "drift": (y, 0, 1)}) for x, y in ((3, 1), (2, 3), (2.5, 9))]
    assert [experiments.kl_at(line, nll) for nll in (2.5, 2.0, 4.0, 1.0)] == [2, 3, 1, None]


def test_what_is_fresh_has_chosen_nothing(experiments):
    """Its test solutions, its held-out text and its seeds are others than the search's."""
    searched = train_math.parse_options(experiments.SUITES["smollm2"].split()).eval_samples
    assert experiments.FRESH_TEST.start == searched
    assert experiments.FRESH_TEXT["seed"] != ev.HELD_OUT_SEED
    seeds = [{run[3] for run in experiments.wanted(name)} for name in ("smollm2", "fresh")]
    assert not seeds[0] & seeds[1]


def test_the_nll_of_an_answer_is_of_the_answer_alone(experiments, tiny):
    row = {"question": "who", "answer": ["Tom", "T"]}
    example = experiments.with_answer(tiny[1], "Q: {}?\nA:", row)
    labelled = [i for i, label in zip(example["ids"], example["labels"]) if label != -100]
    assert tiny[1].decode(labelled) == " Tom"
    assert tiny[1].decode(example["ids"], skip_special_tokens=True) == "Q: who?\nA: Tom"


def test_the_report_prints_and_draws_what_has_been_measured(experiments, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib for the figure")
    runs = [{"method": method, "flags": flags, "change": change, "seed": seed,
             "scores": {"nll": 1.0 + seed / 5, "drift": 0.02}}
            for (label, _), (method, flags, change) in experiments.settings("smollm2").items()
            for seed in (0, 2) if label in ("LoRA", experiments.FOLORA)]
    experiments.write({"untouched": {"nll": 2.0, "drift": 0.0}, "runs": runs}, "smollm2")
    experiments.report()
    lines = capsys.readouterr().out.splitlines()
    assert "| LoRA | 2e-3 | 1.200 ± 0.283 | 0.0200 ± 0.0000 | 0.02 |" in lines
    assert (tmp_path / "tradeoff.png").exists()


# ---- the house -----------------------------------------------------------------------------------

def code_lines(path):
    """Lines that are neither blank nor comment nor docstring."""
    text = path.read_text()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER, tokenize.ENCODING}
    code = {line for token in tokenize.tokenize(io.BytesIO(text.encode()).readline)
            if token.type not in skipped for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


@pytest.mark.parametrize("name, lines, code", BUDGETS)
def test_a_file_is_no_longer_than_its_budget(name, lines, code):
    text = (HERE / name).read_text()
    assert len(text.splitlines()) <= lines and code_lines(HERE / name) <= code
    assert max(map(len, text.splitlines())) <= 100


def test_the_readme_is_short_and_its_python_runs(tmp_path):
    text = (HERE / "README.md").read_text()
    assert len(text.splitlines()) <= 166 and len(text.split()) <= 1350
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_readmes_commands_are_options_that_exist():
    text = "\n".join((HERE / name).read_text() for name in ("README.md", "assets/RESULTS.md"))
    commands = re.findall(r"train_math\.py(.*?)(?:#.*|`.*)?$", text, re.M)
    assert len(commands) > 2
    for rest in commands:
        train_math.parse_options(rest.split())
