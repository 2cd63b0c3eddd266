"""Tests of FoLoRA, on CPU: `python -m pytest -q test_folora.py`. Equations are held against scipy, numpy, torch.optim.Adam or a literal slow version here."""
import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import scipy.linalg
import torch
from torch import nn

import eval as ev
import folora
import train_math

HERE = Path(__file__).resolve().parent
torch.set_num_threads(2)


def covariance(d, tokens, condition=1.0, seed=0):
    """X Xᵀ / T with X's rows scaled so that the spectrum of the covariance spans `condition`."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    X = rotation @ (torch.logspace(0, -0.5 * math.log10(condition), d, dtype=torch.float64)[:, None] * torch.randn(d, tokens, generator=g, dtype=torch.float64))
    return X @ X.mT / tokens


class Block(nn.Module):
    """q, k, v on one input; o on another; an MLP without a hub name."""

    def __init__(self, d=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x, attention_mask=None):
        x = x + self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x) + self.v_proj(x)))
        return x + self.down_proj(torch.relu(self.up_proj(x)))


BLOCK_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def literal_covariances(model, batches, targets):
    """Σ x xᵀ / T token by token, in float64, every module on its own."""
    sums, counts, handles = {}, {}, []
    mask = None

    def hook(name):
        def see(module, args, _):
            keep = torch.ones(args[0].shape[:-1]) if mask is None else mask
            for x, k in zip(args[0].reshape(-1, args[0].shape[-1]).double(), keep.flatten()):
                if k:
                    sums[name] = sums.get(name, 0) + torch.outer(x, x)
                    counts[name] = counts.get(name, 0) + 1
        return see

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            handles.append(module.register_forward_hook(hook(name)))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: sums[name] / counts[name] for name in sums}


# ---- 3.1: targets and covariances -----------------------------------------------------------------------------------

def test_covariances_are_means_of_x_xT_over_real_tokens():
    torch.manual_seed(0)
    model = Block()
    batches = [{"x": torch.randn(3, 5, 8), "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 2 + [1] * 3])}, {"x": torch.randn(2, 4, 8)}]
    ours = folora.collect_covariances(model, batches, BLOCK_TARGETS)
    slow = literal_covariances(model, batches, BLOCK_TARGETS)
    assert ours.keys() == slow.keys()
    for name in slow:
        assert ours[name].dtype == torch.float32 and ours[name].shape == slow[name].shape
        torch.testing.assert_close(ours[name].double(), slow[name], rtol=1e-5, atol=1e-6)


def test_covariances_do_not_depend_on_the_cut_into_batches():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(12, 5, 8)
    whole = folora.collect_covariances(model, [{"x": x}], BLOCK_TARGETS)
    pieces = folora.collect_covariances(model, [{"x": part} for part in x.split([1, 7, 4])], BLOCK_TARGETS)
    twice = folora.collect_covariances(model, [{"x": x}, {"x": x}], BLOCK_TARGETS)          # the very same tensor again counts again
    for name in whole:
        torch.testing.assert_close(whole[name], pieces[name])
        torch.testing.assert_close(whole[name], twice[name])


@pytest.mark.parametrize("block", [3, 4, 7, 8])
def test_covariances_summed_in_blocks_are_whole(block, monkeypatch):
    """Only the lower blocks are summed; the last is narrower where the width is no multiple."""
    torch.manual_seed(0)
    monkeypatch.setattr(folora, "BLOCK", block)
    model, batches = Block(), [{"x": torch.randn(3, 5, 8)}, {"x": torch.randn(2, 4, 8)}]
    for name, C in folora.collect_covariances(model, batches, BLOCK_TARGETS).items():
        torch.testing.assert_close(C.double(), literal_covariances(model, batches, (name,))[name], rtol=1e-5, atol=1e-6)


def test_modules_that_share_an_input_share_one_covariance():
    C = folora.collect_covariances(Block(), [{"x": torch.randn(2, 3, 8)}], BLOCK_TARGETS)
    assert C["q_proj"] is C["k_proj"] is C["v_proj"]
    assert len({id(c) for c in C.values()}) == 4


def test_an_input_overwritten_in_place_is_not_taken_for_shared():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.relu_())

    model, batch = InPlace(), {"x": torch.randn(6, 4)}
    C = folora.collect_covariances(model, [batch], ("a", "b"))
    slow = literal_covariances(model, [batch], ("b",))
    torch.testing.assert_close(C["b"].double(), slow["b"], rtol=1e-5, atol=1e-6)


def test_an_input_shared_in_some_batches_only_is_an_error():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, same):
            return self.a(x) + self.b(x if same else 2 * x)

    batches = [{"x": torch.randn(3, 4), "same": True}, {"x": torch.randn(3, 4), "same": False}]
    with pytest.raises(ValueError, match="shared its input"):
        folora.collect_covariances(Sometimes(), batches, ("a", "b"))


def test_bfloat16_inputs_are_summed_in_float32():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).to(torch.bfloat16)
    C = folora.collect_covariances(Named(model), [{"input": torch.ones(4096, 2, dtype=torch.bfloat16)}], ("0",))
    torch.testing.assert_close(C["model.0"], torch.ones(2, 2))                 # a bf16 sum of ones stops at 256


class Named(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input):
        return self.model(input)


def test_only_our_hooks_are_removed_also_when_the_forward_fails():
    model, calls = Block(), []
    model.q_proj.register_forward_pre_hook(lambda module, args: calls.append(1))
    model.train()
    model.o_proj.eval()                                                                # a mode of its own, which must survive
    with pytest.raises(TypeError):
        folora.collect_covariances(model, [{"x": torch.randn(2, 3, 8)}, {"nonsense": 1}], BLOCK_TARGETS)
    assert [len(m._forward_pre_hooks) for m in (model.q_proj, model.k_proj)] == [1, 0]
    assert model.training and model.q_proj.training and not model.o_proj.training
    model(torch.randn(2, 3, 8))
    assert len(calls) == 2


def test_a_mask_of_another_order_is_refused():
    """Sequence first: as many entries as rows, but not the same ones."""
    with pytest.raises(ValueError, match=r"received \(5, 2\) rows where attention_mask is \(2, 5\)"):
        folora.collect_covariances(Block(), [{"x": torch.randn(5, 2, 8), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}], BLOCK_TARGETS)


def test_quantised_weights_are_refused():
    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = Block()
        model.q_proj.weight = nn.Parameter(torch.zeros(8, 8).to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match="q_proj is quantised"):
            folora.find_targets(model, BLOCK_TARGETS)


def test_targets_that_do_not_exist_are_named_with_what_does():
    with pytest.raises(ValueError, match="gate_proj; this model has: down_proj, k_proj, o_proj"):
        folora.find_targets(Block(), BLOCK_TARGETS + ("gate_proj",))
    with pytest.raises(ValueError, match="no token reached"):
        folora.collect_covariances(Block(), [], BLOCK_TARGETS)
    assert list(folora.find_targets(Block(), ("q_proj",))) == ["q_proj"]
    with pytest.raises(ValueError, match="rank must be between 1 and the input width of q_proj, 8, not 9"):
        folora.find_targets(Block(), BLOCK_TARGETS, 9)


def test_tied_weights_are_refused_as_targets_and_left_alone_otherwise():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q_proj, self.lm_head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, ids):
            return self.lm_head(self.q_proj(self.embed(ids)))

    model, batches = Tied(), [{"ids": torch.randint(6, (4, 5))}]
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        folora.prepare(model, batches, batches, 1e-3, rank=2, target_modules=("q_proj", "lm_head"))
    embedding = model.embed.weight.detach().clone()
    folora.prepare(model, batches, batches, 1e-3, rank=2, target_modules=("q_proj",))
    assert model.lm_head.weight is model.embed.weight and torch.equal(model.embed.weight, embedding)


# ---- 3.2: the generalized eigenbasis --------------------------------------------------------------------------------

CASES = {"full rank": (covariance(40, 200, 1e2), covariance(40, 200, 1e2, seed=1), 1e-2),
         "condition 1e6": (covariance(40, 200, 1e6), covariance(40, 200, 1e6, seed=1), 1e-7),
         "fewer tokens than d": (covariance(40, 9), covariance(40, 15, seed=1), 1e-5),
         "no task direction": (covariance(40, 2), covariance(40, 200, seed=1), 1e-2)}


@pytest.mark.parametrize("case", CASES)
def test_eigenbasis_against_scipy(case):
    C_task, C_pre, tau = CASES[case]
    C_task, C_pre = C_task.float(), C_pre.float()
    gamma, V = (t.double() for t in folora.generalized_eigenbasis(C_task, C_pre, tau))
    H = C_pre.double() + tau * torch.eye(40)
    mu, vectors = scipy.linalg.eigh(C_task.double().numpy(), H.numpy())                # Eq. 11-15, ascending
    mu, vectors = torch.tensor(mu).flip(0), torch.tensor(vectors).flip(1)
    assert (gamma.diff() <= 0).all() and (gamma >= 0).all()
    torch.testing.assert_close(gamma, mu, rtol=0, atol=5e-3 * mu[0].item())
    torch.testing.assert_close(V.mT @ H @ V, torch.eye(40).double(), rtol=0, atol=1e-2)
    torch.testing.assert_close(V.mT @ C_task.double() @ V, gamma.diag(), rtol=0, atol=5e-3 * mu[0].item())
    rho = (V * (C_task.double() @ V)).sum(0) / (V * (H @ V)).sum(0)                    # Eq. 8-10 of each column
    torch.testing.assert_close(rho, gamma, rtol=0, atol=5e-3 * mu[0].item())
    alone = [i for i in range(40) if min(abs(mu[i] - mu[j]) for j in range(40) if j != i) > 0.02 * mu[0]]
    assert len(alone) >= 1
    for i in alone:                                                                    # up to sign, away from repeated eigenvalues
        assert abs(V[:, i] @ H @ vectors[:, i]) > 0.999


def test_a_stack_is_solved_as_its_layers_are():
    C_task, C_pre = (torch.stack([covariance(12, 50, 10, seed=s + k) for s in range(4)]).float().view(2, 2, 12, 12) for k in (0, 9))
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, 0.01)
    rows = folora.null_space(C_pre, 3)
    assert gamma.shape == (2, 2, 12) and V.shape == (2, 2, 12, 12) and rows.shape == (2, 2, 3, 12)
    for i in range(2):
        for j in range(2):
            one, basis = folora.generalized_eigenbasis(C_task[i, j], C_pre[i, j], 0.01)
            torch.testing.assert_close(gamma[i, j], one)
            torch.testing.assert_close(V[i, j].abs(), basis.abs(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(rows[i, j].abs(), folora.null_space(C_pre[i, j], 3).abs(), rtol=1e-3, atol=1e-4)


def test_tau_is_raised_with_a_warning_where_cholesky_fails():
    C_task, singular = covariance(20, 100).float(), covariance(20, 5).float()
    with pytest.warns(UserWarning, match="not positive definite at tau = 0; tau was raised to"):
        gamma, V = folora.generalized_eigenbasis(C_task, singular - 1e-6 * torch.eye(20), 0.0)
    assert torch.isfinite(V).all() and torch.isfinite(gamma).all()
    with pytest.raises(ValueError, match="not a covariance"):
        folora.generalized_eigenbasis(C_task, -1e4 * torch.eye(20), 1e-12)
    with pytest.raises(ValueError, match="C_pre has entries that are not finite"):
        folora.generalized_eigenbasis(C_task, singular / 0, 0.1)
    with pytest.raises(ValueError, match="C_task has entries that are not finite"):
        folora.generalized_eigenbasis(C_task * math.nan, singular, 0.1)


def test_tau_that_is_enough_is_used_as_given(recwarn):
    gamma, V = folora.generalized_eigenbasis(torch.eye(3), torch.zeros(3, 3), 0.25)    # H = I / 4: γ = 4, V = 2 I up to rotation
    torch.testing.assert_close(gamma, torch.full((3,), 4.0))
    torch.testing.assert_close(V.mT @ V, 4 * torch.eye(3))
    assert not recwarn


# ---- 3.3: gate and optimiser ----------------------------------------------------------------------------------------

def test_gate_is_eq_22():
    gamma = [100.0, 3.0, 1.0, 0.5, 0.01, 0.0]
    for lam, s_min in ((1.0, 0.3), (3.0, 0.0), (0.5, 1.0)):
        literal = [max(g / (g + lam), s_min) for g in gamma]
        torch.testing.assert_close(folora.spectral_gate(torch.tensor(gamma), lam, s_min), torch.tensor(literal))
    for lam, s_min in ((0.0, 0.3), (-1.0, 0.3), (1.0, 1.1), (1.0, -0.1)):
        with pytest.raises(ValueError):
            folora.spectral_gate(torch.ones(2), lam, s_min)


def literal_sadam(A, gradients, V, gate, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """Eq. 18-24 one number at a time, in float64: for each row and each column v_i of V."""
    A, V, gate = A.double().clone(), V.double(), gate.double()
    r, d = A.shape
    m, v = [[0.0] * d for _ in range(r)], [[0.0] * d for _ in range(r)]
    for t, G in enumerate(gradients, 1):
        for row in range(r):
            delta = torch.zeros(d, dtype=torch.float64)
            for i in range(d):
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
        assert torch.equal(p.grad, G)                                                  # never written
    return p.detach()


@pytest.fixture
def spectral():
    torch.manual_seed(3)
    gamma, V = folora.generalized_eigenbasis(covariance(6, 30).float(), covariance(6, 30, seed=1).float(), 0.01)
    gradients = [torch.randn(3, 6) * 10 ** k for k in (0, -1, 0.5, -8)]
    return torch.randn(3, 6), gradients, V, folora.spectral_gate(gamma, 1.0, 0.3)


def test_sadam_against_eq_18_to_24_one_number_at_a_time(spectral):
    A, gradients, V, gate = spectral
    assert gate.max() - gate.min() > 0.1
    expected = literal_sadam(A, gradients, V, gate, 0.01)
    torch.testing.assert_close(sadam_run(A, gradients, basis=V, gate=gate).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-8])                                           # float16 would lose the second
def test_a_bfloat16_basis_leaks_little_into_what_must_not_move(scale):
    torch.manual_seed(0)
    C_pre, C_task = (covariance(24, 40, seed=seed) for seed in (0, 1))
    C_pre += 1000 * torch.ones(24, 24)                                                 # one huge direction, as a first token makes
    C_pre = (C_pre / C_pre.diagonal().mean()).float()
    gamma, V = folora.generalized_eigenbasis(C_task.float(), C_pre, 0.01)
    A, gradients, gate = torch.randn(2, 24), [scale * torch.randn(2, 24) for _ in range(4)], folora.spectral_gate(gamma, 1.0, 0.0)
    expected = literal_sadam(A, gradients, V, gate, 0.01)
    A_16 = sadam_run(A, gradients, basis=V.bfloat16(), gate=gate).double()
    penalty = lambda D: torch.trace(D @ (C_pre.double() + 0.01 * torch.eye(24)) @ D.mT)
    assert penalty(A_16 - expected) < 1e-3 * penalty(expected - A.double())


@pytest.mark.parametrize("dtype, wanted", [("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float64", "float32")])
def test_the_basis_is_bfloat16_if_the_base_is(dtype, wanted):
    model = nn.ModuleDict({"f": nn.Linear(8, 5).to(getattr(torch, dtype))})
    optimizer = folora.attach(model, folora.decompose({"f": covariance(8, 20).float()}, {"f": covariance(8, 20, seed=1).float()}, rank=2), lr=0.1)
    assert optimizer.param_groups[0]["basis"].dtype == getattr(torch, wanted) and model["f"].lora_A.dtype == torch.float32


def test_sadam_does_not_notice_signs_of_the_eigenvectors(spectral):
    A, gradients, V, gate = spectral
    flipped = V * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(sadam_run(A, gradients, basis=V, gate=gate), sadam_run(A, gradients, basis=flipped, gate=gate))


@pytest.mark.parametrize("group", [{}, {"basis": torch.eye(6), "gate": torch.ones(6)}])
def test_sadam_is_torch_adam_without_a_basis_and_with_the_trivial_one(spectral, group):
    A, gradients, _, _ = spectral
    p = nn.Parameter(A.clone())
    adam = torch.optim.Adam([p], lr=0.01)
    for G in gradients:
        p.grad = G.clone()
        adam.step()
    torch.testing.assert_close(sadam_run(A, gradients, **group), p.detach(), rtol=1e-6, atol=1e-7)


def test_sadam_goes_on_from_its_state_dict(spectral, tmp_path):
    A, gradients, V, gate = spectral
    straight = sadam_run(A, gradients, basis=V, gate=gate)
    p = nn.Parameter(A.clone())
    first = folora.SAdam([{"params": [p], "basis": V, "gate": gate}], 0.01)
    for G in gradients[:2]:
        p.grad = G.clone()
        first.step()
    torch.save(first.state_dict(), tmp_path / "state")
    second = folora.SAdam([{"params": [p], "basis": torch.eye(6), "gate": torch.ones(6)}], 0.5)
    second.load_state_dict(torch.load(tmp_path / "state"))
    for G in gradients[2:]:
        p.grad = G.clone()
        second.step()
    assert torch.equal(p, straight)


def test_sadam_with_a_scheduler_accumulation_a_closure_and_missing_gradients():
    torch.manual_seed(0)
    p, unused = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.ones(3))
    optimizer = folora.SAdam([p, unused], 0.1, betas=(0.8, 0.9), eps=1e-3)
    q = nn.Parameter(p.detach().clone())
    adam = torch.optim.Adam([q], 0.1, betas=(0.8, 0.9), eps=1e-3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 5) for o in (optimizer, adam)]
    for _ in range(5):
        for parameter, opt in ((p, optimizer), (q, adam)):
            for part in range(2):
                ((parameter - part) ** 4).sum().backward()                             # accumulates
            opt.step()
            opt.zero_grad()
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(p, q)
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
    torch.testing.assert_close(sadam_run(A[1:2], [G[1:2] for G in gradients], basis=V, gate=gate), whole[1:2])


def test_sadam_refuses_what_does_not_fit():
    p = nn.Parameter(torch.zeros(2, 4))
    for group in ({"basis": torch.eye(4)}, {"gate": torch.ones(4)}, {"basis": torch.eye(3), "gate": torch.ones(3)}, {"basis": torch.eye(4), "gate": torch.ones(3)}):
        with pytest.raises(ValueError):
            folora.SAdam([{"params": [p], **group}], 0.1)
    for wrong in (dict(lr=-1), dict(lr=0.1, betas=(1.0, 0.9)), dict(lr=0.1, eps=-1)):
        with pytest.raises(ValueError):
            folora.SAdam([p], **wrong)


# ---- B.4: calibration text ------------------------------------------------------------------------------------------

def test_screen_rejects_each_kind_of_degenerate_text_and_nothing_just_short_of_it():
    varied = lambda n: list(range(n))
    assert folora.reject_reason(varied(31)) == "fewer than 32 tokens" and folora.reject_reason(varied(32)) is None
    assert folora.reject_reason(varied(40) + [7] * 20) == "a run of 20 equal tokens" and folora.reject_reason(varied(40) + [7] * 19) is None
    cycle = lambda distinct, n: [i % distinct for i in range(n)]
    assert folora.reject_reason(cycle(15, 127)) is None                                # 128 · 0.12 = 15.36
    assert folora.reject_reason(cycle(15, 128)) == "too few distinct tokens" and folora.reject_reason(cycle(16, 128)) is None
    assert [folora.reject_reason(cycle(k, 1000)) for k in (119, 120)] == ["too few distinct tokens", "too few distinct 4-grams"]
    # 63 distinct 4-grams of 253 at length 256 are 0.249, 64 are 0.253; below 256 tokens the rule is not asked
    assert folora.reject_reason(cycle(63, 256)) == "too few distinct 4-grams" and folora.reject_reason(cycle(64, 256)) is None
    assert folora.reject_reason(cycle(60, 255)) is None


class FakeGenerator(nn.Module):
    """Stands in for a language model: `generate` returns what `script` says and keeps its settings."""

    def __init__(self, script):
        super().__init__()
        self.weight, self.script, self.calls = nn.Parameter(torch.zeros(1)), script, []

    def generate(self, ids, **settings):
        self.calls.append({**settings, "count": len(ids)})
        assert ids.shape[1] == 1 and (ids == 1).all()                                  # a single BOS
        rows = [self.script() for _ in range(len(ids))]
        width = max(map(len, rows))
        return torch.tensor([[1] + row + [2] * (width - len(row)) for row in rows])


FAKE_TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2, decode=lambda tokens: " ".join(map(str, tokens)))


def test_sampling_draws_decoding_from_the_mixture_in_batches():
    model = FakeGenerator(lambda: torch.randint(3, 9999, (40,)).tolist())
    bar = []
    texts = folora.sample_calibration(model.train(), FAKE_TOKENIZER, 2000, 30, 60, batch_size=128, progress=bar.append)
    assert len(texts) == 2000 == sum(bar) and model.training
    assert all(t.dtype == torch.long and t.ndim == 1 and t[0] == 1 and len(t) == 41 for t in texts)
    share = {}
    for call in model.calls:
        assert call["do_sample"] and (call["min_new_tokens"], call["max_new_tokens"]) == (30, 60) and call["count"] <= 128
        key = call["temperature"], call["top_p"], call["top_k"]
        share[key] = share.get(key, 0) + call["count"] / 2000
    assert share == {(1.0, 1.0, 0): pytest.approx(0.7, abs=0.04), (1.0, 0.95, 0): pytest.approx(0.2, abs=0.04), (1.2, 0.98, 50): pytest.approx(0.1, abs=0.03)}
    assert len(model.calls) <= 2 * 3 + 2000 // 128


def test_sampling_is_plain_whatever_the_model_is_configured_for(tiny):
    model, config = copy.deepcopy(tiny[0]), dict(repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.9, num_beams=2, return_dict_in_generate=True)
    sample = lambda: [t.tolist() for t in folora.sample_calibration(model, tiny[1], 4, 32, 64)]
    plain = sample()
    for name, value in config.items():
        setattr(model.generation_config, name, value)
    assert sample() == plain and all(getattr(model.generation_config, name) == value for name, value in config.items())


def test_sampling_replaces_rejects_and_duplicates_and_cuts_at_end_of_sequence():
    good = lambda k: list(range(k, k + 50))
    queue = [good(10), good(10), [5] * 50, good(20), good(3000)[:20], good(30) + [2, 7, 7], good(40), good(50), good(60), good(70)]
    texts = folora.sample_calibration(FakeGenerator(lambda: queue.pop(0)), FAKE_TOKENIZER, 4, 32, 64)
    assert sorted(t.tolist() for t in texts) == [[1] + good(k) for k in (10, 20, 30, 40)]


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    draw = lambda seed: [t.tolist() for t in folora.sample_calibration(FakeGenerator(lambda: torch.randint(3, 9999, (40,)).tolist()), FAKE_TOKENIZER, 5, seed=seed)]
    state = torch.random.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_sampling_gives_up_on_a_model_that_only_produces_rejects():
    model = FakeGenerator(lambda: [5] * 50)
    with pytest.raises(RuntimeError, match=r"only produces text that the screen rejects \(exact duplicate: 63, a run of 20 equal tokens: 1\); 0 of 10"):
        folora.sample_calibration(model.train(), FAKE_TOKENIZER, 10)
    assert model.training
    with pytest.raises(ValueError, match="min_new_tokens"):
        folora.sample_calibration(model, FAKE_TOKENIZER, 10, 100, 50)


def test_sampling_from_a_real_model():
    model, tokenizer = ev.load_model("tiny", torch.device("cpu"), torch.float32)
    texts = folora.sample_calibration(model, tokenizer, 6, 128, 140)
    assert all(t[0] == tokenizer.bos_token_id and 129 <= len(t) <= 141 and tokenizer.eos_token_id not in t for t in texts)
    # it says what it was pretrained on: known words, in known forms
    assert sum(bool(re.search(r"Q: .*\?\nA: |### Instruction|\d [+-] \d+ = \d|\.\n\n", tokenizer.decode(t))) for t in texts) >= 5


# ---- B.3: the start -------------------------------------------------------------------------------------------------

def test_null_space_holds_the_least_energy():
    C = covariance(30, 100, 1e4)
    A0 = folora.null_space(C.float(), 7).double()
    torch.testing.assert_close(A0 @ A0.mT, torch.eye(7).double(), rtol=0, atol=1e-5)
    optimum = scipy.linalg.eigvalsh(C.numpy())[:7].sum()
    assert (A0 @ C @ A0.mT).trace().item() == pytest.approx(optimum, rel=1e-3)
    with pytest.raises(ValueError, match="rank"):
        folora.null_space(C, 31)


@pytest.mark.parametrize("alpha", [None, 32.0])
def test_start_is_b3_and_exact_in_float32(alpha):
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48), torch.randn(100, 64)
    W0, before, U = base.weight.detach().clone(), base(x).detach(), folora.null_space(covariance(64, 300).float(), 16)
    layer = folora.LoRALinear(base, 16, alpha, U)
    kappa = 1.0 if alpha is None else 2.0
    assert layer.scaling == kappa and layer.lora_A.shape == (16, 64) and layer.lora_B.shape == (48, 16)
    assert torch.equal(layer.lora_A, U)
    torch.testing.assert_close(layer.lora_B.detach(), W0 @ U.mT / kappa)
    torch.testing.assert_close(layer.base_layer.weight, W0 - W0 @ U.mT @ U, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=2e-6)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_plain_start_is_loras_and_given_factors_are_taken():
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48), torch.randn(10, 64)
    W0, before = base.weight.detach().clone(), base(x).detach()
    plain = folora.LoRALinear(base, 8)
    assert torch.equal(plain(x), before) and plain.lora_B.abs().max() == 0 and torch.equal(base.weight, W0)
    assert 0.9 / 8 < plain.lora_A.abs().max() <= 1 / 8                                 # Kaiming, a = √5: uniform in ±1/√d_in
    A0, B0 = torch.randn(8, 64), torch.randn(48, 8)
    given = folora.LoRALinear(base, 8, 16, A0, B0)
    torch.testing.assert_close(given.base_layer.weight, W0 - 2 * B0 @ A0)
    torch.testing.assert_close(given(x), before, rtol=1e-4, atol=1e-4)
    zero = folora.LoRALinear(nn.Linear(64, 48), 8, None, A0, torch.zeros(48, 8))
    assert torch.equal(zero.lora_A, A0)
    with pytest.raises(ValueError, match="rank must be between 1 and the input width 64, not 65"):
        folora.LoRALinear(base, 65)


def test_a_scaling_of_zero_is_refused():
    with pytest.raises(ValueError, match="alpha must be > 0"):
        folora.LoRALinear(nn.Linear(6, 5), 2, alpha=0)


def test_adapters_are_float32_on_a_bfloat16_base_and_merge_rounds_once():
    base, x = nn.Linear(16, 12).to(torch.bfloat16), torch.randn(5, 16, dtype=torch.bfloat16)
    layer = folora.LoRALinear(base, 4, alpha=8)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        layer.lora_B.normal_()
    W = (base.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).to(torch.bfloat16)
    plain = layer.merged()
    assert (plain.weight == W).float().mean() > 0.98 and type(plain) is nn.Linear


# ---- the recipe -----------------------------------------------------------------------------------------------------

def low_rank_inputs(d=16, seed=0):
    """Pretraining inputs in 10 of 16 dimensions, task inputs in 4 of those and 4 others, and what of the task lies in the others."""
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


@pytest.mark.parametrize("zero_start", [False, True])
def test_prepare_on_a_bare_mlp_learns_and_keeps(zero_start):
    pre, task, new = low_rank_inputs()
    target = torch.sin(new)
    moved = {}
    for method in ("folora", "lora"):
        torch.manual_seed(0)
        model = MLP()
        before = model(pre).detach()
        if method == "folora":
            optimizer = folora.prepare(model, [{"x": pre}], [{"x": task}], 1e-2, rank=4, target_modules=("first",), lam=3.0, s_min=0.0, zero_start=zero_start)
            torch.testing.assert_close(model(pre), before, rtol=1e-4, atol=1e-5)       # the start does not perturb
            assert (model.first.lora_B.abs().max() == 0) == zero_start
            assert [n for n, p in model.named_parameters() if p.requires_grad] == ["first.lora_A", "first.lora_B"]
        else:
            model.requires_grad_(False)
            model.first = folora.LoRALinear(model.first, 4)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(150):
            loss = ((model(task) - target) ** 2).mean()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
        moved[method] = (model(pre) - before).norm() / before.norm(), losses[-1] / losses[0]
        adapted = model(task).detach()
        plain = folora.merge(model)
        assert type(plain.first) is nn.Linear and not any("lora" in n for n, _ in plain.named_parameters())
        torch.testing.assert_close(plain(task), adapted, rtol=1e-4, atol=1e-4)
    assert moved["folora"][1] < 0.7 and moved["folora"][0] < 0.5 * moved["lora"][0], moved


def test_prepare_is_its_parts_literally():
    """One layer by hand in float64: normalised covariances, the null space, scipy's eigenproblem, the gate."""
    torch.manual_seed(0)
    pre, task, _ = low_rank_inputs()
    model, W0 = MLP(), None
    W0 = model.first.weight.detach().clone().double()
    optimizer = folora.prepare(model, [{"x": pre}], [{"x": 100 * task}], 0.1, rank=3, alpha=6, tau=0.05, lam=2.0, s_min=0.2, target_modules=("first",), lr_a=0.01)
    unit = lambda X: (X.mT.double() @ X.double()) / (X.double() ** 2).sum() * X.shape[1]          # the task's factor of 100 divides out
    C_pre, C_task = unit(pre), unit(task)
    gamma, V = scipy.linalg.eigh(C_task.numpy(), C_pre.numpy() + 0.05 * torch.eye(16).numpy())
    gamma, V = torch.tensor(gamma).flip(0), torch.tensor(V).flip(1)
    a, b = optimizer.param_groups
    assert (a["lr"], b["lr"], b["basis"]) == (0.01, 0.1, None) and a["params"] == [model.first.lora_A] and b["params"] == [model.first.lora_B]
    torch.testing.assert_close(a["gate"].double(), torch.clamp(gamma / (gamma + 2.0), min=0.2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((a["basis"] * a["gate"]).double() @ a["basis"].mT.double(), (V * a["gate"].double()) @ V.mT, rtol=1e-2, atol=1e-2)
    A0 = model.first.lora_A.detach().double()
    assert (A0 @ C_pre @ A0.mT).trace() < 1e-5                                         # 16 - 10 null directions, rank 3
    torch.testing.assert_close(2.0 * model.first.lora_B.detach().double(), W0 @ A0.mT, rtol=1e-4, atol=1e-5)


def test_several_passes_give_the_same_sites_with_fewer_covariances_at_a_time(monkeypatch):
    torch.manual_seed(0)
    batches, held, real = [[{"x": torch.randn(4, 7, 8)}] for _ in range(2)], [], folora.collect_covariances
    monkeypatch.setattr(folora, "collect_covariances", lambda *args: (C := real(*args), held.append(len(C)))[0])
    model, gates = Block(), []
    for passes in (1, 3):
        optimizer = folora.prepare(copy.deepcopy(model), *batches, lr=1e-3, rank=2, target_modules=BLOCK_TARGETS, passes=passes)
        gates.append(torch.cat([g["gate"].repeat(len(g["params"])) for g in optimizer.param_groups[:-1]]))
    torch.testing.assert_close(*gates)
    assert held == [6, 6] + [2] * 6
    nested = nn.Sequential()                               # "f" also matches "sub.f", whose turn is in the second pass
    nested.f, nested.sub = nn.Linear(8, 8), nn.Sequential()
    nested.sub.f = nn.Linear(8, 8)
    folora.prepare(nested, [{"input": batches[0][0]["x"]}], [{"input": batches[1][0]["x"]}], lr=1e-3, rank=2, target_modules=("f",), passes=2)
    assert isinstance(nested.f.base_layer, nn.Linear) and isinstance(nested.sub.f.base_layer, nn.Linear)


def test_bases_are_solved_once_per_distinct_input():
    torch.manual_seed(0)
    model, batches = Block(), [{"x": torch.randn(4, 20, 8)}]
    C = folora.collect_covariances(model, batches, BLOCK_TARGETS)
    done = []
    sites = folora.decompose(C, dict(C), 2, progress=done.append)
    assert sorted(site["modules"] for site in sites) == [["down_proj"], ["o_proj"], ["q_proj", "k_proj", "v_proj"], ["up_proj"]] and sum(done) == 4
    optimizer = folora.attach(model, sites, 0.1)
    shared = next(g for g in optimizer.param_groups if len(g["params"]) == 3 and g["basis"] is not None)
    assert {id(p) for p in shared["params"]} == {id(model.q_proj.lora_A), id(model.k_proj.lora_A), id(model.v_proj.lora_A)}


def test_large_layers_are_decomposed_one_at_a_time_with_the_same_result(monkeypatch):
    C_pre = {str(i): covariance(8, 40, seed=i).float() for i in range(5)}
    C_task = {str(i): covariance(8, 40, seed=i + 9).float() for i in range(5)}
    together = folora.decompose(dict(C_pre), dict(C_task), 2)
    monkeypatch.setattr(folora, "STACK", 1)
    left, alive = [], [weakref.ref(C) for C in (*C_pre.values(), *C_task.values())]
    alone = folora.decompose(C_pre, C_task, 2, progress=lambda _: left.append((len(C_pre), len(C_task), sum(C() is not None for C in alive))))
    assert left == [(n, n, 2 * n) for n in (4, 3, 2, 1, 0)]          # what is solved is free
    for one, other in zip(alone, together, strict=True):
        assert one["modules"] == other["modules"]
        torch.testing.assert_close(one["gamma"], other["gamma"])
    with pytest.raises(ValueError, match="pass dict"):
        folora.decompose(C_pre, C_task, 2)


@pytest.mark.parametrize("wrong, message", [(dict(rank=17), "rank must be"), (dict(tau=-1.0), "tau, lr and lr_a must"), (dict(lr=-1.0), "tau, lr and lr_a must"),
                                            (dict(lam=0.0), "lam must be"), (dict(s_min=2.0), "lam must be"), (dict(target_modules=("q_proj",)), "this model has: first, second")])
def test_prepare_refuses_before_any_forward_pass(wrong, message):
    def batches():
        raise AssertionError("a forward pass was about to run")
        yield
    with pytest.raises(ValueError, match=message):
        folora.prepare(MLP(), batches(), batches(), **{**dict(lr=0.1, rank=2, target_modules=("first",)), **wrong})


def test_the_file_stands_alone(tmp_path):
    (tmp_path / "folora.py").write_text((HERE / "folora.py").read_text())
    code = "import sys, folora; print([m for m in ('transformers', 'datasets', 'safetensors') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.strip() == "[]", out.stderr


# ---- eval.py --------------------------------------------------------------------------------------------------------

# (text, answers, correct on nq_open, correct on triviaqa), as lm-eval 0.4.13 scores them (see test_metrics_agree_with_lm_eval)
EXACT = [("Paris", ["Paris", "Lutetia"], 1, 1), ("paris", ["Paris"], 1, 1), ("the Eiffel Tower", ["Eiffel Tower"], 1, 0), ("The Eiffel tower!", ["eiffel tower"], 1, 0),
         ("Eiffel", ["Eiffel Tower"], 0, 0), ("U.S.A", ["USA"], 1, 1), ("", ["Paris"], 0, 0), ("an apple", ["a apple"], 1, 0), ("banana the", ["banana"], 0, 0),
         ("December 14 1972", ["14 December 1972 UTC", "December 14, 1972"], 1, 1), ("theatre", ["atre"], 0, 0), ("THE WHO", ["who"], 0, 0)]


@pytest.mark.parametrize("text, answers, nq, trivia", EXACT)
def test_exact_match(text, answers, nq, trivia):
    assert (ev.exact_match(text, answers), ev.exact_match(text, answers, articles=False)) == (bool(nq), bool(trivia))


def test_metrics_agree_with_lm_eval():
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="pip install lm-eval==0.4.13 to compare with it; its verdicts stand in EXACT")
    from lm_eval.tasks.webqs.utils import doc_to_choice
    nq = dict(ignore_case=True, ignore_punctuation=True, regexes_to_ignore=["\\b(?:The |the |An |A |The |a |an )"])
    for text, answers, on_nq, on_trivia in EXACT:
        score = lambda **how: max(metrics.exact_match_hf_evaluate([text], [a], **how)["exact_match"] for a in answers)
        assert score(**nq) == on_nq and score(ignore_case=True, ignore_punctuation=True) == on_trivia
    for answers in (["Spanish", "Spain", "Spanish Language"], ["b", "a", "ab"]):
        assert ev.shortest_prefixes(answers) == doc_to_choice({"answers": list(answers)})


def test_text_is_cut_at_the_first_stop():
    assert ev.until(" Paris, France.\nQ: next", ("\n", ".", ",")) == "Paris" and ev.until(" Paris ", ("\n",)) == "Paris"


def test_numbers_after_the_answer_is():
    assert [ev.final_number(t) for t in ("The answer is: 18", "The answer is: $1,234.50.", "The answer is: 3. The answer is: -4", "18", "The answer is: none", "so\nThe answer is: 5%")] \
        == [18, 1234.5, -4, None, None, 5]
    assert ev.boxed(r"first \boxed{1} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"


def test_fields_of_the_other_training_sets():
    """One row each of m-a-p/CodeFeedback-Filtered-Instruction, WizardLMTeam/WizardLM_evol_instruct_70k and meta-math/MetaMathQA."""
    rows = [{"query": "q", "answer": "a", "resource": "evolinstruct", "lang": "python"}, {"instruction": "q", "output": "a"},
            {"type": "GSM_Rephrased", "query": "q", "original_question": "o", "response": "a"}]
    assert ev.to_pairs(rows, "x") == [("q", "a")] * 3


def test_pairs_are_found_under_every_name_and_gsm8k_notes_go():
    rows = [{"question": "q", "answer": "2+3=<<2+3=5>>5.\n#### 5"}, {"query": "q", "response": "r"}, {"instruction": "q", "input": "i", "output": "r"}, {"query": "q", "answer": "r"}]
    assert ev.to_pairs(rows, "x") == [("q", "2+3=5.\nThe answer is: 5"), ("q", "r"), ("q\ni", "r"), ("q", "r")]
    with pytest.raises(SystemExit, match="x, line 2: no field called question or query or instruction or problem; it has: text"):
        ev.to_pairs([rows[0], {"text": "t"}], "x")


@pytest.fixture(scope="module")
def tiny():
    return ev.load_model("tiny", torch.device("cpu"), torch.float32)


def test_loss_is_on_the_response_and_equals_the_models_own(tiny, monkeypatch):
    model, tokenizer = tiny
    examples = ev.encode_all(tokenizer, [("What is 2 + 2?", "It is 4.\nThe answer is: 4"), ("Sort these words: b a", "a b, as asked and no more")], 256)
    for example in examples:
        prompt = [i for i, label in zip(example["ids"], example["labels"]) if label == -100]
        assert tokenizer.decode(prompt).endswith("### Response:" if example is examples[1] else "### Response: Let's think step by step.") and example["labels"][-1] == tokenizer.eos_token_id
        assert example["labels"][len(prompt):] == example["ids"][len(prompt):]
    batch = ev.collate(examples, "cpu")
    states, targets = ev.label_states(model, batch)
    logits = ev.logits_of(model, states)
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(nn.functional.cross_entropy(logits, targets), own)
    assert ev.mean_nll(model, examples, batch_size=1) == pytest.approx(own.item(), rel=1e-4)
    monkeypatch.setattr(ev, "LOGITS", 3 * logits.shape[1])                                                  # three positions a piece
    assert len(ev.pieces(model, states)) == -(-len(states) // 3) > 1
    assert ev.mean_nll(model, examples, batch_size=1) == pytest.approx(own.item(), rel=1e-4)
    weight = model.model.layers[0].mlp.down_proj.weight
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (ev.summed_nll(model, batch) / len(targets), own))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_drift_is_the_kl_of_next_token_distributions(tiny, monkeypatch):
    model, tokenizer = tiny
    other, _ = ev.load_model("tiny", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    texts = [torch.tensor(tokenizer(t)["input_ids"]) for t in ("12 + 7 = 19\n", "Q: what is 4 + 4?\nA: 8\nQ: ")]
    total = count = 0
    for t in texts:
        p, q = (m(t[None]).logits[0, :-1].double().softmax(-1) for m in (model, other))
        total, count = total + (p * (p / q).log()).sum().item(), count + len(p)
    assert ev.drift(other, model, texts) == pytest.approx(total / count, rel=1e-3) and total > 0
    assert train_math.Probe(model, texts, positions=400)(other) == pytest.approx(total / count, rel=1e-3)
    monkeypatch.setattr(ev, "LOGITS", 5 * model.config.vocab_size)
    assert ev.drift(other, model, texts) == pytest.approx(total / count, rel=1e-3)
    assert len(train_math.Probe(model, texts, positions=3 * len(texts)).before) == 3 * len(texts)           # as many of each


def test_webqs_by_greedy_text_is_greedy_likelihood(tiny):
    """Against the definition: every token of an answer is the argmax given the question and the tokens before it."""
    model, tokenizer = tiny
    rows = [{"question": q, "answers": a} for q, a in (("what is 12 + 7", ["19", "20"]), ("what is 12 + 7", ["x"]), ("what does one say", ["A: 1", "b"]))]
    literal = []
    for row in rows:
        prompt, greedy = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"], False
        rows_own = tokenizer.decode(ev.greedy(model, tokenizer, [f"Question: {row['question']}\nAnswer:"], 3)[0])
        row["answers"] = row["answers"] + ([rows_own.strip()] if row is rows[0] else [])
        for answer in ev.shortest_prefixes(row["answers"]):
            ids = torch.tensor(tokenizer(f"Question: {row['question']}\nAnswer: {answer}")["input_ids"])
            greedy |= bool((model(ids[None]).logits[0, len(prompt) - 1:-1].argmax(-1) == ids[len(prompt):]).all())
        literal.append(float(greedy))
    assert ev.score_webqs(model, tokenizer, rows, "x", "webqs") == literal


def test_summary_rows():
    before, after = {"gsm8k": 10.0, "nq_open": 20.0, "webqs": 30.0, "drift": 0.0}, {"gsm8k": 40.0, "nq_open": 15.0, "webqs": 25.0, "drift": 0.1}
    assert ev.summarise(after, before) == {"Avg1": 20.0, "Avg1(%)": 80.0, "Avg2": 40.0, "GM": pytest.approx(math.sqrt(800))}
    assert "drift" in ev.table({"untouched": before, "folora": after}) and "Avg1(%)" in ev.table({"untouched": before, "folora": after})
    assert "Avg1(%)" not in ev.table({"folora": after}) and "Avg1(%)" not in ev.summarise(after, {**before, "nq_open": 0.0, "webqs": 0.0})


def test_the_harness_scores_a_local_task_into_the_same_table(tmp_path, capsys, monkeypatch):
    """tiny's facts as an lm-eval task of one's own: the score is the built-in one, and stands in Avg1 like the others."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13 for --harness")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/world.yaml").write_text(f"""
task: world
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {HERE / 'tiny/facts.jsonl'}}}}}
output_type: generate_until
validation_split: validation
description: "Answer these questions:\\n\\n"
doc_to_text: "Q: {{{{question}}}}?\\nA:"
doc_to_target: "{{{{answer[0]}}}}"
generation_kwargs: {{until: ["\\n", ".", ","], do_sample: false, max_gen_toks: 64}}
filter_list: [{{name: remove_whitespace, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, ignore_case: true, ignore_punctuation: true}}]
""")
    monkeypatch.setattr(sys, "argv", ["eval.py", "tiny", "--tasks", "facts,sums", "--harness", f"{tmp_path}/tasks/world", "--limit", "8"])
    ev.main()
    row = {line.split()[0]: float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1}
    assert row["world"] == row["facts"] > 0 and row["Avg1"] == pytest.approx((row["world"] + row["facts"] + row["sums"]) / 3, abs=0.01)
    with pytest.raises(SystemExit, match="lm-eval has no task nothing_of_the_kind"):
        ev.harness(None, None, "nothing_of_the_kind")


def test_the_harness_is_asked_for_by_its_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        ev.harness(None, None, "mmlu")


def test_one_score_of_a_harness_result():
    assert ev.harness_score({"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}) == 25
    assert ev.harness_score({"exact,none": 10.0, "HasAns_exact,none": 20.0, "NoAns_exact,none": 5.0, "sample_len": 7}) == 20
    assert ev.harness_score({"prompt_level_loose_acc,none": 0.5, "inst_level_strict_acc,none": 0.6, "prompt_level_strict_acc,none": 0.4}) == 40
    assert ev.harness_score({"pass@1,create_test": 0.1}) == 10
    assert ev.role("mmlu") == "preserve" and ev.role("humaneval") == ev.role("gsm8k") == "target" and ev.role("GM") == ""


# ---- the baselines --------------------------------------------------------------------------------------------------

def baseline(method, base, C, rank, alpha=None, **options):
    """(adapter, optimiser) of train_math's method on one layer called q_proj, in a model with the attributes the function looks at."""
    model = nn.Module()
    model.q_proj = copy.deepcopy(base)
    options = SimpleNamespace(**{**dict(method=method, update_a=None, rank=rank, alpha=alpha, lr=1e-2, lr_a=None), **options})
    optimizer = train_math.add_adapters(options, model, C_pre={"q_proj": C}, targets=("q_proj",))
    return model.q_proj, optimizer


@pytest.fixture
def layer():
    torch.manual_seed(0)
    X = torch.randn(400, 12) @ torch.randn(12, 12)
    return nn.Linear(12, 10), X.mT @ X / 400


BASELINES = [m for m in train_math.METHODS if m != "folora"]


@pytest.mark.parametrize("alpha", [None, 12.0])
@pytest.mark.parametrize("method", BASELINES)
def test_baselines_are_exact_at_the_start_and_move(method, alpha, layer):
    base, C = layer
    x = torch.randn(5, 12)
    adapter, optimizer = baseline(method, base, C, 4, alpha)
    torch.testing.assert_close(adapter(x), base(x), rtol=1e-5, atol=1e-5)
    A, B = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
    for _ in range(2):
        adapter(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (adapter(x) - base(x)).abs().max() > 1e-3 and not torch.equal(adapter.lora_B, B)
    assert torch.equal(adapter.lora_A, A) == (method == "lora-null-v2")
    y = adapter(x)
    torch.testing.assert_close(adapter.merged()(x), y, rtol=1e-5, atol=1e-5)


def test_milora_and_lora_null_against_their_formulas_in_numpy(layer):
    base, C = layer
    W, C64 = base.weight.detach().double().numpy(), C.double().numpy()
    U, S, Vh = numpy.linalg.svd(W, full_matrices=False)
    A, B = (f.numpy() for f in train_math.milora(base.weight.detach(), C, 4, 1.0))
    numpy.testing.assert_allclose(B @ A, U[:, -4:] * S[-4:] @ Vh[-4:], atol=1e-5)
    numpy.testing.assert_allclose(A @ A.T, numpy.diag(S[-4:]), atol=1e-5)              # both factors carry √S
    numpy.testing.assert_allclose(B.T @ B, numpy.diag(S[-4:]), atol=1e-5)
    null = numpy.linalg.eigh(C64)[1][:, :4]
    A, B = (f.numpy() for f in train_math.lora_null(base.weight.detach(), C, 4, 1.0))
    numpy.testing.assert_allclose(B @ A, W @ null @ null.T, atol=1e-4)
    numpy.testing.assert_allclose(A @ A.T, numpy.diag(numpy.linalg.svd(W @ null @ null.T)[1][:4]), atol=1e-4)
    numpy.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-4)


def test_oploras_update_is_orthogonal_to_the_top_singular_spaces(layer):
    base, C = layer
    adapter, optimizer = baseline("oplora", base, C, 4)
    for _ in range(3):
        adapter(torch.randn(9, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    update = adapter.merged().weight.detach() - base.weight.detach()
    U, S, Vh = torch.linalg.svd(base.weight.detach())
    assert (U[:, :4].mT @ update).abs().max() < 1e-5 and (update @ Vh[:4].mT).abs().max() < 1e-5
    assert (U[:, 4:].mT @ update).abs().max() > 1e-3 and (update @ Vh[4:10].mT).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [4, 8])
def test_lora_and_corda_are_pefts(alpha, layer, tmp_path):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    base, C = layer

    def theirs(config, prepare=lambda *a: None):
        model = nn.Module()
        model.q_proj = copy.deepcopy(base)
        prepare(model, config)                             # PEFT reads module.weight, of any name
        return get_peft_model(model, config).base_model.model.q_proj

    peft = theirs(LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"]))
    torch.manual_seed(3)
    peft.reset_lora_parameters("default", True)
    torch.manual_seed(3)
    ours, _ = baseline("lora", base, C, 4, alpha)
    assert torch.equal(ours.lora_A, peft.lora_A["default"].weight) and torch.equal(ours.lora_B, peft.lora_B["default"].weight)
    assert ours.scaling == peft.scaling["default"]

    torch.save({"q_proj": C.clone()}, tmp_path / "C.pt")
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method="kpm", covariance_file=str(tmp_path / "C.pt")))
    peft = theirs(config, preprocess_corda)
    ours, _ = baseline("corda", base, C, 4, alpha)
    signs = torch.sign((ours.lora_A * peft.lora_A["default"].weight).sum(1))
    torch.testing.assert_close(ours.lora_A * signs[:, None], peft.lora_A["default"].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.lora_B * signs, peft.lora_B["default"].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.base_layer.weight, peft.base_layer.weight, rtol=1e-3, atol=1e-4)


# ---- the scripts, end to end ----------------------------------------------------------------------------------------

FAST = ["--max-samples", "64", "--batch-size", "8", "--micro-batch-size", "4", "--max-steps", "6", "--log-every", "2", "--calibration-samples", "4", "--calibration-max-tokens", "130",
        "--task-samples", "8", "--eval-samples", "4", "--rank", "8"]
TASKS = f"gsm8k={ev.TINY / 'test.jsonl'},facts,nll={ev.TINY / 'test.jsonl'},drift"          # untrained, gsm8k runs to its limit


def script(name, *arguments):
    return subprocess.run([sys.executable, str(HERE / name), *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{method: (run directory, what it printed)}, each trained once, on request."""
    runs = {}

    def run(method):
        if method not in runs:
            out, printed = tmp_path_factory.mktemp("runs") / method, io.StringIO()
            with contextlib.redirect_stdout(printed):
                train_math.main([*FAST, "--method", method, "--tasks", TASKS, "--out", str(out)])
            runs[method] = out, printed.getvalue()
        return runs[method]
    return run


@pytest.mark.parametrize("method", list(train_math.METHODS))
def test_training_writes_its_run(method, trained):
    out, printed = trained(method)
    assert all(row in printed for row in ("untouched", method, "gsm8k", "facts", "nll", "drift", "Avg1", "Avg1(%)", "Avg2", "GM"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all({"loss", "lr", "grad_norm", "tokens_per_s", "drift"} <= set(line) for line in lines)
    assert [line["drift"] is not None for line in lines] == [False, True] * 3 and lines[-1]["loss"] < lines[0]["loss"]
    summary, config = (json.loads((out / f"{name}.json").read_text()) for name in ("summary", "config"))
    assert config["options"]["rank"] == 8 and config["options"]["lam"] == 1.0 and config["versions"]["torch"] == torch.__version__
    assert summary["seconds"]["train"] > 0 and summary["peak_memory_gb"] > 0 and sorted(p.name for p in out.iterdir()) == ["config.json", "merged", "metrics.jsonl", "summary.json"]
    assert summary["scores"]["tuned"]["nll"] < summary["scores"]["untouched"]["nll"] and summary["scores"]["tuned"]["drift"] > 0


def test_methods_differ_as_they_say(trained):
    """All start at the same function and end at different ones."""
    losses = {m: [json.loads(line)["loss"] for line in (trained(m)[0] / "metrics.jsonl").read_text().splitlines()] for m in train_math.METHODS}
    assert all(line[0] == pytest.approx(losses["lora"][0], rel=1e-4) for line in losses.values())
    assert len({line[-1] for line in losses.values()}) == len(losses)


def test_what_moves_a_can_be_chosen():
    """plain: FoLoRA's start under plain Adam; frozen: A stays."""
    C = torch.diag(torch.linspace(2, 0.5, 12))
    sites = folora.decompose({"q_proj": C}, {"q_proj": C.flip(0, 1)}, rank=4)
    moved = {}
    for update in ("gated", "plain", "frozen"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"q_proj": nn.Linear(12, 10)})
        options = train_math.parse_options(["--lr", "0.1", "--update-a", update, "--rank", "4"])
        optimizer = train_math.add_adapters(options, model, sites)
        A = model["q_proj"].lora_A.detach().clone()
        model["q_proj"](torch.ones(3, 12)).square().sum().backward()
        optimizer.step()
        moved[update] = model["q_proj"].lora_A.detach() - A
    assert moved["plain"].abs().max() == pytest.approx(0.1, rel=1e-3) and not moved["frozen"].any()
    assert 0 < (moved["gated"] - moved["plain"]).abs().max()


def test_eval_reads_a_run(trained):
    out, _ = trained("folora")
    scores = json.loads((out / "summary.json").read_text())["scores"]
    done = script("eval.py", str(out), "tiny", "--tasks", f"nll={ev.TINY / 'test.jsonl'},facts,drift", "--limit", "4")
    assert done.returncode == 0, done.stderr
    row = {line.split()[0]: line.split()[-2:] for line in done.stdout.splitlines() if line.split()[0] in ("nll", "drift")}
    assert float(row["nll"][0]) == pytest.approx(scores["tuned"]["nll"], abs=2e-3) and float(row["nll"][1]) == pytest.approx(scores["untouched"]["nll"], abs=2e-3)
    assert float(row["drift"][0]) == pytest.approx(scores["tuned"]["drift"], abs=1e-4) and float(row["drift"][1]) == 0


@pytest.mark.parametrize("method", ["folora", "lora", "lora-null-v2", "oplora"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(method, trained, tmp_path, monkeypatch):
    whole, _ = trained(method)
    arguments = [*FAST, "--method", method, "--tasks", TASKS, "--out", str(tmp_path / "cut")]
    real, calls = train_math.train_step, []

    def fails_in_step_4(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_math, "train_step", fails_in_step_4)
    with pytest.raises(SystemExit, match=f"interrupted: the same command with --out {tmp_path}/cut goes on"):
        train_math.main(arguments)
    monkeypatch.setattr(train_math, "train_step", real)
    assert len((tmp_path / "cut/metrics.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit, match="unfinished run with --lam 1.0"):
        train_math.main([*arguments, "--lam", "2"])
    with pytest.raises(SystemExit, match="interrupted"):
        ev.resolve_model(str(tmp_path / "cut"))
    train_math.main(arguments)
    one, other = ([{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, tmp_path / "cut"))
    assert one == other
    weights = [hashlib.sha1((run / "merged/model.safetensors").read_bytes()).hexdigest() for run in (whole, tmp_path / "cut")]
    assert weights[0] == weights[1]
    monkeypatch.setattr(ev, "load_model", None)            # asked before the model is loaded
    with pytest.raises(SystemExit, match="holds a finished run"):
        train_math.main(arguments)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny):
    model, tokenizer = ev.load_model("tiny", torch.device("cpu"), torch.float32)
    examples = ev.encode_all(tokenizer, ev.to_pairs(ev.read_rows(str(ev.TINY / "train.jsonl"), limit=6), "x"), 256)
    seen = []
    for micro in (6, 2):
        model.zero_grad()
        spy = SimpleNamespace(param_groups=[{"params": list(model.parameters())}], step=lambda: seen.append([p.grad.clone() for p in model.parameters()]), zero_grad=lambda: None)
        loss, norm, tokens = train_math.train_step(train_math.SummedNLL(model), spy, examples, micro)
        assert tokens == sum(len(e["ids"]) for e in examples)
    for a, b in zip(*seen):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_runs_the_layers_again_for_the_same_gradient():
    model, tokenizer = ev.load_model("tiny", torch.device("cpu"), torch.float32)
    example = ev.encode_all(tokenizer, ev.to_pairs(ev.read_rows(str(ev.TINY / "train.jsonl"), limit=1), "x"), 256)
    weight, calls, seen = model.requires_grad_(False).model.layers[0].mlp.down_proj.weight.requires_grad_(), [], []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (1, 0):
        train_math.recompute(model, on)
        assert not any(m.training for m in model.modules() if isinstance(m, (nn.Linear, nn.Dropout)))
        seen.append(torch.autograd.grad(train_math.SummedNLL(model)(example), weight)[0])
    torch.testing.assert_close(*seen)
    assert len(calls) == 3                                 # twice with, once without


def torchrun(*command):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
                          capture_output=True, text=True, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_do_what_one_does(tmp_path, monkeypatch):
    """torchrun, gloo, float32, the same global batch: the same losses, scores and merged weights. From one prepared.pt, because covariances that
    differ in their last digit, as two sums of the same tokens do, have other null spaces."""
    facts = [{**row, "answer": row["answer"] if i % 3 else "x"} for i, row in enumerate(ev.read_rows(str(ev.TINY / "facts.jsonl"), limit=4))]
    (tmp_path / "half.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    arguments = [*FAST, "--tasks", f"facts={tmp_path / 'half.jsonl'},nll={ev.TINY / 'test.jsonl'},drift", "--calibration-samples", "6"]
    real = train_math.train
    monkeypatch.setattr(train_math, "train", lambda *args: shutil.copytree(tmp_path / "one", tmp_path / "two") and real(*args))
    train_math.main([*arguments, "--out", str(tmp_path / "one")])
    done = torchrun("train_math.py", *arguments, "--out", tmp_path / "two")
    assert done.stdout.count("Avg1(%)") == 1 and "eigenproblems" not in done.stderr
    keys = ("step", "loss", "grad_norm", "lr", "drift")
    one, two = ([[line[k] or 0 for k in keys] for line in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())] for run in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    scores = [json.loads((tmp_path / run / "summary.json").read_text())["scores"]["tuned"] for run in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-6)
    one, two = (ev.load_model(str(tmp_path / run), torch.device("cpu"), torch.float32)[0].state_dict() for run in ("one", "two"))
    assert max(((one[name] - two[name]).norm() / one[name].norm()).item() for name in one) < 1e-5


def test_two_processes_share_covariances_bases_and_rows(tmp_path):
    """Each sees its share of the text, both have the mean over the whole; each solves its share of the problems, both have all bases; and where
    FSDP2 shards A, SAdam moves the shards as it moves the whole."""
    (tmp_path / "work.py").write_text("""if True:
        import copy, sys, torch, torch.distributed.nn, folora
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from test_folora import Block, BLOCK_TARGETS
        torch.manual_seed(0)
        model, texts = Block(), [{"x": torch.randn(n, 8)} for n in (90, 70, 40)]
        if len(sys.argv) > 2:
            torch.distributed.init_process_group("gloo")
        process, world = folora.processes()
        C_pre, C_task = (folora.collect_covariances(model, t[process::world], BLOCK_TARGETS) for t in (texts, [{"x": t["x"] * torch.arange(1, 9)} for t in texts]))
        torch.save((C_pre, C_task, folora.decompose(dict(C_pre), dict(C_task), 2), world), f"{sys.argv[1]}-{process}.pt")
        if world == 1:
            sys.exit()
        whole, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), texts[0]["x"]
        spectral = folora.prepare(whole, [{"input": x}], [{"input": x * torch.arange(1, 9)}], lr=1e-2, rank=4, target_modules=("0", "2"))
        sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (2,)))
        groups = [{**{k: group[k] for k in ("basis", "gate")}, "params": [sharded[i].lora_A]} for i, group in zip((0, 2), spectral.param_groups)]
        for net, optimizer in ((whole, spectral), (sharded, folora.SAdam(groups + [{"params": [sharded[i].lora_B for i in (0, 2)]}], lr=1e-2))):
            for _ in range(3):
                net(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for a, b in zip(whole.parameters(), sharded.parameters()):
            torch.testing.assert_close(a, b.full_tensor())
            assert len(b.to_local()) * 2 == len(a)
        torch.distributed.destroy_process_group()
    """)
    subprocess.run([sys.executable, str(tmp_path / "work.py"), str(tmp_path / "one")], check=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    torchrun(tmp_path / "work.py", tmp_path / "two", "distributed")
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    assert (one[3], two[0][3]) == (1, 2)
    for a, b in zip(one[2], two[0][2], strict=True):
        assert a["modules"] == b["modules"]
        torch.testing.assert_close(a["gamma"], b["gamma"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a["V"].abs(), b["V"].abs(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a["A0"].abs(), b["A0"].abs(), rtol=1e-3, atol=1e-3)
    for a, b in zip(two[0][2], two[1][2]):
        assert all(torch.equal(a[key], b[key]) for key in ("A0", "gamma", "V"))
    for i in (0, 1):
        for name in one[i]:
            torch.testing.assert_close(one[i][name], two[0][i][name], rtol=1e-5, atol=1e-5)
            assert torch.equal(two[0][i][name], two[1][i][name])


def test_schedule_and_order_of_the_data():
    rates = [train_math.schedule(s, 100, 0.03) for s in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[3] == 1 and max(rates) == 1 and 0 < rates[-1] < 1e-3
    order = train_math.data_order(10, 4, 2, None, 0)
    assert [len(b) for b in order] == [4] * 5 and sorted(sum(order, []))[::2] == list(range(10)) and order != train_math.data_order(10, 4, 2, None, 1)
    assert len(train_math.data_order(10, 4, 1, 7, 0)) == 7


@pytest.mark.parametrize("arguments, message", [
    (["--model", "nowhere"], "nowhere: no such directory, and no short name"),
    (["--model", "runs/nowhere"], "runs/nowhere: no such directory"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--rank", "193"], "rank must be between 1 and the input width of model.layers.0.self_attn.q_proj, 192, not 193"),
    (["--device", "cuda"], "no CUDA GPU"),
    (["--device", "banana"], "--device banana: it is cpu, cuda"),
    (["--tasks", "math"], "pip install lm-eval"),
    (["--max-steps", "0"], "--max-steps must be at least 1, not 0"),
    (["--warmup", "2"], "--warmup is a share of the steps"),
    (["--seed", "1000"], "--seed 1000 is reserved for the held-out text"),
    (["--tasks", "facts,trivia"], "unknown task trivia"),
    (["--lam", "0"], "lam must be > 0"),
    (["--alpha", "0"], "--alpha must be above 0, not 0.0"),
    (["--lr", "-1"], "--lr must be at least 0, not -1.0"),
    (["--update-a", "gated", "--method", "lora"], "--preset tuned are FoLoRA's, not --method lora's"),
    (["--preset", "tuned", "--method", "lora"], "--preset tuned are FoLoRA's, not --method lora's"),
    (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--max-length", "20"], "raise it"),
])
def test_bad_input_gets_one_line_before_any_work(arguments, message, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available() or "math" in arguments and importlib.util.find_spec("lm_eval"):
        pytest.skip("it is there")
    with pytest.raises(SystemExit) as stopped:
        train_math.main([*FAST, "--out", str(tmp_path / "run"), *arguments])
    text = str(stopped.value.code) if isinstance(stopped.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert message in text and "\n" not in text
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(SystemExit, match="holds something else"):
        train_math.main([*FAST, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="cannot be made: Not a directory"):
        train_math.main([*FAST, "--out", str(tmp_path / "config.json" / "run")])


def test_a_bad_line_of_data_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q"}\n')
    with pytest.raises(SystemExit, match="a.jsonl, line 2: no field called answer"):
        train_math.main([*FAST, "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "run")])
    (tmp_path / "list.jsonl").write_text('{"question": "q", "answer": "a"}\n[1, 2]\n')
    with pytest.raises(SystemExit, match="list.jsonl, line 2: not an object with fields"):
        train_math.main([*FAST, "--data", str(tmp_path / "list.jsonl"), "--out", str(tmp_path / "run")])
    for row, message in (('{"a": 1}', "line 1: no field called text or question"), ('{"text": 5}', "every row needs a text, not a int")):
        (tmp_path / "text.jsonl").write_text(row + "\n")
        with pytest.raises(SystemExit, match=message):
            train_math.main([*FAST, "--calibration", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()
    (tmp_path / "bare.jsonl").write_text('{"question": "q", "answer": "no number"}\n')
    with pytest.raises(SystemExit, match='bare.jsonl, line 1: its answer has no number after ####'):
        train_math.main([*FAST, "--tasks", f"gsm8k={tmp_path / 'bare.jsonl'}", "--out", str(tmp_path / "run")])
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question"\n')
    with pytest.raises(SystemExit, match="b.jsonl, line 2: not JSON"):
        train_math.main([*FAST, "--data", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "run")])


def test_out_of_memory_and_disk_say_what_to_lower(tmp_path, monkeypatch):
    for error, message in ((torch.OutOfMemoryError("CUDA out of memory"), "lower --micro-batch-size"), (OSError(28, "No space left on device"), "disk of")):
        def fail(options, error=error):
            raise error
        monkeypatch.setattr(train_math, "run", fail)
        with pytest.raises(SystemExit, match=message):
            train_math.main([])


def test_short_names_and_defaults():
    assert ev.resolve_model("Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B" and ev.resolve_model("Llama-2-7b") == "meta-llama/Llama-2-7b-hf"
    assert ev.resolve_model("SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M" and ev.resolve_model("owner/name") == "owner/name"
    paper = train_math.parse_options(["--model", "Qwen2.5-1.5B"])
    assert (paper.rank, paper.lam, paper.s_min, paper.batch_size, paper.max_length, paper.calibration_samples, paper.task_samples, paper.warmup) == (128, 1.0, 0.3, 128, 512, 2000, 256, 0.03)
    tuned = train_math.parse_options(["--preset", "tuned", "--lam", "2"])
    assert tuned.s_min == 0 and tuned.lam == 2 and tuned.zero_start == 1 and tuned.rank == 32
    assert train_math.parse_options(["--model", str(ev.TINY)]).rank == 32 and "facts" in ev.default_tasks(str(ev.TINY))


def test_help_says_whose_each_default_is():
    help_text = " ".join(script("train_math.py", "--help").stdout.split())
    for name, (default, _, source, _) in train_math.OPTIONS.items():
        assert f"--{name.replace('_', '-')}" in help_text
    assert "[paper: 128; tiny: 32]" in help_text


# ---- the measurements -----------------------------------------------------------------------------------------------

@pytest.fixture
def experiments(tmp_path, monkeypatch):
    from assets import experiments
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(experiments, "CACHE", tmp_path)
    return experiments


@pytest.mark.parametrize("method", ["folora", "lora"])
def test_an_experiments_run_is_the_command_lines(method, trained, experiments):
    suite = tuple([*FAST, "--tasks", TASKS])
    experiments.prepare(suite, [], 0)
    result = experiments.run(suite, ["--method", method], None, 0)
    scores = json.loads((trained(method)[0] / "summary.json").read_text())["scores"]["tuned"]
    assert result["scores"] == pytest.approx({name: scores[name] for name in scores if name != "Avg1(%)"}, abs=1e-5)


def test_the_gate_after_adam_is_sadam_where_the_basis_is_the_identity(experiments, spectral):
    """With V = I the two orders are the same thing, in bfloat16 to its rounding; with another V they are not."""
    for V, same in ((torch.eye(6), True), (torch.eye(6).bfloat16(), True), (spectral[2], False)):
        group = {"basis": V, "gate": torch.linspace(1, 0.1, 6)}
        a, b = (nn.Parameter(torch.ones(2, 6)) for _ in range(2))
        first, second = (folora.SAdam([{"params": [p], **group}], lr=0.1) for p in (a, b))
        experiments.gate_after(second, None, None)
        for step in range(3):
            torch.manual_seed(step)
            a.grad = torch.randn(2, 6)
            b.grad = a.grad.clone()
            first.step()
            second.step()
        assert torch.allclose(a, b, atol=2e-3) == same


def test_the_gate_on_b_knows_its_own_covariances(experiments):
    torch.manual_seed(0)
    X, Y = torch.randn(50, 8), torch.randn(50, 8) * torch.linspace(0.1, 3, 8)
    model = nn.ModuleDict({"f": nn.Linear(8, 5)})
    sites = folora.decompose({"f": X.mT @ X / 50}, {"f": Y.mT @ Y / 50}, rank=3)
    optimizer = folora.attach(model, sites, lr=0.1)
    experiments.gate_on_b(optimizer, model, sites)
    A0, V = sites[0]["A0"].double(), optimizer.param_groups[-1]["basis"].double()
    unit = lambda C: C / C.diagonal().mean()
    H, C_task = unit(X.mT @ X).double() + 0.01 * torch.eye(8), unit(Y.mT @ Y).double()
    gamma = torch.from_numpy(scipy.linalg.eigh((A0 @ C_task @ A0.mT).numpy(), (A0 @ H @ A0.mT).numpy())[0]).flip(0)
    Hz = A0 @ H @ A0.mT
    torch.testing.assert_close(V.mT @ (Hz / Hz.diagonal().mean()) @ V, torch.eye(3).double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(optimizer.param_groups[-1]["gate"].double(), (gamma / (gamma + 1)).clamp(min=0.3), rtol=1e-3, atol=1e-3)
    assert optimizer.param_groups[-1]["params"] == [model["f"].lora_B]


def test_a_front_is_read_between_its_points(experiments):
    line = [(10.0, 1.0), (20.0, 3.0), (15.0, 9.0)]
    assert experiments.at(line, 15) == 2 and experiments.at(line, 20) == 3 and experiments.at(line, 25) is None


def test_more_seeds_do_not_change_which_setting_gets_them(experiments):
    runs = [{"flags": flags, "change": None, "seed": 0, "scores": {"nll": 1 - 0.1 * i}} for label in experiments.FRONTS for i, (_, flags) in enumerate(experiments.front(label, "tiny"))]
    first = experiments.best({"runs": runs}, "tiny")
    swept = [experiments.front(label, "tiny") for label in experiments.FRONTS if experiments.front(label, "tiny")]
    assert [flags for flags, _, _ in first[:len(swept)]] == [line[-1][1] for line in swept]
    later = [{"flags": flags, "change": None, "seed": seed, "scores": {"nll": 9.0}} for flags, _, seed in first]             # worse than all others
    assert experiments.best({"runs": runs + later}, "tiny") == first


def test_what_repeats_the_best_settings_chose_none_of_them(experiments, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "FRESH_ROWS", tmp_path / "fresh.jsonl")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"question": str(n), "answer": "1"}) + "\n" for n in range(300)))
    options = {"suite": "fresh", "model": "tiny", "data": "x.jsonl", "test": str(tmp_path / "test.jsonl"), "nq": None, "webqs": "w.jsonl"}
    suite = experiments.suite_of(SimpleNamespace(**options))
    assert suite[-1] == f"nll={tmp_path / 'fresh.jsonl'},drift,nq_open,webqs=w.jsonl"
    rows = [int(json.loads(line)["question"]) for line in (tmp_path / "fresh.jsonl").read_text().splitlines()]
    chose = train_math.parse_options(experiments.SUITE["smollm2"].split()).eval_samples
    assert min(rows) == chose and len(rows) == 128 and not set(experiments.FRESH_SEEDS) & set(experiments.SEEDS)
    assert len(experiments.fresh()) == len(experiments.FRESH_SEEDS) * len(experiments.FRESH)


@pytest.mark.parametrize("row", [{"question": "who", "answer": ["Tom", "T"]}, {"question": "who", "answers": ["Tom"]}])
def test_the_nll_of_an_answer_is_of_the_answer_alone(experiments, tiny, row):
    example = experiments.with_answer(tiny[1], "Q: {}?\nA:", row)
    assert tiny[1].decode([i for i, label in zip(example["ids"], example["labels"]) if label != -100]) == " Tom"
    assert tiny[1].decode(example["ids"], skip_special_tokens=True) == "Q: who?\nA: Tom"


def test_the_report_draws_what_has_been_measured(experiments, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib for the figures")
    with pytest.raises(SystemExit, match="no measurement"):
        experiments.report()
    score = {"gsm8k": 10.0, "facts": 50.0, "sort": 50.0, "reverse": 50.0, "sums": 50.0, "drift": 0.1, "Avg1": 50.0, "nll": 2.0}
    runs = [{"flags": flags, "change": None, "seed": seed, "scores": {**score, "gsm8k": 10.0 * i + seed, "nll": 1 - 0.1 * i, "drift": 0.1 * (i + 1)}}
            for label in ("LoRA", "FoLoRA, tuned") for i, (_, flags) in enumerate(experiments.front(label, "tiny")) for seed in (0, 2)]
    (tmp_path / "tiny.json").write_text(json.dumps({"untouched": score, "runs": runs}))
    experiments.report()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| LoRA | 8e-3 | 0.7000 ± 0.0000 | 0.4000 ± 0.0000 | 50.0 ± 0.0 | 31.0 ± 1.4 | 0.4000 | 50.0 |") for line in lines) and (tmp_path / "tradeoff.png").exists()


# ---- the README -----------------------------------------------------------------------------------------------------

def test_memory_is_counted_to_the_bases():
    """FoLoRA's step holds LoRA's and the bases, in bfloat16."""
    from assets import bench
    shape = bench.SMALL
    bases = shape["num_hidden_layers"] * (2 * shape["hidden_size"] ** 2 + (shape["num_attention_heads"] * shape["head_dim"]) ** 2 + shape["intermediate_size"] ** 2)
    more = bench.count_step(shape, "folora", 8, 8, 64, 0) - bench.count_step(shape, "lora", 8, 8, 64, 0)
    assert 1e9 * more == pytest.approx(2 * bases, rel=0.05)
    assert bench.count_step(shape, "offload", 8, 8, 64, 0) == pytest.approx(bench.count_step(shape, "lora", 8, 8, 64, 0), rel=1e-3)


def test_the_readmes_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_readmes_commands_are_options_that_exist():
    commands = re.findall(r"^python (train_math|eval)\.py(.*?)(?:#.*)?$", (HERE / "README.md").read_text(), re.M)
    assert commands
    flags = {"--" + name.replace("_", "-") for name in train_math.OPTIONS}
    for name, rest in commands:
        if name == "train_math":
            assert set(re.findall(r"--[a-z-]+", rest)) <= flags
            train_math.parse_options([word for word in rest.replace("\\", "").split()])
