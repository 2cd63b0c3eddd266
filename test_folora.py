"""Tests of FoLoRA, on a CPU: python -m pytest -q test_folora.py

Equations are held against scipy, numpy, torch.optim.Adam, PEFT, or a literal slow version here.
"""
import ast
import contextlib
import copy
import fcntl
import importlib.util
import io
import json
import math
import os
import re
import resource
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
from tqdm import tqdm

import eval as ev
import folora
import train_math
from assets import baselines, kill

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)
close = torch.testing.assert_close
CPU = torch.device("cpu")
# file, lines, lines of code
BUDGETS = [("folora.py", 565, 335), ("train_math.py", 555, 420), ("eval.py", 685, 445),
           ("assets/experiments.py", 445, 325)]


def covariance(d, tokens, condition=1.0, seed=0):
    """X Xᵀ / T in float64, with X's rows scaled so that its spectrum spans about `condition`."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    scale = torch.logspace(0, -0.5 * math.log10(condition), d, dtype=torch.float64)
    X = rotation @ (scale[:, None] * torch.randn(d, tokens, generator=g, dtype=torch.float64))
    return X @ X.mT / tokens


class Block(nn.Module):
    """q, k, v on one input; o on another; an MLP. It calls q_proj by keyword."""

    def __init__(self, d=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(d, d, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x, attention_mask=None):
        mixed = torch.tanh(self.q_proj(input=x) * self.k_proj(x) + self.v_proj(x))
        x = x + self.o_proj(mixed)
        return x + self.down_proj(torch.relu(self.up_proj(x)))


BLOCK_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class Twice(nn.Module):
    """Layers a and b read the same input, or two inputs, or (None) b reads nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, same):
        y = self.a(x)
        return y if same is None else y + self.b(x if same else 2 * x)


def literal_covariances(model, batches, targets):
    """Σ x xᵀ / T token by token, in float64, every module on its own."""
    sums, counts, handles, mask = {}, {}, [], None

    def hook(name):
        def see(module, args, kwargs, _):
            x = args[0] if args else kwargs["input"]
            keep = torch.ones(x.shape[:-1]) if mask is None else mask
            for row, k in zip(x.reshape(-1, x.shape[-1]).double(), keep.flatten()):
                if k:
                    sums[name] = sums.get(name, 0) + torch.outer(row, row)
                    counts[name] = counts.get(name, 0) + 1
        return see

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: sums[name] / counts[name] for name in sums}


# ---- 3.1: targets and covariances ----------------------------------------------------------------

MASK = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 2 + [1] * 3])


@pytest.mark.parametrize("inference", [False, True])
def test_covariances_are_means_of_x_xT_over_real_tokens(inference):
    torch.manual_seed(0)
    model = Block()
    batches = [{"x": torch.randn(3, 5, 8), "attention_mask": MASK}, {"x": torch.randn(2, 4, 8)}]
    with torch.inference_mode(inference):
        ours = folora.collect_covariances(model, batches, BLOCK_TARGETS)
    slow = literal_covariances(model, batches, BLOCK_TARGETS)
    assert ours.keys() == slow.keys()
    for name in slow:
        assert ours[name].dtype == torch.float32 and not ours[name].is_inference()
        close(ours[name].double(), slow[name], rtol=1e-5, atol=1e-6)


def test_covariances_do_not_depend_on_the_cut_into_batches():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(12, 5, 8)
    collect = lambda *parts: folora.collect_covariances(
        model, [{"x": part} for part in parts], BLOCK_TARGETS)
    whole, pieces, few = collect(x), collect(*x.split([1, 7, 4])), x[:3]
    again, literal = collect(x, few, few), collect(torch.cat([x, few, few]))
    for name in whole:
        close(whole[name], pieces[name])
        close(again[name], literal[name])    # the very same tensor counts again in a new batch


def test_modules_that_share_an_input_share_one_covariance():
    C = folora.collect_covariances(Block(), [{"x": torch.randn(2, 3, 8)}], BLOCK_TARGETS)
    assert C["q_proj"] is C["k_proj"] is C["v_proj"]
    assert len({id(c) for c in C.values()}) == 4


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, None), (None, True)])
def test_an_input_shared_in_some_batches_only_is_an_error(order):
    batches = [{"x": torch.randn(3, 4), "same": same} for same in order]
    with pytest.raises(ValueError, match="b shares its input"):
        folora.collect_covariances(Twice(), batches, ("a", "b"))


def test_bfloat16_inputs_are_summed_in_float32():
    """The inputs' products are no bfloat16 numbers, and a bfloat16 sum of ones stops at 256."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).to(torch.bfloat16)
    x = torch.tensor([[1.0, 1.0234375]]).expand(4096, 2).to(torch.bfloat16)
    C = folora.collect_covariances(model, [{"input": x}], ("0",))
    close(C["0"], x[:1].float().mT @ x[:1].float(), rtol=1e-4, atol=0)


def test_token_counts_beyond_float32_are_exact():
    total = torch.ones(1, 1, dtype=torch.float64)
    mean = folora._mean_over_processes("x", total, 2 ** 24 + 1)
    assert mean.item() == 1 / (2 ** 24 + 1)


def test_only_our_hooks_are_removed_also_when_the_forward_fails():
    model, calls = Block(), []
    model.q_proj.register_forward_pre_hook(lambda module, args: calls.append(1))
    model.train()
    model.o_proj.eval()                      # a mode of its own, which must survive
    with pytest.raises(TypeError):
        batches = [{"x": torch.randn(2, 3, 8)}, {"nonsense": 1}]
        folora.collect_covariances(model, batches, BLOCK_TARGETS)
    assert [len(m._forward_pre_hooks) for m in (model.q_proj, model.k_proj)] == [1, 0]
    assert model.training and model.q_proj.training and not model.o_proj.training


@pytest.mark.parametrize("model, targets, message", [
    (Block(), (*BLOCK_TARGETS, "gate_proj"), "gate_proj, but down_proj, k_proj, o_proj"),
    (Block(), (), "called .nothing., but down_proj"),
    (Block().to(torch.float8_e4m3fn), BLOCK_TARGETS, "q_proj is quantised"),
])
def test_targets_that_cannot_be_adapted_are_named(model, targets, message):
    with pytest.raises(ValueError, match=message):
        folora.find_targets(model, targets)


def test_targets_are_found_by_one_name_or_several():
    assert list(folora.find_targets(Block(), "q_proj")) == ["q_proj"]
    assert list(folora.find_targets(nn.Sequential(Block()), ["0.q_proj"])) == ["0.q_proj"]
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"rank {rank} is not from 1 to 8, q_proj's width"):
            folora.find_targets(Block(), BLOCK_TARGETS, rank)


@pytest.mark.parametrize("batches, message", [
    ([], "no token reached q_proj"),
    ([{"x": torch.full((1, 2, 8), math.nan)}], "inputs of q_proj are not finite"),
    ([{"x": torch.randn(5, 2, 8), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}],
     r"received \(5, 2\) rows where attention_mask is \(2, 5\)"),
])
def test_text_without_covariances_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        folora.collect_covariances(Block(), batches, BLOCK_TARGETS)


def test_tied_weights_are_refused_as_targets_and_left_alone_otherwise():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q_proj = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.lm_head = nn.Linear(4, 6, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, ids):
            return self.lm_head(self.q_proj(self.embed(ids)))

    model, batches = Tied(), [{"ids": torch.randint(6, (4, 5))}]
    prepare = lambda targets: folora.prepare(model, batches, batches, 1e-3, 2,
                                             target_modules=targets)
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        prepare(("q_proj", "lm_head"))
    embedding = model.embed.weight.detach().clone()
    prepare("q_proj")
    assert model.lm_head.weight is model.embed.weight and torch.equal(model.embed.weight, embedding)


# ---- 3.2: the generalized eigenbasis -------------------------------------------------------------

CASES = {
    "full rank": (covariance(40, 200, 1e2), covariance(40, 200, 1e2, seed=1), 1e-2),
    "condition 1e6": (covariance(40, 200, 1e6), covariance(40, 200, 1e6, seed=1), 1e-7),
    "fewer tokens than d": (covariance(40, 9), covariance(40, 15, seed=1), 1e-5),
    "no task direction": (covariance(40, 2), covariance(40, 200, seed=1), 1e-2)}


@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("case", CASES)
def test_eigenbasis_against_scipy(case, k):
    C_task, C_pre, tau = CASES[case]
    C_task, C_pre = C_task.float(), C_pre.float()
    gamma, V = (t.double() for t in folora.generalized_eigenbasis(C_task, C_pre, tau, k))
    H = C_pre.double() + tau * torch.eye(40)
    mu, U = scipy.linalg.eigh(C_task.double().numpy(), H.numpy())    # Eq. 11-15, ascending
    mu, U = torch.tensor(mu).flip(0)[:k], torch.tensor(U).flip(1)[:, :k]
    n, within = len(mu), dict(rtol=0, atol=5e-3 * mu[0].item())
    assert gamma.shape == (n,) and V.shape == (40, n)
    assert (gamma.diff() <= 0).all() and (gamma >= 0).all()
    close(gamma, mu, **within)
    close(V.mT @ H @ V, torch.eye(n).double(), rtol=0, atol=1e-2)
    close(V.mT @ C_task.double() @ V, gamma.diag(), **within)
    rho = (V * (C_task.double() @ V)).sum(0) / (V * (H @ V)).sum(0)  # Eq. 8-10 of each column
    close(rho, gamma, **within)
    alone = [i for i in range(n) if (abs(mu[i] - mu) > 0.02 * mu[0]).sum() == n - 1]
    assert alone
    for i in alone:                          # up to sign, away from repeated eigenvalues
        assert abs(V[:, i] @ H @ U[:, i]) > 0.99


def test_few_directions_of_a_wide_layer_are_those_of_largest_gamma():
    """Where k + 32 < d the subspace iteration is not exact, but Vᵀ H V = I all the same."""
    C_task, C_pre = (covariance(200, 900, 1e3, seed=seed).float() for seed in (0, 1))
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, 0.01, 10)
    all_gamma, _ = folora.generalized_eigenbasis(C_task, C_pre, 0.01)
    close(gamma, all_gamma[:10], rtol=5e-3, atol=0)
    H = C_pre + 0.01 * torch.eye(200)
    close(V.mT @ H @ V, torch.eye(10), rtol=0, atol=1e-4)
    close(V.mT @ C_task @ V, gamma.diag(), rtol=0, atol=1e-3 * gamma[0].item())


@pytest.mark.parametrize("k", [None, 5])
def test_a_stack_is_solved_as_its_layers_are(k):
    C_task, C_pre = (torch.stack([covariance(12, 50, 10, seed=s + first) for s in range(4)])
                     .float().view(2, 2, 12, 12) for first in (0, 9))
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, 0.01, k)
    rows, n = folora.null_space(C_pre, 3), k or 12
    assert (gamma.shape, V.shape, rows.shape) == ((2, 2, n), (2, 2, 12, n), (2, 2, 3, 12))
    for i in numpy.ndindex(2, 2):
        one, basis = folora.generalized_eigenbasis(C_task[i], C_pre[i], 0.01, k)
        near = dict(rtol=1e-3, atol=1e-3)
        close(gamma[i], one, **near)
        close(V[i].abs(), basis.abs(), **near)
        close(rows[i].abs(), folora.null_space(C_pre[i], 3).abs(), **near)


def test_the_ridge_is_tau():
    gamma, V = folora.generalized_eigenbasis(torch.eye(3), torch.zeros(3, 3), 0.25)
    close(gamma, torch.full((3,), 4.0))      # H = I / 4: γ = 4, V = 2 I up to rotation
    close(V.mT @ V, 4 * torch.eye(3))


def test_covariances_that_are_none_are_refused():
    for C_pre in (-torch.eye(3), torch.eye(3) * math.nan, torch.eye(3) * math.inf):
        with pytest.raises(ValueError, match=r"a covariance \+ 0.1 I is not positive definite"):
            folora.generalized_eigenbasis(torch.eye(3), C_pre, 0.1)
    with pytest.raises(ValueError, match="has no finite solution"):
        folora.generalized_eigenbasis(torch.eye(3) * math.nan, torch.eye(3), 0.1)


@pytest.mark.parametrize("failure", ["raises", "not finite"])
def test_eigh_that_fails_in_float32_is_tried_in_float64(failure, monkeypatch):
    real, M = torch.linalg.eigh, covariance(5, 20).float()

    def eigh(M):
        if M.dtype == torch.float64:
            return real(M)
        if failure == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        return torch.full((5,), math.nan), torch.eye(5)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = folora._eigh(M)
    assert values.dtype == vectors.dtype == torch.float32
    close(vectors * values @ vectors.mT, M)


# ---- 3.3: gate and optimiser ---------------------------------------------------------------------

def test_gate_is_eq_22():
    gamma = [100.0, 3.0, 1.0, 0.5, 0.01, 0.0]
    for lam, s_min in ((1.0, 0.3), (3.0, 0.0), (0.5, 1.0)):
        literal = [max(g / (g + lam), s_min) for g in gamma]
        close(folora.spectral_gate(torch.tensor(gamma), lam, s_min), torch.tensor(literal))
    for lam, s_min in ((0.0, 0.3), (-1.0, 0.3), (math.inf, 0), (1.0, 1.1), (1.0, -0.1)):
        with pytest.raises(ValueError, match="lam must be"):
            folora.spectral_gate(torch.ones(2), lam, s_min)


def literal_sadam(A, gradients, V, gate, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """Eq. 18-24 one number at a time, in float64: for each row of A and each column v_i of V."""
    A, V, gate = A.double().clone(), V.double(), gate.double()
    (r, d), k = A.shape, V.shape[1]
    m, v = [[0.0] * k for _ in range(r)], [[0.0] * k for _ in range(r)]
    for t, G in enumerate(gradients, 1):
        for row in range(r):
            delta = torch.zeros(d, dtype=torch.float64)
            for i in range(k):
                g = float(sum(G[row, j].double() * V[j, i] for j in range(d)))
                m[row][i] = beta1 * m[row][i] + (1 - beta1) * g
                v[row][i] = beta2 * v[row][i] + (1 - beta2) * g * g
                m_hat, v_hat = m[row][i] / (1 - beta1 ** t), v[row][i] / (1 - beta2 ** t)
                delta += -lr * m_hat / (math.sqrt(v_hat) + eps) * float(gate[i]) * V[:, i]
            A[row] += delta
    return A


def sadam_run(A, gradients, lr=0.01, **group):
    p = nn.Parameter(A.clone())
    optimizer = folora.SAdam([{"params": [p], **group}], lr)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        assert torch.equal(p.grad, G)        # never written
    return p.detach()


@pytest.fixture(params=[None, 4])
def spectral(request):
    """(A, gradients, V, gate), V square or narrow."""
    torch.manual_seed(3)
    C_task, C_pre = covariance(6, 30).float(), covariance(6, 30, seed=1).float()
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, 0.01, request.param)
    gradients = [torch.randn(3, 6) * 10 ** power for power in (0, -1, 0.5, -8)]
    return torch.randn(3, 6), gradients, V, folora.spectral_gate(gamma, 1.0, 0.3)


def test_sadam_against_eq_18_to_24_one_number_at_a_time(spectral):
    A, gradients, V, gate = spectral
    assert gate.max() - gate.min() > 0.1
    expected = literal_sadam(A, gradients, V, gate, 0.01)
    moved = sadam_run(A, gradients, basis=V, gate=gate)
    close(moved.double(), expected, rtol=1e-5, atol=1e-6)
    left_out = torch.eye(6) - V @ torch.linalg.pinv(V)               # 0 where V is square
    close((moved - A) @ left_out, torch.zeros(3, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-8])                       # float16 would lose the second
def test_a_bfloat16_basis_leaks_little_into_what_must_not_move(scale):
    torch.manual_seed(0)
    C_pre, C_task = (covariance(24, 40, seed=seed) for seed in (0, 1))
    C_pre += 1000 * torch.ones(24, 24)       # one huge direction, as a first token makes
    C_pre = (C_pre / C_pre.diagonal().mean()).float()
    gamma, V = folora.generalized_eigenbasis(C_task.float(), C_pre, 0.01)
    A, gradients = torch.randn(2, 24), [scale * torch.randn(2, 24) for _ in range(4)]
    gate = folora.spectral_gate(gamma, 1.0, 0.0)
    expected = literal_sadam(A, gradients, V, gate, 0.01)
    A_16 = sadam_run(A, gradients, basis=V.bfloat16(), gate=gate).double()
    penalty = lambda D: torch.trace(D @ (C_pre.double() + 0.01 * torch.eye(24)) @ D.mT)
    assert penalty(A_16 - expected) < 1e-3 * penalty(expected - A.double())


@pytest.mark.parametrize("dtype, wanted", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float32)])
def test_the_basis_is_bfloat16_if_the_base_is(dtype, wanted):
    model = nn.ModuleDict({"f": nn.Linear(8, 5).to(dtype)})
    bases = folora.decompose({"f": covariance(8, 20).float()}, {"f": covariance(8, 20).float()}, 2)
    optimizer = folora.attach(model, bases, lr=0.1)
    assert optimizer.param_groups[0]["basis"].dtype == wanted
    assert model["f"].lora_A.dtype == torch.float32


def test_sadam_does_not_notice_signs_of_the_eigenvectors(spectral):
    A, gradients, V, gate = spectral
    flipped = V * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])[:V.shape[1]]
    run = lambda basis: sadam_run(A, gradients, basis=basis, gate=gate)
    close(run(V), run(flipped))


@pytest.mark.parametrize("group", [{}, {"basis": torch.eye(6), "gate": torch.ones(6)}])
def test_sadam_is_torch_adam_without_a_basis_and_with_the_trivial_one(spectral, group):
    A, gradients, _, _ = spectral
    p = nn.Parameter(A.clone())
    adam = torch.optim.Adam([p], lr=0.01)
    for G in gradients:
        p.grad = G.clone()
        adam.step()
    close(sadam_run(A, gradients, **group), p.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrapped", [False, True])
def test_sadam_goes_on_from_its_state_dict(spectral, tmp_path, wrapped):
    """Also through accelerate, as under a Trainer, and with a basis of another sign in between."""
    A, gradients, V, gate = spectral
    straight = sadam_run(A, gradients, basis=V, gate=gate)
    p, wrap = nn.Parameter(A.clone()), lambda optimizer: optimizer
    if wrapped:
        wrap = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare
    first = wrap(folora.SAdam([{"params": [p], "basis": V, "gate": gate}], 0.01))
    for G in gradients[:2]:
        p.grad = G.clone()
        first.step()
    torch.save(first.state_dict(), tmp_path / "state")
    second = wrap(folora.SAdam([{"params": [p], "basis": -V, "gate": 0 * gate}], 0.5))
    second.load_state_dict(torch.load(tmp_path / "state"))
    for G in gradients[2:]:
        p.grad = G.clone()
        second.step()
    assert torch.equal(p, straight)
    moments = second.state_dict()["state"][0]
    assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == (3, V.shape[1])


def test_sadam_with_a_scheduler_accumulation_a_closure_and_missing_gradients():
    torch.manual_seed(0)
    p, unused = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.ones(3))
    q, how = nn.Parameter(p.detach().clone()), dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    optimizer, adam = folora.SAdam([p, unused], **how), torch.optim.Adam([q], **how)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    schedules = [cosine(o, 5) for o in (optimizer, adam)]
    for _ in range(5):
        for parameter, opt in ((p, optimizer), (q, adam)):
            for part in range(2):
                ((parameter - part) ** 4).sum().backward()           # accumulates
            opt.step()
            opt.zero_grad()
        for schedule in schedules:
            schedule.step()
    close(p, q)
    assert torch.equal(unused, torch.ones(3)) and unused not in optimizer.state

    def closure():
        optimizer.zero_grad()
        loss = (p ** 2).sum()
        loss.backward()
        return loss
    assert optimizer.step(closure) > 0


def test_sadam_moves_rows_alone_so_a_shard_of_rows_moves_as_in_the_whole(spectral):
    A, gradients, V, gate = spectral
    whole = sadam_run(A, gradients, basis=V, gate=gate)
    shard = sadam_run(A[1:2], [G[1:2] for G in gradients], basis=V, gate=gate)
    close(shard, whole[1:2])


FITS = {"basis": torch.eye(4)[:, :3], "gate": torch.ones(3)}
MISFITS = [{"basis": torch.eye(4)}, {"gate": torch.ones(4)},
           {"basis": torch.eye(3), "gate": torch.ones(3)}, {**FITS, "gate": torch.ones(4)}]


@pytest.mark.parametrize("group", [*MISFITS, {}])
def test_sadam_refuses_a_basis_that_does_not_fit_also_when_it_loads(group):
    p = nn.Parameter(torch.zeros(2, 4))
    if group:
        with pytest.raises(ValueError, match="do not fit|needs both"):
            folora.SAdam([{"params": [p], **group}], 0.1)
    optimizer = folora.SAdam([{"params": [p], **FITS}], 0.1)
    state = optimizer.state_dict()
    state["param_groups"][0].update({"basis": None, "gate": None, **group})
    with pytest.raises(ValueError, match="do not fit|needs both|in other groups"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["basis"] is FITS["basis"]       # nothing was loaded


@pytest.mark.parametrize("wrong", [dict(lr=-1), dict(lr=math.inf), dict(betas=(1.0, 0.9)),
                                   dict(eps=-1), dict(eps=math.nan)])
def test_sadam_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="out of range"):
        folora.SAdam([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **wrong})


# ---- B.3: the start ------------------------------------------------------------------------------

def energy(rows, C):
    return torch.trace(rows.double() @ C @ rows.double().mT).item()


@pytest.mark.parametrize("massive", [0.0, 1e4])
def test_null_space_holds_the_least_energy(massive):
    """Also where one direction, as a first token makes, has nearly all the energy."""
    C = covariance(60, 400, 1e3)
    direction = torch.nn.functional.normalize(torch.randn(60, 1).double(), dim=0)
    C = (C + massive * direction @ direction.mT).float().double()
    A0 = folora.null_space(C.float(), 7)
    close(A0 @ A0.mT, torch.eye(7), rtol=0, atol=1e-5)
    assert energy(A0, C) <= 1.02 * scipy.linalg.eigvalsh(C.numpy())[:7].sum()
    close(folora.null_space(1e-9 * C, 7).abs().float(), A0.abs(), rtol=1e-2, atol=1e-2)
    for rank in (0, 61):
        with pytest.raises(ValueError, match=f"rank {rank} is not from 1 to 60"):
            folora.null_space(C, rank)


@pytest.mark.parametrize("alpha", [None, 32.0])
def test_start_is_b3_and_exact_in_float32(alpha):
    torch.manual_seed(0)
    base, x, U = nn.Linear(64, 48), torch.randn(100, 64), folora.null_space(covariance(64, 300), 16)
    W0, before, U = base.weight.detach().clone(), base(x).detach(), U.float()
    layer, kappa = folora.LoRALinear(base, 16, alpha, U), 1.0 if alpha is None else 2.0
    assert layer.scaling == kappa and torch.equal(layer.lora_A, U)
    close(layer.lora_B.detach(), W0 @ U.mT / kappa)
    close(layer.base_layer.weight, W0 - W0 @ U.mT @ U, rtol=1e-5, atol=1e-6)
    close(layer(x), before, rtol=1e-5, atol=2e-6)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_plain_start_is_loras_and_given_factors_are_taken():
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48), torch.randn(10, 64)
    W0, before = base.weight.detach().clone(), base(x).detach()
    plain = folora.LoRALinear(base, 8)
    assert torch.equal(plain(x), before) and torch.equal(base.weight, W0)
    assert 0.9 / 8 < plain.lora_A.abs().max() <= 1 / 8               # uniform in ±1/√d_in
    A0, B0 = torch.randn(8, 64), torch.randn(48, 8)
    given = folora.LoRALinear(base, 8, 16, A0, B0)
    close(given.base_layer.weight, W0 - 2 * B0 @ A0)
    close(given(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(rank=7), dict(A0=torch.zeros(3, 6)),
                                   dict(alpha=0), dict(alpha=math.inf)])
def test_an_adapter_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="rank|alpha must be > 0"):
        folora.LoRALinear(nn.Linear(6, 5), **{"rank": 2, **wrong})


def test_adapters_are_float32_on_a_bfloat16_base_and_merge_rounds_once():
    base, x = nn.Linear(16, 12).to(torch.bfloat16), torch.randn(5, 16, dtype=torch.bfloat16)
    layer = folora.LoRALinear(base, 4, alpha=8)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        layer.lora_B.normal_()
    W = base.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    plain = layer.merged()
    assert type(plain) is nn.Linear
    assert (plain.weight == W.to(torch.bfloat16)).float().mean() > 0.98


@pytest.fixture(scope="module")
def tiny():
    return ev.load_model("tiny", torch.device("cpu"), torch.float32)


# ---- the recipe ----------------------------------------------------------------------------------

def low_rank_inputs(d=16, seed=0):
    """Pretraining inputs in 10 of 16 dimensions, task inputs in 4 of those and 4 others, and what
    of the task lies in the others."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    pre = torch.randn(400, 10, generator=g) @ basis[:, :10].mT
    task = torch.randn(300, 8, generator=g) @ basis[:, 6:14].mT
    return pre, task, task @ basis[:, 10:13]


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def fit(model, optimizer, x, y, steps=150):
    """The last loss over the first."""
    losses = []
    for _ in range(steps):
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses[-1] / losses[0]


@pytest.mark.parametrize("how", [dict(zero_start=False), dict(zero_start=True, basis_rank=8)])
def test_prepare_on_a_bare_mlp_learns_and_keeps(how):
    pre, task, new = low_rank_inputs()
    torch.manual_seed(0)
    model = MLP()
    lora, target, before = copy.deepcopy(model), torch.sin(new), model(pre).detach()
    lora.requires_grad_(False).first = folora.LoRALinear(lora.first, 4)
    plain = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], 1e-2)
    optimizer = folora.prepare(model, [{"x": pre}], [{"x": task}], 1e-2 if "basis_rank" not in how
                               else 3e-2, rank=4, target_modules="first", lam=3.0, s_min=0.0, **how)
    close(model(pre), before, rtol=1e-4, atol=1e-5)                  # the start does not perturb
    assert (model.first.lora_B.abs().max() == 0) == how["zero_start"]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["first.lora_A", "first.lora_B"]
    learned = fit(model, optimizer, task, target)
    fit(lora, plain, task, target)
    moved = [(m(pre) - before).norm() / before.norm() for m in (model, lora)]
    assert learned < 0.7 and moved[0] < 0.5 * moved[1], (learned, moved)
    adapted, merged = model(task).detach(), folora.merge(model)
    assert type(merged.first) is nn.Linear
    close(merged(task), adapted, rtol=1e-4, atol=1e-4)


def test_prepare_is_its_parts_literally():
    """One layer by hand in float64, every option at a value of its own."""
    torch.manual_seed(0)
    pre, task, _ = low_rank_inputs()
    model, k = MLP(), 5
    W0 = model.first.weight.detach().clone().double()
    optimizer = folora.prepare(model, [{"x": pre}], [{"x": 100 * task}], 0.1, rank=3, alpha=6,
                               tau=0.05, lam=2.0, s_min=0.2, target_modules="first",
                               zero_start=False, basis_rank=k)
    unit = lambda X: X.mT.double() @ X.double() / (X.double() ** 2).sum() * X.shape[1]
    C_pre, C_task = unit(pre), unit(task)    # the task's factor of 100 divides out
    gamma, V = scipy.linalg.eigh(C_task.numpy(), C_pre.numpy() + 0.05 * numpy.eye(16))
    gamma, V = torch.tensor(gamma).flip(0)[:k], torch.tensor(V).flip(1)[:, :k]
    a, b = optimizer.param_groups
    assert (a["lr"], b["lr"], b["basis"], b["scale"]) == (0.1, 0.1, None, 1.0)
    assert (a["params"], b["params"]) == ([model.first.lora_A], [model.first.lora_B])
    gate = torch.clamp(gamma / (gamma + 2.0), min=0.2)
    close(a["gate"].double(), gate, rtol=1e-3, atol=1e-4)
    ours = (a["basis"] * a["gate"]).double() @ a["basis"].mT.double()
    close(ours, V * gate @ V.mT, rtol=1e-2, atol=1e-2)
    A0 = model.first.lora_A.detach().double()
    assert A0.shape == (3, 16) and energy(A0, C_pre) < 1e-5          # 16 - 10 null directions
    close(2.0 * model.first.lora_B.detach().double(), W0 @ A0.mT, rtol=1e-4, atol=1e-5)


def test_one_learning_rate_serves_every_scale():
    """From B = 0: weights 8 times as large train 8 times as far, and alpha changes nothing."""
    pre, task, _ = low_rank_inputs()
    target = 1e3 * torch.randn(300, 32)      # large gradients: Adam's eps is no part of this
    updates = []
    for scale, alpha in ((1.0, None), (8.0, None), (1.0, 16.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32, bias=False))
        with torch.no_grad():
            model[0].weight.mul_(scale)
        W0 = model[0].weight.detach().clone()
        optimizer = folora.prepare(model, [{"input": pre}], [{"input": task}], 1e-2, rank=4,
                                   alpha=alpha, s_min=0.0, target_modules="0", zero_start=True)
        size = W0.norm() / math.sqrt(4 * 32) / model[0].scaling
        assert optimizer.param_groups[1]["scale"] == pytest.approx(size.item(), rel=1e-5)
        fit(lambda x: model(x) / scale, optimizer, task, target, 5)
        updates.append((folora.merge(model)[0].weight - W0) / scale)
    close(updates[0], updates[1], rtol=1e-3, atol=1e-5)
    close(updates[0], updates[2], rtol=1e-3, atol=1e-5)


def test_bases_are_solved_once_per_distinct_input():
    torch.manual_seed(0)
    model, done = Block(), []
    C = folora.collect_covariances(model, [{"x": torch.randn(4, 20, 8)}], BLOCK_TARGETS)
    bases = folora.decompose(C, dict(C), 2, progress=done.append)
    assert sorted(basis["modules"] for basis in bases) == [
        ["down_proj"], ["o_proj"], ["q_proj", "k_proj", "v_proj"], ["up_proj"]] and sum(done) == 4
    optimizer = folora.attach(model, bases, 0.1)
    shared = next(g for g in optimizer.param_groups if len(g["params"]) == 3)
    attention = [getattr(model, f"{name}_proj").lora_A for name in "qkv"]
    assert all(p is A for p, A in zip(shared["params"], attention))


@pytest.mark.parametrize("basis_rank", [None, 3, 7, 9])
def test_inputs_are_decomposed_one_at_a_time_and_what_is_solved_is_free(basis_rank):
    C_pre, C_task = ({str(i): covariance(8 - i % 2, 40, seed=i + first).float() for i in range(5)}
                     for first in (0, 9))
    left, alive = [], [weakref.ref(C) for C in (*C_pre.values(), *C_task.values())]
    count = lambda _: left.append((len(C_pre), len(C_task), sum(C() is not None for C in alive)))
    bases = folora.decompose(C_pre, C_task, 2, basis_rank=basis_rank, progress=count)
    assert left == [(n, n, 2 * n) for n in (4, 3, 2, 1, 0)]
    for i, basis in enumerate(bases):
        assert basis["V"].shape == (8 - i % 2, min(basis_rank or 8, 8 - i % 2))
        assert basis["gamma"].shape == basis["V"].shape[1:] and basis["A0"].shape == (2, 8 - i % 2)
    for emptied in ((C_pre, C_task), ({"a": torch.eye(2)}, {"b": torch.eye(2)})):
        with pytest.raises(ValueError, match="need the same layers"):
            folora.decompose(*emptied, 2)


@pytest.mark.parametrize("wrong, message", [
    (dict(rank=17), "rank 17"), (dict(rank=0), "rank 0"), (dict(tau=0.0), "tau and alpha"),
    (dict(tau=math.inf), "tau and alpha"), (dict(alpha=0.0), "tau and alpha"),
    (dict(lr=-1.0), "lr must"), (dict(lr=math.nan), "lr must"), (dict(lam=0.0), "lam must be"),
    (dict(s_min=2.0), "s_min in"), (dict(basis_rank=0), "basis_rank >= 1"),
    (dict(target_modules="q_proj"), "first, second")])
def test_prepare_refuses_before_any_forward_pass(wrong, message):
    def batches():
        raise AssertionError("a forward pass was about to run")
        yield
    with pytest.raises(ValueError, match=message):
        how = {**dict(lr=0.1, rank=2, target_modules=("first",)), **wrong}
        folora.prepare(MLP(), batches(), batches(), **how)


def test_a_learning_rate_of_zero_moves_nothing():
    pre, task, new = low_rank_inputs()
    model = MLP()
    before = model(task).detach()
    optimizer = folora.prepare(model, [{"x": pre}], [{"x": task}], 0.0, 2, target_modules="first",
                               zero_start=True)
    fit(model, optimizer, task, new, 2)
    assert torch.equal(model(task), before)


def test_adapters_are_not_made_twice_and_not_under_inference_mode():
    pre, task, _ = low_rank_inputs()
    prepare = lambda model, target: folora.prepare(model, [{"x": pre}], [{"x": task}], 0.1, rank=2,
                                                   target_modules=target)
    with torch.inference_mode(), pytest.raises(ValueError, match="leave torch.inference_mode"):
        prepare(MLP(), "first")
    model = MLP()
    prepare(model, "first")
    with pytest.raises(ValueError, match="the model has adapters already"):
        prepare(model, "second")
    assert model.first.lora_A.requires_grad and isinstance(model.second, nn.Linear)
    with pytest.raises(ValueError, match="no bases"):
        folora.attach(MLP(), [], 0.1)


def test_a_scheduler_that_sets_the_learning_rate_leaves_the_scale_of_B_alone():
    pre, task, new = low_rank_inputs()
    optimizer = folora.prepare(MLP(), [{"x": pre}], [{"x": task}], 0.1, 2, target_modules="first")
    before = [group["scale"] for group in optimizer.param_groups]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    assert before == [group["scale"] for group in optimizer.param_groups] and before[1] != 1.0
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


def test_the_file_stands_alone(tmp_path):
    (tmp_path / "folora.py").write_text((HERE / "folora.py").read_text())
    code = ("import sys, folora; "
            "print([m for m in ('transformers', 'datasets', 'safetensors') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip() == "[]", out.stderr


# ---- B.4: calibration text -----------------------------------------------------------------------

def cycle(distinct, n):
    return [i % distinct for i in range(n)]


@pytest.mark.parametrize("tokens, reason", [
    (cycle(99, 31), "fewer than 32 tokens"), (cycle(99, 32), None),
    (cycle(40, 40) + [7] * 20, "a run of 20 equal tokens"), (cycle(40, 40) + [7] * 19, None),
    (cycle(15, 127), None), (cycle(15, 128), "too few distinct tokens"), (cycle(16, 128), None),
    (cycle(119, 1000), "too few distinct tokens"), (cycle(120, 1000), "too few distinct 4-grams"),
    # 63 distinct 4-grams of 253 at length 256 are 0.249, and 64 are 0.253
    (cycle(63, 256), "too few distinct 4-grams"), (cycle(64, 256), None),
    (cycle(60, 255), None), (cycle(64, 258), None)])                 # 64 of 255 4-grams are 0.251
def test_screen_rejects_degenerate_text_and_nothing_just_short_of_it(tokens, reason):
    assert folora.reject_reason(tokens) == reason


class FakeGenerator(nn.Module):
    """Stands in for a language model: `generate` returns what `script` says, keeps its settings."""

    def __init__(self, script):
        super().__init__()
        self.weight, self.script, self.calls = nn.Parameter(torch.zeros(1)), script, []

    def generate(self, ids, **settings):
        self.calls.append({**settings, "count": len(ids)})
        assert ids.shape[1] == 1 and (ids == 1).all()                # a single BOS
        rows = [self.script() for _ in range(len(ids))]
        width = max(map(len, rows))
        return torch.tensor([[1] + row + [2] * (width - len(row)) for row in rows])


FAKE_TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2,
                                 decode=lambda tokens: " ".join(map(str, tokens)))


def fake_text():
    return torch.randint(3, 9999, (40,)).tolist()


def test_sampling_draws_decoding_from_the_mixture_in_batches():
    count = iter(range(10 ** 6))
    numbered = lambda: [3 + next(count), *range(10 ** 6, 10 ** 6 + 39)]
    model, bar, share = FakeGenerator(numbered), [], Counter()
    texts = folora.sample_calibration(model.train(), FAKE_TOKENIZER, 2000, 60, 60, batch_size=128,
                                      progress=bar.append)
    assert len(texts) == 2000 == sum(bar) and model.training
    written = [int(text[1]) for text in texts]
    assert sorted(written[:500]) != sorted(written)[:500]            # a slice is a sample
    assert all(t.dtype == torch.long and t.shape == (41,) and t[0] == 1 for t in texts)
    for call in model.calls:
        assert call["do_sample"] and call["count"] <= 128 and call["eos_token_id"] == [2]
        assert (call["min_new_tokens"], call["max_new_tokens"]) == (60, 60)
        share[call["temperature"], call["top_p"], call["top_k"]] += call["count"] / 2000
    mixture = {(1.0, 1.0, 0): 0.7, (1.0, 0.95, 0): 0.2, (1.2, 0.98, 50): 0.1}
    assert share == pytest.approx(mixture, abs=0.04)
    assert len(model.calls) <= 2 * 3 + 2000 // 128


def test_sampling_is_plain_whatever_the_model_is_configured_for(tiny):
    model, config = copy.deepcopy(tiny[0]), dict(
        repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.9, num_beams=2)
    sample = lambda: [t.tolist() for t in folora.sample_calibration(model, tiny[1], 4, 32, 64)]
    plain = sample()
    for name, value in config.items():
        setattr(model.generation_config, name, value)
    assert sample() == plain
    assert all(getattr(model.generation_config, name) == value for name, value in config.items())


def test_sampling_replaces_rejects_and_duplicates_and_cuts_at_end_of_sequence():
    good = lambda k: list(range(k, k + 50))
    queue = [good(10), good(10), [5] * 50, good(20), good(3000)[:20], good(30) + [2, 7, 7],
             good(40), good(50), good(60), good(70)]
    model = FakeGenerator(lambda: queue.pop(0))
    texts = folora.sample_calibration(model, FAKE_TOKENIZER, 4, 32, 64)
    assert sorted(t.tolist() for t in texts) == [[1] + good(k) for k in (10, 20, 30, 40)]


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    draw = lambda seed: [t.tolist() for t in folora.sample_calibration(
        FakeGenerator(fake_text), FAKE_TOKENIZER, 5, seed=seed)]
    state = torch.random.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_sampling_gives_up_on_a_model_that_only_produces_rejects():
    model = FakeGenerator(lambda: [5] * 50)
    reasons = "{'a run of 20 equal tokens': 1, 'exact duplicate': 63}"
    with pytest.raises(RuntimeError, match=f"the screen rejects this model's text: {reasons}"):
        folora.sample_calibration(model.train(), FAKE_TOKENIZER, 10)
    assert model.training
    with pytest.raises(ValueError, match="100 to 50 new tokens"):
        folora.sample_calibration(model, FAKE_TOKENIZER, 10, 100, 50)


def test_sampling_from_a_real_model(tiny):
    model, tokenizer = tiny
    texts = folora.sample_calibration(model, tokenizer, 6, 128, 140)
    for text in texts:
        assert text[0] == tokenizer.bos_token_id and 129 <= len(text) <= 141
        assert tokenizer.eos_token_id not in text
    # it says what it was pretrained on: known words, in known forms
    forms = r"Q: .*\?\nA: |### Instruction|\d [+-] \d+ = \d|\.\n\n"
    assert sum(bool(re.search(forms, tokenizer.decode(t))) for t in texts) >= 5


# ---- eval.py -------------------------------------------------------------------------------------

# text, answers, correct on nq_open, on triviaqa: the verdicts of lm-eval 0.4.13
EXACT = [("Paris", ["Paris", "Lutetia"], 1, 1), ("paris", ["Paris"], 1, 1), ("", ["Paris"], 0, 0),
         ("the Eiffel Tower", ["Eiffel Tower"], 1, 0), ("Eiffel", ["Eiffel Tower"], 0, 0),
         ("The Eiffel tower!", ["eiffel tower"], 1, 0), ("U.S.A", ["USA"], 1, 1),
         ("an apple", ["a apple"], 1, 0), ("banana the", ["banana"], 0, 0),
         ("December 14 1972", ["14 December 1972 UTC", "December 14, 1972"], 1, 1),
         ("theatre", ["atre"], 0, 0), ("THE WHO", ["who"], 0, 0)]


def test_exact_match():
    for text, answers, *verdicts in EXACT:
        assert [ev.exact_match(text, answers, articles) for articles in (True, False)] == verdicts


def test_metrics_agree_with_lm_eval():
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="pip install lm-eval==0.4.13")
    from lm_eval.tasks.webqs.utils import doc_to_choice
    how = dict(ignore_case=True, ignore_punctuation=True)
    articles = ["\\b(?:The |the |An |A |The |a |an )"]
    for text, answers, *verdicts in EXACT:
        for ignored, verdict in zip((articles, None), verdicts):
            scores = [metrics.exact_match_hf_evaluate([text], [a], regexes_to_ignore=ignored, **how)
                      for a in answers]
            assert max(score["exact_match"] for score in scores) == verdict
    for answers in (["Spanish", "Spain", "Spanish Language"], ["b", "a", "ab"]):
        assert ev.shortest_prefixes(answers) == doc_to_choice({"answers": list(answers)})


def test_answers_are_read_from_the_text():
    assert ev.until(" Paris, France.\nQ: next", ("\n", ".", ",")) == "Paris"
    numbers = {"The answer is: 18": 18, "The answer is: $1,234.50.": 1234.5, "18": None,
               "The answer is: 3. The answer is: -4": -4, "The answer is: none": None}
    assert {text: ev.final_number(text) for text in numbers} == numbers


def test_pairs_are_found_under_every_name_and_gsm8k_notes_go():
    rows = [{"question": "q", "answer": "2+3=<<2+3=5>>5.\n#### 5"},          # GSM8K
            {"instruction": "q", "input": "i", "output": "r"},                 # Alpaca
            {"instruction": "q", "output": "r"},                               # WizardLM
            {"query": "q", "answer": "r", "lang": "python"},                   # CodeFeedback
            {"query": "q", "original_question": "o", "response": "r"}]         # MetaMathQA
    wanted = [("q", "2+3=5.\nThe answer is: 5"), ("q\ni", "r"), ("q", "r"), ("q", "r"), ("q", "r")]
    assert ev.to_pairs(rows, "x") == wanted
    rows = [{"question": "q", "answer": answer} for answer in ("a", ["a"], {"aliases": ["a"]})]
    assert ev.to_questions(rows, "x") == [("q", ["a"])] * 3


def test_no_separator_but_a_line_feed_ends_a_line_of_a_file(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"text": "a\u2028b\u0085c\u000cd\x1ce"}, {"text": "é"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n\n")
    assert ev.read_rows(str(path)) == rows
    assert ev.given_texts(str(path), 1) == [rows[0]["text"]]
    path.write_bytes(b" \r\n\n")
    with pytest.raises(ev.UserError, match="a.jsonl: no rows"):
        ev.read_rows(str(path))


ROW = b'{"question": "q", "answer": "The answer is: 5", "text": "t"}\n'
NOT_JSON, NO_ANSWER = "line 2: not JSON with fields", "line 2: no field called answer"


@pytest.mark.parametrize("task, line, message", [
    *(("texts", line, NOT_JSON) for line in (b'{"text": "\xff"}', b'{"text"', b"[1]", b"null")),
    *(("texts", line, "line 2: no field called text or question")
      for line in (b'{"text": 5}', b'{"text": ["a"]}', b'{"b": "a"}', b'{"text": " "}')),
    *((task, b'{"question": "q", "answer": %s}' % answer, NO_ANSWER)
      for answer in (b"null", b"5", b'" "', b"[]", b"[5]", b'{"aliases": []}')
      for task in ("facts", "nll") if answer != b"[]"),
    ("facts", b'{"answer": "a"}', "line 2: no field called question"),
    ("nll", b'{"answer": "a"}', "line 2: no field called question or query"),
    ("gsm8k", b'{"question": "q", "answer": "five"}', "line 2: its answer has no number"),
    ("squares", b"", "unknown task squares: there are gsm8k"),
])
def test_a_bad_row_is_named_before_a_model_is_loaded(tmp_path, task, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW + line + b"\n" + ROW)
    with pytest.raises(ev.UserError, match=message) as stopped:
        ev.given_texts(str(path), None) if task == "texts" else ev.load_tasks(f"{task}={path}")
    assert "\n" not in str(stopped.value)


def test_examples_that_do_not_fit_are_counted(tiny, capsys):
    pairs = [("q", "r"), ("q", "r"), ("long " * 60, "r")]
    assert len(ev.encode_all(tiny[1], pairs, 100)) == 2
    assert "1 of 3 examples are left out" in capsys.readouterr().err
    with pytest.raises(ev.UserError, match="2 of 3 examples have prompts that fill --max-length"):
        ev.encode_all(tiny[1], [pairs[0], pairs[2], pairs[2]], 100)


def test_loss_is_on_the_response_and_equals_the_models_own(tiny, monkeypatch):
    model, tokenizer = tiny
    pairs = [("What is 2 + 2?", "It is 4.\nThe answer is: 4"), ("Sort: b a", "a b, and no more")]
    examples = ev.encode_all(tokenizer, pairs, 256)
    for example, (ask, ending) in zip(examples, ((pairs[0][0], " Let's think step by step."),
                                                 (pairs[1][0], ""))):
        prompt = [i for i, label in zip(example["ids"], example["labels"]) if label == -100]
        assert tokenizer.decode(prompt).endswith(f"{ask}\n\n### Response:{ending}")
        assert example["labels"][len(prompt):] == example["ids"][len(prompt):]
        assert example["labels"][-1] == tokenizer.eos_token_id
    batch = ev.collate(examples, "cpu")
    own, count = model(**batch).loss, (batch["labels"][:, 1:] != -100).sum()
    weight = model.model.layers[0].mlp.down_proj.weight
    for limit in (ev.LOGITS, 3 * model.config.vocab_size):           # the second: three a piece
        monkeypatch.setattr(ev, "LOGITS", limit)
        ours = ev.summed_nll(model, batch) / count
        close(ours, own)
        close(*(torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (ours, own)),
              rtol=1e-3, atol=1e-6)
        assert ev.mean_nll(model, examples, batch_size=1) == pytest.approx(own.item(), rel=1e-4)


@pytest.mark.parametrize("kind, options", [
    ("Gemma2", {"final_logit_softcapping": 0.5}), ("Granite", {"logits_scaling": 3.0}),
    ("Cohere", {"logit_scale": 0.25}), ("OPT", {"word_embed_proj_dim": 16, "ffn_dim": 32}),
    ("GPT2", {"n_layer": 1, "n_head": 2}), ("Mixtral", {"output_router_logits": True})])
def test_loss_is_the_models_own_whatever_its_head_does(kind, options):
    import transformers
    options |= dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                    pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**options)).eval()
    ids = torch.arange(3, 21).view(2, 9)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    own = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    close(ev.summed_nll(model, batch), own)


def test_drift_is_the_kl_of_next_token_distributions(tiny, monkeypatch):
    model, tokenizer = tiny
    other, _ = ev.load_model("tiny", CPU, torch.float32)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    texts = [torch.tensor(tokenizer(text)["input_ids"])
             for text in ("12 + 7 = 19\n", "Q: what is 4 + 4?\nA: 8\nQ: ")]
    kl, positions = [], 3 * len(texts)
    for text in texts:
        p, q = (m(text[None]).logits[0, :-1].double().softmax(-1) for m in (model, other))
        kl.append((p * (p / q).log()).sum(-1))
    wanted = pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    for limit in (ev.LOGITS, 5 * model.config.vocab_size):
        monkeypatch.setattr(ev, "LOGITS", limit)
        assert ev.drift(other, model, texts) == wanted
    assert train_math.Probe(model, texts, positions=400)(other) == wanted
    assert len(train_math.Probe(model, texts, positions).before) == positions


def test_greedy_is_the_argmax_whatever_the_checkpoint_sets_and_stops_at_its_end(tiny, monkeypatch):
    model, tokenizer = tiny
    prompts, plain = ["Question: what is 12 + 7\nAnswer:", "3 + 3 ="], model.generation_config
    odd = dict(num_beams=3, no_repeat_ngram_size=1, repetition_penalty=9.0, do_sample=True)
    monkeypatch.setattr(model, "generation_config", type(plain)(**{**plain.to_dict(), **odd}))
    written = ev.greedy(model, tokenizer, prompts, 4)
    for prompt, tokens in zip(prompts, written):
        ids = tokenizer(prompt)["input_ids"]
        for token in tokens:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
    assert model.generation_config.num_beams == 3
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, written[0][1]]
    assert ev.greedy(model, tokenizer, prompts[:1], 4)[0] == written[0][:2]


def test_webqs_by_greedy_text_is_greedy_likelihood(tiny):
    """Against the definition: every token of an answer is the argmax given all before it."""
    model, tokenizer = tiny
    pairs = [("what is 12 + 7", ["19", "20"]), ("what is 12 + 7", ["x"]), ("say", ["A: 1", "b"])]
    own = ev.greedy(model, tokenizer, [f"Question: {pairs[0][0]}\nAnswer:"], 3)[0]
    pairs[0][1].append(tokenizer.decode(own).strip())
    literal = []
    for question, answers in pairs:
        prompt, likeliest = len(tokenizer(f"Question: {question}\nAnswer:")["input_ids"]), []
        for answer in answers:
            ids = torch.tensor(tokenizer(f"Question: {question}\nAnswer: {answer}")["input_ids"])
            best = model(ids[None]).logits[0, prompt - 1:-1].argmax(-1)
            likeliest.append(torch.equal(best, ids[prompt:]))
        literal.append(any(likeliest))
    assert ev.score_webqs(model, tokenizer, pairs, "webqs") == literal and any(literal)


def test_summary_rows():
    before = {"gsm8k": 10.0, "nq_open": 20.0, "webqs": 30.0, "drift": 0.0}
    after = {"gsm8k": 40.0, "nq_open": 15.0, "webqs": 25.0, "drift": 0.1}
    wanted = {"Avg1": 20.0, "Avg1(%)": 80.0, "Avg2": 40.0, "GM": pytest.approx(math.sqrt(800))}
    assert ev.summarise(after, before) == wanted
    assert "Avg1(%)" not in ev.summarise(after, {**before, "nq_open": 0.0, "webqs": 0.0})
    printed = ev.table({"untouched": before, "folora": after})
    assert "drift" in printed and "Avg1(%)" in printed
    assert "Avg1(%)" not in ev.table({"folora": after})


def test_each_process_has_its_share(monkeypatch):
    assert ev.process() == (0, 1) and ev.share([1, 2, 3]) == [1, 2, 3] and ev.mean(3, 2) == 1.5
    monkeypatch.setattr(ev, "process", lambda: (1, 2))
    assert ev.share([1, 2, 3, 4]) == [2, 4]


def changed(folder, change):
    """A copy of tiny/ whose weights went through `change`."""
    shutil.copytree(ev.TINY, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("change, message", [
    (lambda weights: weights.pop("model.norm.weight"), "missing_keys .*such as model.norm.weight"),
    (lambda weights: weights.update(x=torch.ones(2)), "unexpected_keys .*such as x"),
    (lambda weights: weights.update({"model.norm.weight": torch.ones(5)}), "mismatched_keys"),
    (None, "cannot load the model .*model: ")])
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    folder = changed(tmp_path / "model", change or (lambda weights: None))
    if change is None:
        os.truncate(folder / "model.safetensors", 999)
    with pytest.raises(ev.UserError, match=message) as stopped:
        ev.load_model(str(folder), CPU, torch.float32)
    assert "\n" not in str(stopped.value)


def peft_adapter(folder, seed=0, **options):
    """A PEFT adapter of tiny with random weights, and the model as PEFT itself merges it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = ev.load_model("tiny", CPU, torch.float32)[0]
    options |= dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_an_adapter_is_added_as_peft_adds_it(tmp_path, options):
    merged = peft_adapter(tmp_path, **options).state_dict()
    ours, rounded = (ev.load_model(str(tmp_path), CPU, dtype)[0].state_dict()
                     for dtype in (torch.float32, torch.bfloat16))
    for name, weight in merged.items():                              # bfloat16: rounded only once
        close(ours[name], weight, rtol=0, atol=1e-6)
        assert (rounded[name] == weight.bfloat16()).float().mean() > 0.999


def test_an_adapter_with_more_than_lora_is_refused(tmp_path):
    for number, options in enumerate([{"use_dora": True}, {"alpha_pattern": {"q_proj": 2}}]):
        peft_adapter(tmp_path / str(number), **options)
        with pytest.raises(ev.UserError, match=r"merge it with PEFT"):
            ev.load_model(str(tmp_path / str(number)), CPU, torch.float32)


def test_a_run_is_read_from_its_adapter_unless_it_is_merged(tmp_path):
    wanted, run = peft_adapter(tmp_path / "adapter").state_dict(), str(tmp_path)
    with pytest.raises(ev.UserError, match="nor a finished run"):
        ev.resolve_model(run)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"options": {"model": "tiny"}}')
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"tiny"', '"/moved/away"'))
    assert ev.base_of(run) == "tiny" and ev.resolve_model(run) == str(ev.TINY)
    close(ev.load_model(run, CPU, torch.float32)[0].state_dict(), wanted)
    shutil.copytree(ev.TINY, tmp_path / "merged")
    assert ev.adapter_of(run) is None and ev.resolve_model(run) == str(tmp_path / "merged")
    assert ev.base_of(run) == "tiny" and ev.base_of("tiny") is None


@pytest.mark.parametrize("error, status", [
    (ev.UserError("it is so"), 2), (OSError(28, "it is so"), 2), (KeyboardInterrupt("it is so"), 2),
    (MemoryError("it is so"), 2), (torch.OutOfMemoryError("it is so\nmore"), 2),
    (RuntimeError("[enforce fail at inline_container.cc:664] it is so"), 2),
    (FloatingPointError("it is so"), 1), (ValueError("it is so"), None)])
def test_what_the_user_can_mend_is_one_line(error, status, capsys):
    @ev.one_line
    def main(arguments=None):
        bar = tqdm(total=3)                          # it is open and must not share the line
        bar.update()
        raise type(error)(*error.args)
    with pytest.raises(SystemExit if status else type(error), match=str(status or "it is so")):
        main()
    last = capsys.readouterr().err.split("\n")[-2]
    assert (last.endswith("it is so") and "%" not in last) == bool(status)


def test_what_folora_raises_itself_is_the_users(capsys):
    with pytest.raises(SystemExit):
        ev.one_line(lambda arguments: folora.spectral_gate(torch.ones(1), -1.0, 0.0))()
    assert "lam must be > 0" in capsys.readouterr().err
    with pytest.raises(TypeError):                                   # a mistake of ours in there
        ev.one_line(lambda arguments: folora.spectral_gate("gamma", 1.0, 0.0))()


@pytest.mark.parametrize("arguments, message", [
    ("--limit 0", "--limit must be at least 1"), ("--tasks=", "nothing to score"),
    ("--device tpu", "--device tpu: it is cpu, cuda or"), ("runs/none", "runs/none: no such dir"),
    ("--tasks facts=none.jsonl", "none.jsonl: no such file"), ("--tasks sing", "unknown task sing"),
    ("--harness mmlu", "pip install lm-eval"), ("--dtype int8", "invalid choice")])
def test_a_bad_command_ends_before_a_model_is_loaded(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(ev, "load_model", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit, match="2"):
        ev.main(["tiny", *arguments.split()])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_network_the_hub_is_not_asked_again(monkeypatch):
    import huggingface_hub
    for module in (huggingface_hub.constants, ev.datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    ev.reach_hub.__wrapped__()
    assert huggingface_hub.constants.HF_HUB_OFFLINE and ev.datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ev.UserError, match="Couldn't reach 'owner/data'"):
        ev.read_rows("owner/data")
    with pytest.raises(ev.UserError, match="cannot load the model owner/name: [^\n]*$"):
        ev.load_model("owner/name", CPU, torch.float32)


def test_finished_columns_are_printed_before_a_failure(tmp_path, capsys):
    folder = changed(tmp_path / "other", lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(SystemExit):
        ev.main(["tiny", str(folder), "--tasks", "facts", "--limit", "2"])
    out, err = capsys.readouterr()
    assert "facts" in out and "Avg1" in out and "other" not in out
    assert "missing_keys" in err.splitlines()[-1]


def stub_lm_eval(monkeypatch, load=None):
    """A task manager with lm-eval 0.4.13's attributes, for a task, a tag, and two groups."""
    groups = {"loose": {}, "scored": {"aggregate_metric_list": [{"metric": "acc"}]}}
    manager = SimpleNamespace(
        all_subtasks=["task", "mbpp"], all_groups=list(groups), load=load or (lambda names: {}),
        task_index={name: SimpleNamespace(cfg=cfg) for name, cfg in groups.items()})
    make = lambda **options: vars(manager).update(options) or manager
    monkeypatch.setattr(ev, "lm_eval", lambda module: SimpleNamespace(TaskManager=make))
    monkeypatch.setattr(ev, "reach_hub", lambda: None)


def test_harness_names_are_checked_before_anything_runs(monkeypatch):
    stub_lm_eval(monkeypatch)
    manager, names = ev.harness_tasks("own/task,scored", {"max_seq_lengths": "4k"})
    assert names == ["task", "scored"] and manager.include_path == ["own"]
    assert manager.metadata == {"max_seq_lengths": "4k"}
    for name in ("tag", "loose", "nothing"):
        with pytest.raises(ev.UserError, match=f"no task {name} with a score of its own"):
            ev.harness_tasks(f"task,{name}")
    with pytest.raises(ev.UserError, match="mbpp runs code .* set HF_ALLOW_CODE_EVAL=1"):
        ev.harness_tasks("task,mbpp")

    def load(names):
        raise ModuleNotFoundError("No module named 'langdetect'")
    stub_lm_eval(monkeypatch, load)
    with pytest.raises(ev.UserError, match=r"cannot load task .*lm-eval\[ifeval.*langdetect"):
        ev.harness_tasks("task")


def test_lm_eval_is_as_the_stub_says():
    tasks = pytest.importorskip("lm_eval.tasks", reason="pip install lm-eval==0.4.13")
    manager = tasks.TaskManager(include_path=None, metadata={"max_seq_lengths": "4k"})
    assert {"truthfulqa_mc2", "ifeval", "squadv2"} <= set(manager.all_subtasks)
    assert manager.task_index["babilong_longctx"].cfg["aggregate_metric_list"] and manager.load
    assert {"gpqa", "truthfulqa"} <= set(manager.all_tags)
    assert not {"gpqa", "truthfulqa"} & {*manager.all_subtasks, *manager.all_groups}


def test_the_harness_scores_a_local_task_into_the_same_table(tmp_path, capsys):
    """tiny's facts as a task of one's own: the built-in score, and in Avg1 like the others."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13 for --harness")
    (tmp_path / "world.yaml").write_text(json.dumps({            # JSON is YAML
        "task": "world", "dataset_path": "json", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"validation": f"{HERE}/tiny/facts.jsonl"}},
        "validation_split": "validation", "description": "Answer these questions:\n\n",
        "doc_to_text": "Q: {{question}}?\nA:", "doc_to_target": "{{answer[0]}}",
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [{"name": "strip", "filter": [{"function": "remove_whitespace"},
                                                     {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "ignore_case": True}]}))
    ev.main(["tiny", "--tasks", "facts,sums", "--harness", f"{tmp_path}/world", "--limit", "8"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()]
    row = {words[0]: float(words[-1]) for words in lines}
    assert row["world"] == row["facts"] > 0
    assert row["Avg1"] == pytest.approx((2 * row["facts"] + row["sums"]) / 3, abs=0.01)


def test_one_score_of_a_harness_result():
    for score, result in [
            (25, {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}),
            (20, {"exact,none": 10.0, "HasAns_exact,none": 20.0, "sample_len": 7}),
            (40, {"prompt_level_loose_acc,none": 0.5, "prompt_level_strict_acc,none": 0.4}),
            (10, {"pass@1,create_test": 0.1})]:
        assert ev.harness_score(result) == score
    roles = {"mmlu": "preserve", "humaneval": "target", "gsm8k": "target", "GM": ""}
    assert {row: ev.role(row) for row in roles} == roles


# ---- the baselines -------------------------------------------------------------------------------


def baseline(method, base, C, alpha=None):
    """(adapter, optimiser) of a baseline of rank 4 on a copy of a layer, called q_proj."""
    model = nn.ModuleDict({"q_proj": copy.deepcopy(base)})
    C_pre = {"q_proj": C} if method in baselines.NEEDS_C_PRE else None
    options = SimpleNamespace(rank=4, alpha=alpha, lr=1e-2)
    optimizer = baselines.add_adapters(method, model, options, C_pre, ("q_proj",))
    return model["q_proj"], optimizer


def steps(adapter, optimizer, count):
    for _ in range(count):
        adapter(torch.randn(9, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def layer():
    """A linear layer (10, 12) and the covariance of some inputs."""
    torch.manual_seed(0)
    X = torch.randn(400, 12) @ torch.randn(12, 12)
    return nn.Linear(12, 10), X.mT @ X / 400


@pytest.mark.parametrize("alpha", [None, 12.0])
@pytest.mark.parametrize("method", baselines.STARTS)
def test_a_baseline_starts_as_its_layer_then_moves_and_merges(method, alpha, layer):
    base, C = layer
    x = torch.randn(5, 12)
    adapter, optimizer = baseline(method, base, C, alpha)
    torch.testing.assert_close(adapter(x), base(x), rtol=1e-5, atol=1e-5)
    A, B = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
    steps(adapter, optimizer, 2)
    assert not torch.equal(adapter.lora_B, B)
    assert torch.equal(adapter.lora_A, A) == (method == "lora-null-v2")      # v2 freezes A
    assert not adapter.base_layer.weight.requires_grad
    y = adapter(x)
    assert (y - base(x)).abs().max() > 1e-3
    torch.testing.assert_close(adapter.merged()(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (12.0, 3.0)])
def test_milora_is_its_formula_in_numpy(alpha, kappa, layer):
    base, C = layer
    adapter, _ = baseline("milora", base, C, alpha)
    A, B = (p.detach().numpy() for p in (adapter.lora_A, adapter.lora_B))
    U, S, Vh = numpy.linalg.svd(base.weight.detach().double().numpy(), full_matrices=False)
    numpy.testing.assert_allclose(kappa * B @ A, U[:, -4:] * S[-4:] @ Vh[-4:], atol=1e-5)
    numpy.testing.assert_allclose(A @ A.T, numpy.diag(S[-4:] / kappa), atol=1e-5)    # both have √S
    numpy.testing.assert_allclose(B.T @ B, numpy.diag(S[-4:] / kappa), atol=1e-5)


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (12.0, 3.0)])
@pytest.mark.parametrize("method", ["lora-null", "lora-null-v2"])
def test_lora_null_is_its_formula_in_numpy(method, alpha, kappa, layer):
    base, C = layer
    adapter, _ = baseline(method, base, C, alpha)
    A, B = (p.detach().numpy() for p in (adapter.lora_A, adapter.lora_B))
    U0 = numpy.linalg.eigh(C.double().numpy())[1][:, :4]
    kept = base.weight.detach().double().numpy() @ U0 @ U0.T
    S = numpy.linalg.svd(kept)[1][:4]
    numpy.testing.assert_allclose(kappa * B @ A, kept, atol=1e-4)
    numpy.testing.assert_allclose(A @ A.T, numpy.diag(S / kappa), atol=1e-4)
    numpy.testing.assert_allclose(B.T @ B, numpy.diag(S / kappa), atol=1e-4)


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (12.0, 3.0)])
def test_corda_is_its_formula_in_numpy(alpha, kappa, layer):
    base, C = layer
    adapter, _ = baseline("corda", base, C, alpha)
    A, B = (p.detach().numpy() for p in (adapter.lora_A, adapter.lora_B))
    W, C = base.weight.detach().double().numpy(), C.double().numpy()
    damped = C + 0.01 * numpy.diag(C).mean() * numpy.eye(12)
    U, S, Vh = numpy.linalg.svd(W @ damped, full_matrices=False)
    wanted = U[:, -4:] * S[-4:] @ Vh[-4:] @ numpy.linalg.inv(damped)
    numpy.testing.assert_allclose(kappa * B @ A, wanted, atol=1e-4)
    numpy.testing.assert_allclose(B.T @ B, numpy.diag(S[-4:] / kappa), rtol=1e-4, atol=1e-4)


def test_oploras_update_is_orthogonal_to_the_top_singular_spaces(layer):
    base, C = layer
    adapter, optimizer = baseline("oplora", base, C)
    steps(adapter, optimizer, 3)
    update = adapter.merged().weight.detach() - base.weight.detach()
    U, _, Vh = torch.linalg.svd(base.weight.detach())
    left, right = (U.mT @ update).abs(), (update @ Vh.mT).abs()
    assert left[:4].max() < 1e-5 and right[:, :4].max() < 1e-5
    assert left[4:].max() > 1e-3 and right[:, 4:].max() > 1e-3


def test_lora_null_solves_a_shared_covariance_once(layer):
    base, C = layer
    model = nn.ModuleDict({name: copy.deepcopy(base) for name in ("q_proj", "k_proj", "v_proj")})
    options = SimpleNamespace(rank=4, alpha=None, lr=1e-2)
    baselines.null_space.cache_clear()
    baselines.add_adapters("lora-null", model, options, dict.fromkeys(model, C), tuple(model))
    assert baselines.null_space.cache_info()[:2] == (2, 1)                       # hits, misses


def pefts(base, config, prepare=lambda model, config: None):
    """PEFT's adapter on a copy of the layer. `prepare` is what PEFT runs before a CorDA start."""
    from peft import get_peft_model
    model = nn.ModuleDict({"q_proj": copy.deepcopy(base)})
    prepare(model, config)
    return get_peft_model(model, config).base_model.model["q_proj"]


@pytest.mark.parametrize("alpha", [4, 8])
def test_loras_start_is_pefts(alpha, layer):
    peft = pytest.importorskip("peft")
    theirs = pefts(layer[0], peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"]))
    torch.manual_seed(3)
    theirs.reset_lora_parameters("default", True)
    torch.manual_seed(3)
    ours = folora.LoRALinear(layer[0], 4, alpha)
    assert torch.equal(ours.lora_A, theirs.lora_A["default"].weight)
    assert torch.equal(ours.lora_B, theirs.lora_B["default"].weight)
    assert ours.scaling == theirs.scaling["default"]


@pytest.mark.parametrize("alpha", [4, 8])
def test_cordas_start_is_pefts(alpha, layer, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    base, C = layer
    torch.save({"q_proj": C.clone()}, tmp_path / "C.pt")
    corda = CordaConfig(corda_method="kpm", covariance_file=str(tmp_path / "C.pt"))
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"],
                             init_lora_weights="corda", corda_config=corda)
    theirs = pefts(base, config, preprocess_corda)
    ours, _ = baseline("corda", base, C, alpha)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    signs = torch.sign((ours.lora_A * A).sum(1))             # of the singular vectors
    close = dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.lora_A * signs[:, None], A, **close)
    torch.testing.assert_close(ours.lora_B * signs, B, **close)
    torch.testing.assert_close(ours.base_layer.weight, theirs.base_layer.weight, **close)


# ---- the scripts, end to end ---------------------------------------------------------------------

COMMON = ("--max-samples 64 --batch-size 8 --micro-batch-size 4 --max-steps 6 --log-every 2 "
          "--rank 8 --calibration-max-tokens 130 --eval-samples 4").split()
FAST = [*COMMON, *"--calibration-samples 4 --task-samples 8 --basis-rank 16 --compare no".split()]
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


def command(method, *more):
    return [*(FAST if method == "folora" else COMMON), "--method", method, "--tasks", TASKS, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, what it printed) of a method with more options; each is trained once."""
    runs = {}

    def run(method, *more):
        if (method, *more) not in runs:
            out, printed = tmp_path_factory.mktemp("runs") / method, io.StringIO()
            with contextlib.redirect_stdout(printed):
                train_math.main(command(method, *more, "--out", str(out)))
            runs[method, *more] = out, printed.getvalue()
        return runs[method, *more]
    return run


def stopped(main, arguments, capsys, status=2):
    """The one line, beside progress bars, that a script ends in with this exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert end.value.code == status and "Traceback" not in error
    line = error.rstrip("\n").splitlines()[-1]
    assert not re.search(r"\d%\|", line)             # it does not stand behind a bar
    return line


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
    config, scores = read_json(out / "config.json"), read_json(out / "summary.json")["scores"]
    assert config["options"]["rank"] == 8 and config["versions"]["torch"] == torch.__version__
    left = sorted(p.name for p in out.iterdir())
    assert left == ["adapter", "config.json", "metrics.jsonl", "summary.json"]
    assert scores[method]["nll"] < scores["untouched"]["nll"] and scores[method]["drift"] > 0


def test_methods_start_at_the_same_function_and_end_at_different_ones(trained):
    losses = [[line["loss"] for line in metrics(trained(m, *more)[0])] for m, more in METHODS]
    assert all(line[0] == pytest.approx(losses[0][0], rel=1e-4) for line in losses)
    assert len({line[-1] for line in losses}) == 3


def test_lora_is_compared_in_the_same_run(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*FAST, "--tasks", "drift", "--lr", "1e-2", "--compare", "lora", "--merge", "1"]
    arguments += ["--out", str(out), "--target-modules", "q_proj,down_proj"]
    train_math.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.split()[:1] == ["untouched"])
    assert header.split() == ["untouched", "folora", "lora"]
    option = lambda run: read_json(run / "config.json")["options"]
    assert (option(out)["method"], option(out / "lora")["method"]) == ("folora", "lora")
    assert (option(out)["lr"], option(out / "lora")["lr"]) == (1e-2, 4e-3)
    train_math.main(arguments)                       # prints the table
    assert header in capsys.readouterr().out
    weights = load_file(out / "merged" / "model.safetensors")
    shutil.rmtree(out / "merged")                    # the adapter alone is the same model
    again = ev.load_model(str(out), CPU, torch.float32)[0].state_dict()
    plain = ev.load_model("tiny", CPU, torch.float32)[0].state_dict()
    for name, weight in weights.items():
        close(again[name], weight)
        assert torch.equal(weight, plain[name]) != ("q_proj" in name or "down_proj" in name)


def test_all_linear_is_every_linear_layer_but_the_head():
    model = ev.load_model("tiny", CPU, torch.float32)[0]
    names = train_math.targets_of(SimpleNamespace(target_modules="all-linear"), model)
    assert set(names) == set(folora.find_targets(model)) and "lm_head" not in names


def test_eval_reads_a_run(trained, capsys):
    out, _ = trained("folora")
    scores = read_json(out / "summary.json")["scores"]
    ev.main([str(out), "tiny", "--tasks", TASKS, "--limit", "4"])
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = {line[0]: [float(x) for x in line[-2:]] for line in words if line[0] in ("nll", "drift")}
    columns = [scores["folora"], scores["untouched"]]
    assert row["nll"] == pytest.approx([s["nll"] for s in columns], abs=2e-3)
    assert row["drift"] == pytest.approx([s["drift"] for s in columns], abs=1e-4)


MOMENTS = ("in the eigenproblems", "first checkpoint.pt half written", "summary.json half written")


@pytest.mark.parametrize("method, more, moment", [(*m, k) for m, k in zip(METHODS, MOMENTS)])
def test_a_killed_run_goes_on_to_the_same_numbers(method, more, moment, trained, tmp_path):
    whole = kill.result(trained(method, *more)[0])
    assert kill.kill_and_resume(moment, tmp_path / "cut", command(method, *more)) == whole


def test_what_stops_a_run_is_said_in_a_line_and_it_resumes(trained, tmp_path, monkeypatch, capsys):
    """A full disk at several sizes, Ctrl-C, NaN, a damaged file. No stage is repeated in vain."""
    out, finished = tmp_path / "run", kill.result(trained("folora")[0])
    arguments = command("folora", "--out", str(out))
    stop = lambda status=2: stopped(train_math.main, arguments, capsys, status)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, last in ((1500, "held_out.jsonl.part"), (300_000, "prepared.pt.part")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            assert re.search("File too large|disk full", stop())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert (out / last).exists()
    monkeypatch.setattr(train_math, "calibration_texts", None)
    real, calls = train_math.gradients, []
    errors = {5: KeyboardInterrupt, 6: torch.OutOfMemoryError}

    def gradients(*args):                            # NaN in step 4, then two errors in step 3
        calls.append(1)
        if len(calls) in errors:
            raise errors[len(calls)]
        return (math.nan, 1.0) if len(calls) == 4 else real(*args)
    monkeypatch.setattr(train_math, "gradients", gradients)
    line = stop(status=1)
    assert "step 4: loss nan, gradient_norm 1.0; the checkpoint of step 2 is kept" in line
    assert len(metrics(out)) == 3 and torch.load(out / "checkpoint.pt")["step"] == 2
    assert f"interrupted: the same command with --out {out}" in stop()
    assert "out of memory: lower --micro-batch-size" in stop() and len(metrics(out)) == 2
    for name in ("untouched.json", "checkpoint.pt"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-9])
        assert f"{name} is damaged: delete it, and {train_math.STAGES[name]} is done" in stop()
        (out / name).write_bytes(whole)
    monkeypatch.setattr(folora, "decompose", None)
    train_math.main(arguments)
    assert kill.result(out) == finished


def test_a_directory_belongs_to_one_run(trained, tmp_path, capsys, monkeypatch):
    out, _ = trained("folora")
    arguments = command("folora", "--out", str(out))
    stop = lambda *more: stopped(train_math.main, [*arguments, *more], capsys)
    assert "holds a run with --rank 8" in stop("--rank", "4")
    assert "holds a run with --merge 0" in stop("--merge", "1")
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds notes.txt and no run" in stop("--out", tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    assert "holds no run's config.json" in stop("--out", tmp_path)
    other = os.open(tmp_path.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "another process is at work" in stop("--out", tmp_path.parent)
    os.close(other)
    monkeypatch.setattr(ev, "pick_device", lambda *_: (torch.device("cuda:3"), torch.float32))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert "holds a run with --device cpu" in stop()
    options = train_math.parse_options([])           # of a GPU, the number is not kept
    train_math.resolve(options)
    assert options.device == "cuda"


@pytest.mark.parametrize("texts, warns", [([[0] * 300] * 4, True), ([[1] * 600, [2] * 600], False),
                                          ([[1] * 500, [2] * 500], True)])
def test_calibration_text_that_says_little_is_reported(texts, warns, capsys, monkeypatch):
    model, options = ev.load_model("tiny", CPU, torch.float32)[0], train_math.parse_options([])
    monkeypatch.setattr(train_math, "covariances", lambda *_: {})
    monkeypatch.setattr(folora, "decompose", lambda *_, **__: [])
    train_math.solve(options, model, texts, [])
    assert ("at least 1024 tokens" in capsys.readouterr().err) == warns


def some_examples(tokenizer, count):
    rows = ev.read_rows(str(ev.TINY / "train.jsonl"), limit=count)
    return ev.encode_all(tokenizer, ev.to_pairs(rows, "train"), 256)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    model, tokenizer = ev.load_model("tiny", CPU, torch.float32)
    examples, seen, parameters = some_examples(tokenizer, 6), [], list(model.parameters())
    for micro in (6, 2):
        model.zero_grad()
        groups = SimpleNamespace(param_groups=[{"params": parameters}])
        seen.append((train_math.gradients(model, groups, examples, micro),
                     [p.grad.clone() for p in parameters]))
    close(*seen, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_runs_the_layers_again_for_the_same_gradient():
    model, tokenizer = ev.load_model("tiny", CPU, torch.float32)
    batch, calls, seen = ev.collate(some_examples(tokenizer, 1), CPU), [], []
    layers = model.requires_grad_(False).model.layers
    weight = layers[0].mlp.down_proj.weight.requires_grad_()
    layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (1, 0):
        train_math.recompute(model, on)
        inner = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Dropout))]
        assert not any(m.training for m in inner)
        seen.append(torch.autograd.grad(ev.summed_nll(model, batch), weight)[0])
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


GOOD = b'{"question": "q", "answer": "a"}\n'
FILES = {"good": GOOD, "half": GOOD + b'{"question": "q"}\n', "list": GOOD + b"[1, 2]\n",
         "cut": GOOD + b'{"question"\n', "latin": b'{"question": "\xe9", "answer": "a"}\n',
         "null": b'{"question": null, "answer": "a"}\n', "five": b'{"text": 5}\n', "none": b""}
BAD = [row.split(" | ") for row in """
train | --lr -1 | --lr: must be from 0
train | --lr inf | --lr: must be from 0
train | --lr much | --lr: invalid number value: 'much'
train | --lr | --lr: expected one argument
train | --lam 0 | --lam: must be from 1e-09
train | --tau nan | --tau: must be
train | --alpha 1e-300 | --alpha: must be
train | --s-min 2 | --s-min: must be from 0 to 1, not 2
train | --zero-start 2 | --zero-start: must be
train | --basis-rank -1 | --basis-rank: must be
train | --rank 0 | --rank: must be from 1
train | --rank 193 | rank 193 is not from 1 to 192, model.layers.0.self_attn.q_proj's width
train | --epochs 0 | --epochs: must be
train | --max-steps 0 | --max-steps: must be
train | --batch-size 0 | --batch-size: must be
train | --max-length 20 | 64 of 64 examples have prompts that fill --max-length 20
train | --max-length 513 | beyond the 512 positions of tiny
train | --calibration-max-tokens 512 | beyond the 512 positions of tiny
train | --calibration-samples 0 | --calibration-samples: must be
train | --log-every 0 | --log-every: must be
train | --seed -1 | --seed: must be
train | --seed 1000 | --seed 1000 is reserved for the held-out text
train | --method milora | invalid choice: 'milora'
train | --method lora | --method lora has no basis_rank, calibration_samples, compare
train | --device banana | --device banana: this torch sees
train | --device cuda:99 | --device cuda:99: this torch sees
train | --steps 5 | unrecognized arguments: --steps 5
train | --target-modules nothing | no nn.Linear is called nothing
train | --target-modules lm_head | lm_head shares its weight
train | --model nowhere | nowhere: no such directory, and no short name
train | --model runs/nowhere | runs/nowhere: no such directory
train | --model good.jsonl | good.jsonl: neither a checkpoint
train | --calibration-model nowhere | nowhere: no such directory
train | --tasks facts,trivia | unknown task trivia
train | --tasks nll=gone.jsonl | gone.jsonl: no such file
train | --tasks gsm8k=good.jsonl | good.jsonl, line 1: its answer has no number after ####
train | --tasks facts=half.jsonl | half.jsonl, line 2: no field called answers or answer
train | --data gone.jsonl | gone.jsonl: no such file
train | --data half.jsonl | half.jsonl, line 2: no field called answer
train | --data list.jsonl | list.jsonl, line 2: not JSON with fields
train | --data cut.jsonl | cut.jsonl, line 2: not JSON
train | --data latin.jsonl | latin.jsonl, line 1: not JSON with fields, {...}, in UTF-8
train | --data null.jsonl | null.jsonl, line 1: no field called question
train | --data none.jsonl | none.jsonl, line 1: not JSON
train | --calibration gone.jsonl | gone.jsonl: no such file
train | --calibration five.jsonl | five.jsonl, line 1: no field called text or question
train | --out good.jsonl | --out good.jsonl cannot be made
train | --out good.jsonl/run | --out good.jsonl/run cannot be made
train | --out . | . holds
eval |  | required: MODEL
eval | nowhere | nowhere: no such directory
eval | good.jsonl | good.jsonl: neither a checkpoint
eval | tiny --limit 0 | --limit
eval | tiny --limit few | --limit: invalid int value: 'few'
eval | tiny --dtype int8 | invalid choice
eval | tiny --device banana | --device banana: this torch sees
eval | tiny --tasks trivia | unknown task trivia
eval | tiny --tasks= | nothing to score
eval | tiny --tasks nll=cut.jsonl | cut.jsonl, line 2: not JSON
eval | tiny --tasks facts=none.jsonl | none.jsonl, line 1: not JSON
eval | tiny --harness mmlu | pip install lm-eval
eval | tiny --banana 5 | unrecognized arguments: --banana 5
""".strip().splitlines()]


@pytest.mark.parametrize("name, arguments, words", BAD)
def test_bad_input_gets_one_line_before_any_work(name, arguments, words, tmp_path, capsys,
                                                 monkeypatch):
    if "lm-eval" in words and importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is there")
    monkeypatch.chdir(tmp_path)
    for file, content in FILES.items():
        Path(f"{file}.jsonl").write_bytes(content)
    state = lambda: {str(path): path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    before, given = state(), [*FAST, "--out", "run"] if name == "train" else []
    main = {"train": train_math.main, "eval": ev.main}[name]
    line = stopped(main, [*given, *arguments.split()], capsys)
    assert words in line and state() == before


def test_short_names_and_defaults(capsys):
    names = {"Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B", "Llama-2-7b": "meta-llama/Llama-2-7b-hf",
             "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M", "owner/name": "owner/name"}
    assert {name: ev.resolve_model(name) for name in names} == names
    paper = train_math.parse_options("--model Qwen2.5-1.5B --preset paper".split())
    wanted = dict(rank=128, lam=1.0, s_min=0.3, batch_size=128, max_length=512, basis_rank=0,
                  calibration_samples=2000, task_samples=256, zero_start=0, compare="no")
    assert {name: getattr(paper, name) for name in wanted} == wanted
    tuned = train_math.parse_options(["--lam", "2", "--rank", "16"])
    wanted = {**train_math.TINY, "lam": 2.0, "s_min": 0.0, "zero_start": 1, "rank": 16}
    assert {name: getattr(tuned, name) for name in wanted} == wanted
    assert train_math.parse_options(["--model", str(ev.TINY)]).rank == 32
    assert "facts" in ev.default_tasks(str(ev.TINY))
    assert all("ours" in text or "the paper's" in text for *_, text in train_math.OPTIONS)
    with pytest.raises(SystemExit):
        train_math.main(["--help"])
    assert "--basis-rank" in capsys.readouterr().out


# ---- the measurements ----------------------------------------------------------------------------

@pytest.fixture
def experiments(tmp_path, monkeypatch):
    from assets import experiments
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(experiments, "CACHE", tmp_path)
    return experiments


@pytest.mark.parametrize("method", ["folora", "lora"])
def test_an_experiments_run_is_the_command_lines(method, trained, experiments):
    row = experiments.run((*FAST, "--tasks", TASKS), False, method, [], None, 0)
    scores = json.loads((trained(method)[0] / "summary.json").read_text())["scores"][method]
    del scores["Avg1(%)"]
    assert row["scores"] == pytest.approx(scores, abs=1e-5)


def test_changes_do_what_they_say(experiments):
    C = torch.diag(torch.linspace(2, 0.5, 12))
    bases = folora.decompose({"f": C}, {"f": C.flip(0, 1)}, rank=4)
    options, moved = SimpleNamespace(lr=0.1, rank=4), {}
    for change in (None, *experiments.CHANGES):
        torch.manual_seed(0)
        model = nn.ModuleDict({"f": nn.Linear(12, 10)})
        optimizer = folora.attach(model, bases, lr=0.1, zero_start=True)
        with torch.no_grad():
            model["f"].lora_B.fill_(1.0)     # from B = 0, A has no gradient in the first step
        before = [p.detach().clone() for p in (model["f"].lora_A, model["f"].lora_B)]
        if change:
            experiments.CHANGES[change](optimizer, options)
        model["f"](torch.ones(3, 12)).square().sum().backward()
        optimizer.step()
        after = model["f"].lora_A, model["f"].lora_B
        moved[change] = [p.detach() - b for p, b in zip(after, before)]
    largest = lambda change, i: pytest.approx(moved[change][i].abs().max().item(), rel=1e-3)
    assert not moved["A frozen"][0].any() and 0.1 == largest("plain Adam", 0)
    close(moved["A slow"][0], moved[None][0] / 3)
    assert 0.1 == largest("one lr", 1) and 0.1 != largest(None, 1)


def test_a_front_is_read_between_its_points(experiments):
    line = [("", {"nll": (x, 0, 1), "drift": (y, 0, 1)}) for x, y in ((3, 1), (2, 3), (2.5, 9))]
    assert experiments.kl_at(line, 2.5) == 2 and experiments.kl_at(line, 2.0) == 3
    assert experiments.kl_at(line, 4.0) == 1 and experiments.kl_at(line, 1.0) is None


def test_what_is_fresh_has_chosen_nothing(experiments, tmp_path):
    rows = [{"question": str(n), "answer": "1"} for n in range(300)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = SimpleNamespace(model="tiny", data=str(ev.TINY / "train.jsonl"), nq=None, webqs=None,
                              test=str(tmp_path / "test.jsonl"))
    suite = experiments.real_suite("fresh", options)[:-1] + (f"nll={options.test}",)
    rows = [int(question) for question, _ in experiments.loaded(suite, True)[3]["nll"]]
    searched = train_math.parse_options(experiments.SUITES["smollm2"].split()).eval_samples
    assert min(rows) == searched and len(rows) == 128
    seeds = [{w[3] for w in experiments.wanted(name)} for name in ("smollm2", "fresh")]
    assert not seeds[0] & seeds[1] and experiments.FRESH_TEXT["seed"] != ev.HELD_OUT_SEED
    experiments.loaded.cache_clear()


@pytest.mark.parametrize("row", [{"question": "who", "answer": ["Tom", "T"]},
                                 {"question": "who", "answers": ["Tom"]}])
def test_the_nll_of_an_answer_is_of_the_answer_alone(experiments, tiny, row):
    pair, = ev.to_questions([row], "questions")
    example = experiments.with_answer(tiny[1], "Q: {}?\nA:", *pair)
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
