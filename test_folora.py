"""Tests of FoLoRA, on a CPU: python -m pytest -q test_folora.py

Equations are held against scipy, numpy, torch.optim.Adam, PEFT, or a literal slow version here.
"""
import ast
import contextlib
import copy
import functools
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
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import accelerate
import numpy
import peft
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
BUDGETS = [("folora.py", 605, 372), ("train_math.py", 470, 354), ("eval.py", 570, 381),
           ("assets/experiments.py", 482, 350), ("test_folora.py", 1600, 1305)]


def covariance(d, tokens, condition=1.0, seed=0):
    """X Xᵀ / T in float64, with X's rows scaled so that its spectrum spans about `condition`."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    scale = torch.logspace(0, -0.5 * math.log10(condition), d, dtype=torch.float64)
    X = rotation @ (scale[:, None] * torch.randn(d, tokens, generator=g, dtype=torch.float64))
    return X @ X.mT / tokens


def energy(rows, C):
    return torch.trace(rows.double() @ C @ rows.double().mT).item()


def descend(optimizer, loss_of, batches):
    """The loss of each batch before the step on it."""
    losses = []
    for batch in batches:
        losses.append(loss_of(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


def mlp():
    layers = dict(first=nn.Linear(16, 32), tanh=nn.Tanh(), second=nn.Linear(32, 3))
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """q, k and v read one input, and up flat tokens, as an expert does. k_reads: "other" for an
    input of its own, "nothing" to leave it out."""

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


@pytest.fixture(scope="module")
def tiny():
    return ev.load_model("tiny", CPU, torch.float32)


# ---- 3.1: targets and covariances ----------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [BLOCK_TARGETS, ("q_proj",)])
def test_covariances_are_means_of_x_xT_over_real_tokens(names, dtype):
    """In float32 whatever the model's dtype. The same tensor counts again in a new batch."""
    torch.manual_seed(0)
    model, few = Block().to(dtype), torch.randn(2, 4, 8, dtype=dtype)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 2 + [1] * 3])
    padded = {"x": torch.randn(3, 5, 8, dtype=dtype), "attention_mask": mask}
    batches, tokens = [padded, {"x": few}, {"x": few}], {name: [] for name in BLOCK_TARGETS}
    ours = folora.collect_covariances(model, batches, names)
    for batch in batches:
        model(**batch)
        real = batch.get("attention_mask", torch.ones(2, 4)).bool().flatten()
        for name, x in model.inputs.items():
            tokens[name] += x.detach().double().flatten(0, -2)[real]
    assert tuple(ours) == names
    for name, C in ours.items():
        literal = sum(torch.outer(x, x) for x in tokens[name]) / len(tokens[name])
        close(C, literal.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first, then, covariances", [
    ("x", "x", 4), ("other", "other", 5), ("x", "other", 0), ("other", "x", 0),
    ("nothing", "nothing", 0)])
def test_layers_share_an_input_and_its_covariance_always_or_never(first, then, covariances):
    batches = [{"x": torch.randn(2, 3, 8), "k_reads": what} for what in (first, then)]
    with contextlib.nullcontext() if covariances else pytest.raises(
            ValueError, match="shares its input|no token reached k_proj"):
        C = folora.collect_covariances(Block(), batches, BLOCK_TARGETS)
        assert C["q_proj"] is C["v_proj"] and (C["q_proj"] is C["k_proj"]) == (first == "x")
        assert len({id(c) for c in C.values()}) == covariances


def test_a_target_is_a_whole_name_or_its_end_or_every_layer_but_the_head(tiny):
    model = nn.Sequential(Block())
    for targets in ("q_proj", ["0.q_proj"]):
        assert [*folora.find_targets(model, targets)] == ["0.q_proj"]
    assert len(folora.find_targets(model, "all-linear")) == len(BLOCK_TARGETS)
    assert [*folora.find_targets(tiny[0], "all-linear")] == [*folora.find_targets(tiny[0])]


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
    """With k = 6, 38 random columns are iterated, fewer than d = 100."""
    *pair, tau = CASES[case]
    for C_task, C_pre in (pair, pair[::-1]):
        C, C_pre = C_task.float(), C_pre.float()
        ours, again = (folora.generalized_eigenbasis(C, C_pre, tau, k) for _ in range(2))
        assert all(map(torch.equal, ours, again)) and ours[1].dtype == torch.float32
        gamma, V, C, H = (t.double() for t in (*ours, C, C_pre + tau * torch.eye(100)))
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
    M, not_finite = covariance(5, 20).float(), (torch.full((5,), math.nan), torch.eye(5))
    answers = [torch.linalg.LinAlgError("no convergence"), not_finite, DEFAULT]
    eigh = Mock(wraps=torch.linalg.eigh, side_effect=answers)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, vectors = folora._eigh(M)
    tried = [call.args[0].dtype for call in eigh.call_args_list]
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
    optimizer = folora.SAdam([group], 0.02, betas=(0.8, 0.95), eps=0.03)
    moved = take_steps(optimizer, p, gradients).double() - A
    literal = literal_sadam(A, gradients, V, gate, 0.01, 0.8, 0.95, 0.03) - A
    for metric in (H, torch.eye(6).double()):
        assert energy(moved - literal, metric) < error * energy(literal, metric)


@pytest.mark.parametrize("group", [{}, {"basis": torch.eye(6), "gate": torch.ones(6)}])
def test_sadam_is_adam_without_a_basis_and_with_the_trivial_one(group):
    """Also under a schedule and beside a parameter that has no gradient."""
    torch.manual_seed(0)
    p, unused = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.ones(3, 6))
    q, gradients = nn.Parameter(p.detach().clone()), torch.randn(5, 3, 6)
    sadam, adam = folora.SAdam([{"params": [unused, p], **group}], 0.1), torch.optim.Adam([q], 0.1)
    for optimizer, one in ((sadam, p), (adam, q)):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for G in gradients:
            take_steps(optimizer, one, [G])
            schedule.step()
    close(p, q, rtol=1e-6, atol=1e-7)
    assert torch.equal(unused, torch.ones(3, 6)) and unused not in sadam.state
    assert sadam.step(lambda: p.sum().backward() or 5.0) == 5.0      # a closure and its loss


def test_sadam_goes_on_from_its_state_dict_and_refuses_one_that_does_not_fit(spectral, tmp_path):
    """Through accelerate, as under a Trainer. The moments belong to the saved basis."""
    A, gradients, V, gate, _ = spectral
    straight, p = nn.Parameter(A.clone()), nn.Parameter(A.clone())
    wrap = accelerate.Accelerator(cpu=True).prepare
    make = lambda p, V, lr: wrap(folora.SAdam([{"params": [p], "basis": V, "gate": gate}], lr))
    take_steps(make(straight, V, 0.01), straight, gradients)
    first, second = make(p, V, 0.01), make(p, -2 * V, 0.5)
    take_steps(first, p, gradients[:2])
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state"))
    for unfit in (dict(basis=None, gate=None), dict(basis=torch.ones(6, 2))):
        state = second.state_dict()
        state["param_groups"][0].update(unfit)
        with pytest.raises(ValueError, match="bases of other shapes"):
            second.load_state_dict(state)
    take_steps(second, p, gradients[2:])
    assert torch.equal(p, straight)
    moments = second.state_dict()["state"][0]
    assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == (3, V.shape[1])


# ---- B.3: the start ------------------------------------------------------------------------------

def test_null_space_holds_the_least_energy():
    """At any scale, and where one direction, as a first token makes, has nearly all."""
    C = covariance(60, 400, 1e3)
    for one in (C, C + 200, 1e-9 * C):
        rows = folora.null_space(one.float(), 7)
        close(rows @ rows.mT, torch.eye(7), rtol=0, atol=1e-5)
        least = scipy.linalg.eigvalsh(one.float().double().numpy())[:7].sum()
        assert energy(rows, one.float().double()) <= 1.02 * least


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (32.0, 2.0)])
def test_an_adapter_starts_as_its_layer(alpha, kappa):
    """From LoRA's start, where B = 0; from B.3's, with B0 = κ⁻¹ W0 A0ᵀ; from given ones."""
    torch.manual_seed(0)
    base, x = nn.Linear(64, 48), torch.randn(100, 64)
    W0, before = base.weight.detach().clone(), base(x).detach()
    plain = folora.LoRALinear(copy.deepcopy(base), 16, alpha)
    assert torch.equal(plain(x), before) and torch.equal(plain.weight, W0)
    assert plain.lora_A.shape == (16, 64) and 0.9 / 8 < plain.lora_A.abs().max() <= 1 / 8
    A0 = folora.null_space(covariance(64, 300), 16).float()
    for B0 in (None, torch.randn(48, 16)):
        layer = folora.LoRALinear(copy.deepcopy(base), 16, alpha, A0, B0)
        assert layer.scaling == kappa and torch.equal(layer.lora_A, A0)
        close(layer.lora_B.detach(), W0 @ A0.mT / kappa if B0 is None else B0)
        close(layer.weight, W0 - kappa * layer.lora_B @ A0, rtol=1e-5, atol=1e-5)
        close(layer(x), before, rtol=1e-4, atol=1e-4)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


# ---- the recipe ----------------------------------------------------------------------------------

def test_prepare_is_its_parts_literally():
    """One layer by hand in float64, every option at a value of its own. The pretraining inputs are
    in 10 of 16 dimensions, the task's in 4 of those and 4 others."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    pre, task = torch.randn(400, 10) @ rotation[:10], torch.randn(300, 8) @ rotation[6:14]
    model, k = mlp(), 5
    W0 = model.first.weight.detach().clone().double()
    a, b = folora.prepare(model, [{"input": pre}], [{"input": 100 * task}], 0.1, rank=3, alpha=6,
                          tau=0.05, lam=2.0, s_min=0.6, target_modules="first", zero_start=False,
                          basis_rank=k).param_groups
    unit = lambda X: X.mT.double() @ X.double() / (X.double() ** 2).sum() * X.shape[1]
    C_pre, C_task = unit(pre), unit(task)    # the task's factor of 100 divides out
    gamma, V = scipy.linalg.eigh(C_task.numpy(), C_pre.numpy() + 0.05 * numpy.eye(16))
    gamma, V = torch.tensor(gamma).flip(0)[:k], torch.tensor(V).flip(1)[:, :k]
    assert (a["lr"], b["lr"], b["basis"], a["scale"], b["scale"]) == (0.1, 0.1, None, 1.0, 1.0)
    assert (a["params"], b["params"]) == ([model.first.lora_A], [model.first.lora_B])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["first.lora_A", "first.lora_B"]
    gate = torch.clamp(gamma / (gamma + 2.0), min=0.6)
    assert gate.min() == 0.6 < gate.max()
    close(a["gate"].double(), gate, rtol=1e-3, atol=1e-4)
    ours = (a["basis"] * a["gate"]).double() @ a["basis"].mT.double()
    close(ours, V * gate @ V.mT, rtol=1e-2, atol=1e-2)
    A0 = model.first.lora_A.detach().double()
    assert A0.shape == (3, 16) and energy(A0, C_pre) < 1e-5          # 16 - 10 null directions
    close(2.0 * model.first.lora_B.detach().double(), W0 @ A0.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("basis_rank", [None, 3, 17])
def test_each_distinct_input_is_solved_once(basis_rank):
    model, bar = Block(), []
    C = folora.collect_covariances(model, [{"x": torch.randn(4, 20, 8)}], BLOCK_TARGETS)
    bases = folora.decompose(C, C, 2, 0.01, basis_rank, bar.append)
    assert bar == [1] * 4 and [basis["modules"] for basis in bases] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["up_proj"], ["down_proj"]]
    for basis, d in zip(bases, (8, 8, 8, 16)):
        k = min(basis_rank or d, d)
        assert [basis[name].shape for name in ("A0", "V", "gamma")] == [(2, d), (d, k), (k,)]
    group = folora.attach(model, bases, 0.1).param_groups[0]
    for p, layer in zip(group["params"], (model.q_proj, model.k_proj, model.v_proj), strict=True):
        assert p is layer.lora_A


@pytest.mark.parametrize("dtype, wanted", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_adapters_are_float32_a_basis_may_be_bfloat16_and_merge_rounds_once(dtype, wanted):
    model, C = nn.ModuleDict({"f": nn.Linear(16, 12).to(dtype)}), covariance(16, 40).float()
    optimizer = folora.attach(model, folora.decompose({"f": C}, {"f": C}, 4), lr=0.1, alpha=8)
    layer, before = model["f"], model["f"].weight.double()
    assert optimizer.param_groups[0]["basis"].dtype == wanted
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.ones(5, 16, dtype=dtype)).dtype == dtype
    W = before + 2 * nn.init.normal_(layer.lora_B).double() @ layer.lora_A.double()
    merged = folora.merge(model)["f"]
    assert type(merged) is nn.Linear and (merged.weight == W.to(dtype)).float().mean() > 0.98


def test_the_file_stands_alone():
    """It needs torch and the standard library, and save_adapter alone needs safetensors."""
    tree = ast.parse((HERE / "folora.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", node.names[0].name).split(".")[0] for node in imports}
    assert names <= {"torch", "safetensors", *sys.stdlib_module_names}
    assert not any("safetensors" in ast.unparse(node) for node in tree.body
                   if getattr(node, "name", "") != "save_adapter")


# ---- B.4: calibration text -----------------------------------------------------------------------

@pytest.mark.parametrize("distinct, n, equal, rejected", [
    (99, 31, 0, True), (99, 32, 0, False), (40, 40, 20, True), (40, 40, 19, False),
    (15, 127, 0, False), (15, 128, 0, True), (16, 128, 0, False),
    (23, 200, 0, True), (24, 200, 0, False),                         # 24 of 200 are 0.12
    (60, 255, 0, False), (63, 256, 0, True), (64, 256, 0, False),
    (63, 259, 0, True), (64, 259, 0, False)])                        # 64 of 256 4-grams are 0.25
def test_screen_rejects_degenerate_text_and_nothing_just_short_of_it(distinct, n, equal, rejected):
    """n tokens that go round so many distinct ones, and then so many equal ones."""
    assert folora.is_degenerate([i % distinct for i in range(n)] + [777] * equal) == rejected


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


def test_sampling_replaces_rejects_and_duplicates_until_there_are_too_many():
    """It gives up after 64 rejects, and ten more for each accepted text."""
    good = lambda k: list(range(k, k + 50))
    queue = [good(10), good(10), [5] * 50, good(70), good(3000)[:20], good(130) + [2, 7, 7],
             good(190) + [8, 9], good(250), good(310), good(370)]
    model = FakeGenerator(lambda: queue.pop(0) if queue else [5] * 50, eos_token_id=[2, 8])
    texts = sample(model, 4, 32, 64)                                 # each ends before its EOS
    assert sorted(texts) == [[1] + good(k) for k in (10, 70, 130, 190)]
    assert model.calls[0]["eos_token_id"] == [2, 8] == model.generation_config.eos_token_id
    queue[:] = good(10), good(70)
    with pytest.raises(RuntimeError, match="85 texts rejected, 2 accepted"):
        sample(model, 100)
    assert model.training


@pytest.mark.parametrize("own, configured, wanted", [(5, 6, 5), (None, 6, 6), (None, None, 2)])
def test_a_text_starts_with_bos_or_else_the_configurations_or_else_eos(own, configured, wanted):
    model = FakeGenerator(bos_token_id=configured)
    assert {text[0] for text in sample(model, 3, 1, 1, bos=own)} == {wanted}


def test_sampling_from_a_real_model_is_plain_whatever_it_is_configured_for(tiny):
    (model, tokenizer), texts = copy.deepcopy(tiny), []
    config = dict(repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.9, num_beams=2)
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        torch.rand(len(texts))                                       # it has a seed of its own,
        state = torch.random.get_rng_state()
        texts.append(folora.sample_calibration(model, tokenizer, 6, 60, 70, seed=seed))
        assert torch.equal(state, torch.random.get_rng_state())      # and leaves the global one
        vars(model.generation_config).update(config)
    assert config.items() <= vars(model.generation_config).items()
    assert not all(map(torch.equal, texts[0], texts.pop()))
    for text, again in zip(*texts, strict=True):
        assert text[0] == tokenizer.bos_token_id and 61 <= len(text) <= 71
        assert tokenizer.eos_token_id not in text and torch.equal(text, again)


# ---- other people's models: PEFT, Trainer, quantised bases ---------------------------------------

SOME = ("q_proj", "v_proj", "down_proj")
SAME = dict(rtol=1e-5, atol=1e-5)


def word_problems(tokenizer, count):
    rows = ev.read_rows(str(ev.TINY / "train.jsonl"), limit=count)
    return ev.encode_all(tokenizer, ev.to_pairs(rows, "train"), 256)


def losses(model, optimizer, batches):
    return descend(optimizer, lambda batch: model(**batch).loss, batches)


def prepare_on(model, inputs, **how):
    half = len(inputs) // 2
    return folora.prepare(model, inputs[:half], inputs[half:], 3e-3, **dict(basis_rank=16) | how)


def wrapped(model, **config):
    config = {"r": 8, "lora_alpha": 16, "target_modules": list(SOME), **config}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))


@pytest.fixture(scope="module")
def trajectory(tiny):
    """(model, batches for training and for covariances, LoRALinear's losses)."""
    model, tokenizer = tiny
    examples, ours = word_problems(tokenizer, 16), copy.deepcopy(model)
    batches = [ev.collate(examples[i:i + 4], CPU) for i in range(0, 16, 4)]
    inputs = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches]
    optimizer = prepare_on(ours, inputs, rank=8, alpha=16, target_modules=SOME)
    return model, batches, inputs, losses(ours, optimizer, batches)


CONFIGS = {        # of PEFT, and whether the losses are LoRALinear's
    "plain": ({}, True), "rsLoRA": (dict(use_rslora=True, lora_alpha=2 * 8 ** 0.5), True),
    "gaussian": (dict(init_lora_weights="gaussian"), True),
    "dropout": (dict(lora_dropout=0.5), True),
    "rank_pattern": (dict(rank_pattern={"q_proj": 4, "down_proj": 200}), False),
    "DoRA": (dict(use_dora=True), False), "lora_bias": (dict(lora_bias=True), False),
    "modules_to_save": (dict(modules_to_save=["lm_head"]), False)}


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_adapters_are_trained_as_ours(name, trajectory):
    model, batches, inputs, expected = trajectory
    config, same = CONFIGS[name]
    theirs = wrapped(model, **config)
    before = theirs(**batches[0]).loss
    for p in theirs.parameters() if name == "gaussian" else ():          # prepare makes it float32
        p.data = p.data.bfloat16() if p.requires_grad else p.data
    optimizer = prepare_on(theirs, inputs)
    close(theirs.eval()(**batches[0]).loss, before, **SAME)                # the start is the base
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trainable} == {id(p) for p in grouped}
    found = losses(theirs, optimizer, batches)
    assert theirs(**batches[0]).loss < before
    if same:
        close(found, expected, **SAME)
    elif name != "rank_pattern":                                           # the rest is trained too
        assert optimizer.param_groups[-1]["scale"] == 0.1


@pytest.mark.parametrize("config", [
    dict(init_lora_weights="pissa"), dict(init_lora_weights=False), dict(inference_mode=True),
    dict(target_modules=["embed_tokens"]), None,
    dict(target_modules=[], target_parameters=["q_proj.weight"])])
def test_adapters_that_cannot_start_are_refused(config, tiny):
    if config is None:
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        theirs = peft.get_peft_model(copy.deepcopy(tiny[0]), prompt)
    else:
        theirs = wrapped(tiny[0], **config)
    with pytest.raises(ValueError, match="PEFT must have wrapped linear layers"):
        folora.find_targets(theirs)


def test_what_peft_cannot_do_is_refused(tiny):
    theirs = wrapped(tiny[0], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="zero_start=True: the paper's start"):
        folora.prepare(theirs, UNREAD, UNREAD, lr=1e-2, zero_start=False)
    with pytest.raises(ValueError, match="use its merge_and_unload"):
        folora.merge(theirs)
    name = next(iter(folora.find_targets(theirs)))
    few = {"A0": torch.eye(3, 192), "gamma": torch.ones(2), "V": torch.eye(192, 2)}
    with pytest.raises(ValueError, match="PEFT's rank 8 is above"):
        folora.attach(theirs, [{"modules": [name], **few}], lr=1e-2)
    theirs.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    theirs.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        folora.find_targets(theirs)


@pytest.mark.parametrize("wrap, alpha, kappa", [(0, None, 1), (0, 12.0, 3), (1, None, 3)])
def test_a_step_of_b_is_measured_in_lengths_of_w0s_rows(wrap, alpha, kappa):
    """So that one learning rate serves every weight and every κ. The bias does not count."""
    model = nn.Sequential(nn.Linear(16, 32, dtype=torch.bfloat16))
    nn.init.constant_(model[0].bias, 100.0)
    length = model[0].weight.float().norm(dim=1).square().mean().sqrt().item()
    model = wrapped(model, r=4, lora_alpha=12, target_modules=["0"]) if wrap else model
    inputs = [{"input": torch.randn(90, 16, dtype=torch.bfloat16)}]
    optimizer = folora.prepare(model, inputs, inputs, 1e-2, 4, alpha, target_modules="0")
    assert optimizer.param_groups[1]["scale"] == pytest.approx(length / (4 ** 0.5 * kappa))


def test_gpt2s_conv1d_and_an_encoder_are_prepared():
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
    size = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, vocab_size=50)
    bert = BertModel(BertConfig(**size, intermediate_size=32))
    ids = [{"input_ids": torch.randint(50, (4, 20))} for _ in range(8)]
    for model in (GPT2LMHeadModel(GPT2Config(**size)), bert):
        theirs = wrapped(model, target_modules="all-linear")
        optimizer = prepare_on(theirs, ids)
        before = theirs(**ids[0])[0]
        descend(optimizer, lambda batch: theirs(**batch)[0].square().mean(), ids[:1])
        assert (theirs(**ids[0])[0] - before).abs().max() > 1e-4


@pytest.mark.parametrize("zero_start", [True, False])
def test_an_adapter_is_loaded_by_peft_on_the_untouched_base(zero_start, trajectory, tmp_path):
    from transformers import AutoModelForCausalLM
    model, batches, inputs, _ = trajectory
    load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    ours, untouched = copy.deepcopy(model), model(**inputs[0]).logits
    optimizer = prepare_on(ours, inputs, rank=8, alpha=16, zero_start=zero_start)
    losses(ours, optimizer, batches)
    folora.save_adapter(ours, tmp_path)
    ours.save_pretrained(tmp_path / "whole")                               # without the adapters
    alone = load(tmp_path / "whole")(**inputs[0]).logits
    assert torch.allclose(alone, untouched, atol=1e-4) == zero_start
    expected = folora.merge(ours)(**inputs[0]).logits
    for loaded in (peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path), load(tmp_path)):
        close(loaded(**inputs[0]).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [dict(load_in_8bit=True),
                                 dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")])
def test_a_quantised_base_is_trained_through_peft(how, trajectory):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    _, batches, inputs, expected = trajectory
    how = dict(dtype=torch.float32, quantization_config=BitsAndBytesConfig(**how))
    model = AutoModelForCausalLM.from_pretrained(ev.TINY, **how)
    with pytest.raises(ValueError, match="q_proj is adapted .* or quantised"):
        folora.find_targets(model)
    theirs = wrapped(model)
    optimizer = prepare_on(theirs, inputs)
    close(losses(theirs, optimizer, batches), expected, rtol=0.05, atol=0)
    theirs.bfloat16()                                    # as TRL does with a quantised base
    theirs(**batches[0]).loss.backward()
    with pytest.raises(ValueError, match="cast to torch.bfloat16.*cast back"):
        optimizer.step()


def test_sfttrainer_resumes_to_the_same_weights_and_takes_no_other_optimiser(tiny, trajectory,
                                                                             tmp_path):
    """Six steps with a checkpoint after three."""
    trl = pytest.importorskip("trl")
    rows = [{"prompt": f"{n} + 8 =", "completion": f" {n + 8}"} for n in range(24)]
    rows = ev.datasets.Dataset.from_list(rows)

    def train(out, resume=None, ours=True):
        theirs = wrapped(tiny[0])
        optimizer = prepare_on(theirs, trajectory[2])
        config = trl.SFTConfig(str(tmp_path / out), max_steps=6, save_steps=3, report_to=[],
                               per_device_train_batch_size=4, use_cpu=True, bf16=False)
        trl.SFTTrainer(theirs, config, train_dataset=rows, processing_class=tiny[1],
                       optimizers=(optimizer if ours else None, None)).train(resume)
        return theirs.parameters()

    whole, again = train("whole"), train("again", str(tmp_path / "whole/checkpoint-3"))
    assert all(map(torch.equal, whole, again))
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        train("third", ours=False)


# ---- bad input -----------------------------------------------------------------------------------

partial, nan, inf = functools.partial, math.nan, math.inf
I3, IDS, ADAPTED = torch.eye(3), torch.ones(4, dtype=torch.long), mlp()
ADAPTED.first = folora.LoRALinear(ADAPTED.first, 2)
TIED = mlp()
TIED.again = TIED.first
ONE = [{"modules": ["first"], "gamma": torch.ones(2), "V": torch.eye(16, 2)}]
UNREAD = map(pytest.fail, ["a forward pass was about to run"])
collect = partial(folora.collect_covariances, Block(), batches=(), target_modules=BLOCK_TARGETS)
prepare = partial(folora.prepare, model=mlp(), pretrain_batches=UNREAD, task_batches=UNREAD,
                  lr=0.1, rank=2, target_modules="first")
REFUSED = [                                  # (message, call, options that are wrong, others, ...)
    ("rank .* is not from 1 to 16, first's width", prepare,
     dict(rank=17), dict(rank=0), dict(rank=2.0), dict(rank=None)),
    ("called gate_proj, only down_proj, k_", collect,
     dict(target_modules=(*BLOCK_TARGETS, "gate_proj"))),
    ("called , only down_proj", collect, dict(target_modules=())),
    ("called proj, only down_proj", collect, dict(target_modules="proj")),
    ("first is adapted .merge first", prepare, dict(model=ADAPTED)),
    ("first shares its weight", prepare, dict(model=TIED)),
    ("lr must be >= 0", partial(folora.SAdam, [nn.Parameter(I3)]), dict(lr=-1), dict(lr=inf)),
    ("adapters already, or the bases", partial(folora.attach, lr=1), dict(model=ADAPTED, bases=ONE),
     dict(model=mlp(), bases=[ONE[0] | {"V": I3}])),
    ("no token reached q_proj", collect, dict(batches=[]), dict(
        batches=[{"x": torch.ones(1, 2, 8), "attention_mask": torch.zeros(1, 2)}])),
    ("a batch is a dict with input_ids", collect, dict(batches=[IDS]), dict(batches=[I3]),
     dict(batches={"input_ids": IDS}), dict(batches=[{"input_ids": IDS}]),
     dict(batches=[{"input_ids": [1, 2]}])),
    (r"a covariance \+ 0.1 I is not positive", partial(folora.generalized_eigenbasis, I3, tau=0.1),
     dict(C_pre=-I3), dict(C_pre=I3 / 0), dict(C_pre=nan * I3)),
    ("eigenproblem of a layer", partial(folora.generalized_eigenbasis, C_pre=I3, tau=0.1),
     dict(C_task=nan * I3)),
    ("must be > 0: lr = ", prepare, dict(lr=-1), dict(lr=inf), dict(lr=nan), dict(tau=0),
     dict(alpha=0), dict(basis_rank=0)),
    ("lam must be > 0, s_min in", prepare, dict(lam=0), dict(lam=inf), dict(lam=nan),
     dict(s_min=1.1), dict(s_min=-0.1)),
    ("PEFT's own models have", partial(folora.save_adapter, directory="/dev/null"),
     dict(model=mlp())),
]


@pytest.mark.parametrize("message, call, how", [
    (message, call, how) for message, call, *hows in REFUSED for how in hows])
def test_misuse_of_folora_is_refused(message, call, how):
    with pytest.raises(ValueError, match=message):
        call(**how)


# ---- eval.py -------------------------------------------------------------------------------------

# text, answers, correct on nq_open, on triviaqa: the verdicts of lm-eval 0.4.13
EXACT = [("Paris", ["Paris", "Lutetia"], 1, 1), ("paris", ["Paris"], 1, 1), ("", ["Paris"], 0, 0),
         ("the Eiffel Tower", ["Eiffel Tower"], 1, 0), ("Eiffel", ["Eiffel Tower"], 0, 0),
         ("The Eiffel tower!", ["eiffel tower"], 1, 0), ("U.S.A", ["USA"], 1, 1),
         ("an apple", ["a apple"], 1, 0), ("banana the", ["banana"], 0, 0),
         ("December 14 1972", ["14 December 1972 UTC", "December 14, 1972"], 1, 1),
         ("theatre", ["atre"], 0, 0), ("THE WHO", ["who"], 0, 0)]
PREFIXES = [(["Spanish", "Spain", "Spanish Language"], ["Spain", "Spanish"]),
            (["b", "a", "ab"], ["a", "b"])]


def test_answers_are_judged_as_written_down_here():
    for text, answers, *verdicts in EXACT:
        assert [ev.exact_match(text, answers, articles) for articles in (True, False)] == verdicts
    assert all(ev.shortest_prefixes(answers) == kept for answers, kept in PREFIXES)
    numbers = {"The answer is: 18": 18, "The answer is: $1,234.50.": 1234.5, "18": None,
               "The answer is: 3. The answer is: -4": -4, "The answer is: none": None}
    assert {text: ev.final_number(text) for text in numbers} == numbers


def test_what_is_written_down_here_is_lm_evals_verdict():
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="pip install lm-eval==0.4.13")
    from lm_eval.tasks.webqs.utils import doc_to_choice
    how = dict(ignore_case=True, ignore_punctuation=True)
    articles = ["\\b(?:The |the |An |A |The |a |an )"]
    for text, answers, *verdicts in EXACT:
        for ignored, verdict in zip((articles, None), verdicts):
            scores = [metrics.exact_match_hf_evaluate([text], [a], regexes_to_ignore=ignored, **how)
                      for a in answers]
            assert max(score["exact_match"] for score in scores) == verdict
    assert all(doc_to_choice({"answers": list(answers)}) == kept for answers, kept in PREFIXES)


def test_pairs_are_found_under_every_name_and_gsm8k_notes_go():
    rows = [{"question": "q", "answer": "2+3=<<2+3=5>>5.\n#### 5"},          # GSM8K
            {"instruction": "q", "input": "i", "output": "r"},                 # Alpaca
            {"query": "q", "answer": "r", "lang": "python"},                   # CodeFeedback
            {"query": "q", "original_question": "o", "response": "r"}]         # MetaMathQA
    wanted = [("q", ["2+3=5.\nThe answer is: 5"]), ("q\ni", ["r"]), ("q", ["r"]), ("q", ["r"])]
    assert ev.to_pairs(rows, "x") == wanted
    for answer in ("a", ["a"], {"aliases": ["a", ""]}):
        assert ev.to_pairs([{"question": "q", "answer": answer}], "x") == [("q", ["a"])]
    for nothing in (None, 5, " ", [5], {"aliases": []}):
        with pytest.raises(ev.UserError, match="x, line 2: no field called answers or answer or"):
            ev.to_pairs([rows[0], {"question": "q", "answer": nothing}], "x")


def test_no_separator_but_a_line_feed_ends_a_line_of_a_file(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"text": "a\u2028b\u0085c\u000cd\x1ce"}, {"text": "é"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n\n")
    assert ev.read_rows(str(path)) == rows
    assert ev.given_texts(str(path), 1) == [rows[0]["text"]]


def test_loss_is_on_the_response_and_equals_the_models_own(tiny):
    model, tokenizer = tiny
    pairs = [("What is 2 + 2?", ["It is 4.\nThe answer is: 4"]), ("Sort: b a", ["a b, no more"])]
    examples = ev.encode_all(tokenizer, [*pairs, ("long " * 250, ["is left out"])], 256)
    for example, (ask, _), ending in zip(examples, pairs, (" Let's think step by step.", "")):
        prompt = [i for i, label in zip(example["ids"], example["labels"]) if label == -100]
        assert tokenizer.decode(prompt).endswith(f"{ask}\n\n### Response:{ending}")
        assert example["labels"][len(prompt):] == example["ids"][len(prompt):]
        assert example["labels"][-1] == tokenizer.eos_token_id
    own = model(**ev.collate(examples, CPU)).loss.item()
    assert ev.mean_nll(model, examples, batch_size=1) == pytest.approx(own, rel=1e-4)
    with pytest.raises(ev.UserError, match="1 of 1 examples have prompts that fill --max-length"):
        ev.encode_all(tokenizer, pairs[1:], len(prompt))             # not one label would be left


@pytest.mark.parametrize("kind, options", [
    ("Gemma2", {"final_logit_softcapping": 0.5}), ("Granite", {"logits_scaling": 3.0}),
    ("Cohere", {"logit_scale": 0.25}), ("OPT", {"word_embed_proj_dim": 16, "ffn_dim": 32}),
    ("GPT2", {}), ("Mixtral", {"output_router_logits": True})])
def test_the_loss_of_padded_rows_is_that_of_each_alone_whatever_the_head_does(kind, options):
    import transformers
    options |= dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                    pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**options)).eval()
    examples = [{"ids": list(range(3, 12)), "labels": [-100] * 6 + [9, 10, 11]},
                {"ids": list(range(12, 18)), "labels": [-100] * 2 + [14, 15, 16, 17]}]
    own = 0
    for example in examples:
        logits = model(torch.tensor([example["ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"][1:])
        own += nn.functional.cross_entropy(logits, labels, reduction="sum")
    close(ev.summed_nll(model, ev.collate(examples, CPU)), own)


def test_drift_is_the_kl_of_next_token_distributions(tiny):
    model, tokenizer = tiny
    other = copy.deepcopy(model)
    other.model.layers[2].mlp.down_proj.weight.data.mul_(1.5)
    texts = [torch.tensor(tokenizer(text)["input_ids"])
             for text in ("12 + 7 = 19\n", "Q: what is 4 + 4?\nA: 8\nQ: ")]
    kl = []
    for text in texts:
        p, q = (m(text[None]).logits[0, :-1].double().softmax(-1) for m in (model, other))
        kl.append((p * (p / q).log()).sum(-1))
    wanted = pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert ev.drift(other, model, texts) == wanted == train_math.Probe(model, texts, 400)(other)
    assert len(train_math.Probe(model, texts, positions=6).before) == 6


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
    assert [ev.count_right(model, tokenizer, [pair], "webqs") for pair in pairs] == literal
    assert any(literal) and not all(literal)


@pytest.mark.parametrize("task, text, wanted, right", [
    ("facts", " The Sun.\nQ: and", "sun", 1), ("facts", " Sunday", "sun", 0),
    ("triviaqa", " The Sun", "sun", 0), ("triviaqa", " sun, I say", "Sun", 1),
    ("gsm8k", "2. The answer is: 5", "The answer is: 5.0", 1),
    ("gsm8k", "5", "The answer is: 5", 0)])
def test_each_task_is_judged_by_its_own_rule(tiny, monkeypatch, task, text, wanted, right):
    monkeypatch.setattr(ev, "greedy", greedy := Mock(return_value=[tiny[1](text)["input_ids"]]))
    assert ev.count_right(*tiny, [("q", [wanted])], task) == right
    assert greedy.call_args.args[3] == (256 if task == "gsm8k" else 64)          # new tokens


def test_summary_rows():
    before = {"gsm8k": 10.0, "nq_open": 20.0, "webqs": 30.0, "drift": 0.0}
    after = {"humaneval": 40.0, "nq_open": 15.0, "mmlu": 25.0, "drift": 0.1}
    wanted = {"Avg1": 20.0, "Avg1(%)": 80.0, "Avg2": 40.0, "GM": pytest.approx(math.sqrt(800))}
    assert ev.summarise(after, before) == wanted
    assert ev.summarise(after | ev.summarise(after, before), before) == wanted
    assert "Avg1(%)" not in ev.summarise(after, {**before, "nq_open": 0.0, "webqs": 0.0})
    assert "Avg1(%)" not in ev.table({"folora": after})


@pytest.mark.parametrize("name, weight", [
    ("model.norm.weight", None), ("model.norm.weight", torch.ones(5)), ("x", torch.ones(2))])
def test_wrong_weights_are_refused_and_finished_columns_printed(tmp_path, name, weight, capsys):
    other = shutil.copytree(ev.TINY, tmp_path / "other") / "model.safetensors"
    weights = load_file(other) | {name: weight}
    save_file({n: w for n, w in weights.items() if w is not None}, other, {"format": "pt"})
    with pytest.raises(SystemExit, match="2"):
        ev.main(["tiny", str(other.parent), "--tasks", "facts", "--limit", "2"])
    out, err = capsys.readouterr()
    assert f"cannot load the model {other.parent}: " in err.splitlines()[-1]
    assert "facts" in out and "Avg1" in out and "other" not in out


def test_a_run_or_an_adapter_is_the_model_that_peft_makes_of_it(tiny, tmp_path):
    run = str(tmp_path)
    model = wrapped(tiny[0], r=4, init_lora_weights=False, use_rslora=True)
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.merge_and_unload().state_dict()
    ours, rounded = (ev.load_model(f"{run}/adapter", CPU, dtype)[0].state_dict()
                     for dtype in (torch.float32, torch.bfloat16))
    for name, weight in wanted.items():                              # bfloat16: rounded only once
        assert torch.equal(ours[name], weight)
        assert (rounded[name] == weight.bfloat16()).float().mean() > 0.999
    with pytest.raises(ev.UserError, match="nor a finished run"):
        ev.find_model(run)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"options": {"model": "tiny"}}')
    path = tmp_path / "adapter/adapter_config.json"                  # the run knows better
    path.write_text(path.read_text().replace('"tiny"', '"/moved/away"'))
    assert ev.find_model(run) == (str(ev.TINY), tmp_path / "adapter", {"model": "tiny"})
    close(ev.load_model(run, CPU, torch.float32)[0].state_dict(), wanted)
    shutil.copytree(ev.TINY, tmp_path / "merged")
    assert ev.find_model(run) == (str(tmp_path / "merged"), None, {"model": "tiny"})


@pytest.mark.parametrize("error, line", [
    (OSError(28, "it is so"), "it is so"), (KeyboardInterrupt(), "interrupted"),
    (MemoryError(), "out of memory: lower --micro-batch-size, then --max-length or --rank"),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "then --max-length or --rank"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "then --max-length or --rank"),
    (ValueError("it is so"), None)])
def test_what_the_user_can_mend_is_one_line(error, line, capsys):
    @ev.one_line
    def main(arguments=None):
        bar = tqdm(total=3)                          # it is open and must not share the line
        bar.update()
        raise type(error)(*error.args)
    if line:
        assert stopped(main, [], capsys).endswith(line)
    else:
        with pytest.raises(type(error)):
            main()


def test_without_a_network_the_hub_is_not_asked_again(monkeypatch):
    constants = ev.huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(ev.datasets.config, "HF_HUB_OFFLINE", False)
    for ask in (lambda: ev.read_rows("owner/data"),
                lambda: ev.load_model("owner/name", CPU, torch.float32)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(ev.UserError, match="owner/data: no such|cannot load the model owner/"):
            ask()
        assert constants.HF_HUB_OFFLINE and ev.datasets.config.HF_HUB_OFFLINE


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """lm-eval's class of task managers. It knows the tasks in tmp_path, and asks no hub."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="pip install lm-eval==0.4.13")
    real = tasks.TaskManager
    mine = functools.partial(real, include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", mine)
    monkeypatch.setattr(ev, "reach_hub", lambda: None)
    return real


def test_harness_names_are_checked_before_anything_runs(manager, monkeypatch):
    with pytest.raises(ev.UserError, match="cannot load .'nothing'.* HF_ALLOW_CODE_EVAL=1"):
        ev.harness_tasks("nothing")
    groups = {name: SimpleNamespace(has_aggregation=name == "scored") for name in ("scored", "not")}
    monkeypatch.setattr(manager, "load", lambda *_: {"tasks": {"task": None}, "groups": groups})
    assert ev.harness_tasks("task,scored", {"a": 1})[1] == ["task", "scored"]
    for name in ("tag", "not"):
        with pytest.raises(ev.UserError, match=f"no score of its own for {{'{name}'}}"):
            ev.harness_tasks(f"task,{name}")


def test_the_harness_scores_a_local_task_into_the_same_table(manager, tmp_path, capsys):
    """tiny's facts as a task of lm-eval: the built-in score, and in Avg1 like the others."""
    (tmp_path / "world.yaml").write_text(json.dumps({            # JSON is YAML
        "task": "world", "dataset_path": "json", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"validation": f"{HERE}/tiny/facts.jsonl"}},
        "validation_split": "validation", "description": "Answer these questions:\n\n",
        "doc_to_text": "Q: {{question}}?\nA:", "doc_to_target": "{{answer[0]}}",
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [{"name": "strip", "filter": [{"function": "remove_whitespace"},
                                                     {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "ignore_case": True}]}))
    ev.main(["tiny", "--tasks", "facts,sums", "--harness", "world", "--limit", "8"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()]
    row = {words[0]: float(words[-1]) for words in lines}
    assert row["world"] == row["facts"] > 0
    assert row["Avg1"] == pytest.approx((2 * row["facts"] + row["sums"]) / 3, abs=0.01)


def test_one_score_of_a_harness_result():
    for score, result in [
            (25, {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5}),
            (20, {"exact,none": 10.0, "HasAns_exact,none": 20.0, "sample_len": 7}),
            (40, {"prompt_level_loose_acc,none": 0.5, "prompt_level_strict_acc,none": 0.4}),
            (70, {"rouge_stderr,first": 0.1, "rouge,first": 0.7, "rouge,second": 0.1})]:
        assert ev.harness_score(result) == pytest.approx(score)


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
    descend(optimizer, lambda _: adapter(x).square().mean(), range(3))
    assert not torch.equal(adapter.lora_B, B)
    assert torch.equal(adapter.lora_A, A) == (method == "lora-null-v2")          # v2 freezes A
    assert not adapter.weight.requires_grad
    merged = adapter.merged()
    close(merged(x), adapter(x), **near)
    update = merged.weight.detach() - base.weight.detach()
    assert update.abs().max() > 1e-3
    if method == "oplora":                   # orthogonal to the top singular spaces on both sides
        U, _, Vh = torch.linalg.svd(base.weight.detach())
        assert max((U.mT @ update)[:4].abs().max(), (update @ Vh.mT)[:, :4].abs().max()) < 1e-5


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (12.0, 3.0)])
@pytest.mark.parametrize("method", ["milora", "corda", "lora-null", "lora-null-v2"])
def test_a_baselines_start_is_its_formula_in_numpy(method, alpha, kappa, layer):
    adapter = baseline(method, *layer, alpha)[0]
    A, B = (p.detach().numpy() for p in (adapter.lora_A, adapter.lora_B))
    W, C = layer[0].weight.detach().double().numpy(), layer[1].double().numpy()
    inner = {"milora": numpy.eye(12), "corda": C + 0.01 * numpy.diag(C).mean() * numpy.eye(12)}
    least = numpy.linalg.eigh(C)[1][:, :4]
    inner = inner.get(method, least @ least.T)                       # LoRA-Null's U0 U0ᵀ
    U, S, Vh = numpy.linalg.svd(W @ inner, full_matrices=False)
    kept = slice(4) if "null" in method else slice(-4, None)
    S, right = S[kept] / kappa, Vh[kept]
    right = right @ numpy.linalg.inv(inner) if method == "corda" else right
    numpy.testing.assert_allclose(B @ A, U[:, kept] * S @ right, atol=1e-4)
    numpy.testing.assert_allclose(B.T @ B, numpy.diag(S), rtol=1e-4, atol=1e-4)  # √(S/κ) in each


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("method", ["lora", "corda"])
def test_a_start_is_pefts(method, alpha, layer, tmp_path):
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
    close(ours.weight, theirs.base_layer.weight, **near)
    assert ours.scaling == theirs.scaling["default"]


# ---- the scripts, end to end ---------------------------------------------------------------------

COMMON = ("--max-samples 64 --batch-size 8 --micro-batch-size 4 --max-steps 6 --log-every 2 "
          "--rank 8 --calibration-max-tokens 40 --eval-samples 4").split()
FAST = [*COMMON, *"--calibration-samples 4 --task-samples 8 --basis-rank 16 --compare no".split()]
TASKS = f"gsm8k={ev.TINY / 'test.jsonl'},facts,nll={ev.TINY / 'test.jsonl'},drift"
METHODS = [("folora", ()), ("lora", ()), ("folora", ("--preset", "paper"))]
COMPARED = ("folora", *"--tasks facts,drift --compare lora --lr 1e-2 --merge 1 --kl 2 --kl-texts 3 "
            "--target-modules q_proj,down_proj".split())


def read_json(path):
    return json.loads(path.read_text())


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def command(method, *more):
    return [*(FAST if method == "folora" else COMMON), "--method", method, "--tasks", TASKS, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, what it printed) of a method with more options; each is trained once."""
    @functools.cache
    def run(method, *more):
        out, printed = tmp_path_factory.mktemp("runs") / method, io.StringIO()
        with contextlib.redirect_stdout(printed):
            train_math.main(command(method, *more, "--out", str(out)))
        return out, printed.getvalue()
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
    assert all(row in printed for row in ("untouched", method, "gsm8k", "facts", "nll", "Avg1(%)"))
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(f"\n    {name}   " in train_math.__doc__ for name in lines[0])
    assert [line["drift"] is not None for line in lines] == [False, True] * 3
    assert lines[-1]["loss"] < lines[0]["loss"] == pytest.approx(1.784, abs=1e-3)
    config, scores = read_json(out / "config.json"), read_json(out / "summary.json")["scores"]
    assert config["options"]["rank"] == 8 and config["torch"] == torch.__version__
    left = sorted(p.name for p in out.iterdir())
    assert left == ["adapter", "config.json", "metrics.jsonl", "summary.json"]
    assert scores[method]["nll"] < scores["untouched"]["nll"] and scores[method]["drift"] > 0


def test_plain_lora_is_trained_as_by_a_literal_loop(trained, tiny):
    model, examples = copy.deepcopy(tiny[0]), word_problems(tiny[1], 64)
    torch.manual_seed(0)
    optimizer = train_math.add_adapters(train_math.parse_options(command("lora")), model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    order, lines = train_math.data_order(64, 8, None, 6, 0), metrics(trained("lora")[0])
    for step, (batch, line) in enumerate(zip(order, lines, strict=True)):
        rate = optimizer.param_groups[0]["lr"] = 4e-3 * train_math.schedule(step, 6)
        loss = model(**ev.collate([examples[i] for i in batch], CPU)).loss
        gradients = torch.autograd.grad(loss, parameters)
        for p, g in zip(parameters, gradients):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        literal = [loss.item(), rate, norm.item()]
        assert [line["loss"], line["lr"], line["grad_norm"]] == pytest.approx(literal, rel=1e-3)


def test_eval_reads_a_run(trained, capsys):
    out, _ = trained("folora")
    scores = read_json(out / "summary.json")["scores"]
    ev.main([str(out), "tiny", "--tasks", TASKS, "--limit", "4"])
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = {line[0]: [float(x) for x in line[-2:]] for line in words if line[0] in ("nll", "drift")}
    for task, digits in (("nll", 2e-3), ("drift", 1e-4)):
        columns = [scores[column][task] for column in ("folora", "untouched")]
        assert row[task] == pytest.approx(columns, abs=digits)


def test_lora_is_compared_in_the_same_run(trained, tiny, capsys):
    out, printed = trained(*COMPARED)
    header = next(line for line in printed.splitlines() if line.split()[:1] == ["untouched"])
    assert header.split() == ["untouched", "folora", "lora"]
    rates = [read_json(run / "config.json")["options"]["lr"] for run in (out, out / "lora")]
    assert rates == [1e-2, 4e-3]
    train_math.main(command(*COMPARED, "--out", str(out), "--micro-batch-size", "2"))
    assert header in capsys.readouterr().out         # a finished run prints its table
    merged, adapter = (ev.load_model(str(path), CPU, torch.float32)[0].state_dict()
                       for path in (out, out / "adapter"))
    for name, untouched in tiny[0].state_dict().items():
        close(merged[name], adapter[name])
        assert torch.equal(merged[name], untouched) != ("q_proj" in name or "down_proj" in name)


def test_killed_runs_go_on_to_the_same_numbers(trained, tmp_path):
    """Killed by SIGKILL, and in a process of their own: TRL has started threads in this one."""
    moments = ["in the eigenproblems", "first checkpoint.pt half written",
               "summary.json half written"]
    runs = [[*command(method, *more), "--out", str(tmp_path / moment)]
            for (method, more), moment in zip(METHODS, moments)]
    code = (f"import torch; from assets import kill; torch.set_num_threads(1)\n"
            f"for moment, run in zip({moments}, {runs}):\n"
            f"    assert kill.killed(kill.start(run, kill.MOMENTS[moment]))[0]")
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
    for (method, more), moment, run in zip(METHODS, moments, runs):
        train_math.main(run)
        assert kill.result(tmp_path / moment) == kill.result(trained(method, *more)[0])


def test_what_stops_a_run_is_said_in_a_line_and_it_resumes(trained, tmp_path, monkeypatch, capsys):
    """A full disk, then NaN in step 4, then Ctrl-C in step 3. What is finished is not repeated."""
    out, finished = tmp_path / "run", kill.result(trained("folora")[0])
    arguments = command("folora", "--out", str(out))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        line = stopped(train_math.main, arguments, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert re.search("File too large|disk full", line) and (out / "prepared.pt.part").exists()
    monkeypatch.setattr(train_math, "calibration_texts", None)
    answers = [*[DEFAULT] * 3, (math.nan, 1.0), KeyboardInterrupt, *[DEFAULT] * 4]
    gradients = Mock(wraps=train_math.gradients, side_effect=answers)
    monkeypatch.setattr(train_math, "gradients", gradients)
    line = stopped(train_math.main, arguments, capsys, status=1)
    assert "step 4: loss nan, gradient norm 1.0; the last checkpoint is of step 2" in line
    assert len(metrics(out)) == torch.load(out / "checkpoint.pt")["step"] == 2
    monkeypatch.setattr(folora, "decompose", None)
    assert "interrupted" in stopped(train_math.main, arguments, capsys)
    train_math.main(arguments)
    assert kill.result(out) == finished and gradients.call_count == len(answers)


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(); input()"


def test_a_directory_belongs_to_one_run(trained, tmp_path, capsys):
    arguments = command("folora", "--out", str(trained("folora")[0]))
    stop = lambda *more: stopped(train_math.main, [*arguments, *more], capsys)
    assert "holds a run with another merge, rank: give" in stop("--rank", "4", "--merge", "1")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-uc", HOLD, tmp_path / "lock"], **pipes) as other:
        other.stdout.readline()
        assert "another process is at work" in stop("--out", tmp_path)
        other.communicate(b"\n")
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds other files and no run" in stop("--out", tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    assert "holds a run with another basis_rank, batch_size, " in stop("--out", tmp_path)


def test_gradient_checkpointing_runs_the_layers_again_for_the_same_gradient(tiny):
    model, calls, seen = copy.deepcopy(tiny[0]), [], []
    batch = ev.collate(word_problems(tiny[1], 1), CPU)
    layers = model.requires_grad_(False).model.layers
    weight = layers[0].mlp.down_proj.weight.requires_grad_()
    layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (1, 0):
        train_math.recompute(model, on)
        assert not any(m.training for m in model.modules() if isinstance(m, nn.Linear))
        seen.append(torch.autograd.grad(ev.summed_nll(model, batch), weight)[0])
    close(*seen)
    assert len(calls) == 3                   # twice with, once without


TWO_PROCESSES = """
import sys, torch, folora, train_math
train_math.join()
torch.manual_seed(train_math.PROCESS)                   # each process would have another basis
x, net = torch.randn(90, 8), torch.nn.Sequential(torch.nn.Linear(8, 4))
task = [{"input": x * torch.arange(1, 9)}]
optimizer = folora.prepare(net, [{"input": x}], task, 1e-2, 4, target_modules="0", basis_rank=5)
for mine in (optimizer.param_groups[0]["basis"], net[0].lora_A.detach()):
    copies = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(copies, mine.contiguous())
    assert torch.equal(*copies)
train_math.main()
"""


def test_two_processes_share_bases_and_do_what_one_does(trained, tmp_path):
    """The same batch and KL texts, divided by torchrun: the same losses, scores and weights."""
    one, two, script = trained(*COMPARED)[0], tmp_path / "two", tmp_path / "work.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    done = subprocess.run([*launch, script, *command(*COMPARED), "--out", two], text=True, cwd=HERE,
                          env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Avg1(%)") == done.stderr.count("eigenproblems:   0%") == 1
    for method, runs in (("folora", (one, two)), ("lora", (one / "lora", two / "lora"))):
        losses = [[line["loss"] for line in metrics(run)] for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        scores = [read_json(run / "summary.json")["scores"][method] for run in runs]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-6)
        a, b = (ev.load_model(str(run), CPU, torch.float32)[0].state_dict() for run in runs)
        assert all((a[name] - b[name]).norm() < 1e-5 * a[name].norm() for name in a)


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
train | --seed 1000 | --seed: must be from 0 to 999
train | --method milora | invalid choice: 'milora'
train | --method lora | --basis-rank --compare --task-samples would be ignored
train | --device banana | --device banana: it is cpu, cuda or
train | --device cuda:99 | --device cuda:99: it is cpu, cuda or
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
train | --data none.jsonl | none.jsonl: no rows
train | --calibration gone.jsonl | gone.jsonl: no such file
train | --calibration five.jsonl | five.jsonl, line 1: no field called text or question
train | --out good.jsonl | File exists: 'good.jsonl'
train | --out good.jsonl/run | Not a directory: 'good.jsonl/run'
train | --out . | . holds
eval |  | required: MODEL
eval | nowhere | nowhere: no such directory
eval | good.jsonl | good.jsonl: neither a checkpoint
eval | tiny --limit 0 | --limit
eval | tiny --limit few | --limit: invalid int value: 'few'
eval | tiny --dtype int8 | invalid choice
eval | tiny --device banana | --device banana: it is cpu, cuda or
eval | tiny --tasks trivia | unknown task trivia
eval | tiny --tasks= | nothing to score
eval | tiny --tasks nll=cut.jsonl | cut.jsonl, line 2: not JSON
eval | tiny --tasks facts=none.jsonl | none.jsonl: no rows
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
    assert words in stopped(main, [*given, *arguments.split()], capsys) and state() == before


def test_defaults_are_the_papers_or_marked_as_ours(capsys):
    paper = train_math.parse_options("--model Qwen2.5-1.5B --preset paper".split())
    wanted = dict(rank=128, lam=1.0, s_min=0.3, batch_size=128, max_length=512, basis_rank=0,
                  calibration_samples=2000, task_samples=256, zero_start=0, compare="no", lr=3e-4)
    assert {name: getattr(paper, name) for name in wanted} == wanted
    tuned = train_math.parse_options("--lam 2 --rank 16 --max-steps 1".split())
    wanted = train_math.TINY | dict(lam=2.0, s_min=0.0, zero_start=1, rank=16, lr=1.2e-2)
    assert {name: getattr(tuned, name) for name in wanted} == wanted
    assert train_math.parse_options(["--model", str(ev.TINY), "--method", "lora"]).lr == 4e-3
    assert all("ours" in text or "the paper's" in text for *_, text in train_math.OPTIONS)
    with pytest.raises(SystemExit):
        train_math.main(["--help"])
    assert "more forgets less [the paper's] (None)" in " ".join(capsys.readouterr().out.split())


def test_the_script_prepares_as_folora_does(tiny):
    flags = "--tau 0.02 --lam 2 --s-min 0.1 --alpha 4 --lr 0.5".split()
    options, examples = train_math.parse_options([*FAST, *flags]), word_problems(tiny[1], 16)
    texts, task = ([e["ids"] for e in some] for some in (examples[8:], examples[:8]))
    ours, theirs = (copy.deepcopy(tiny[0]) for _ in range(2))
    bases = train_math.solve(options, ours, texts, examples)
    groups = train_math.add_adapters(options, ours, bases).param_groups
    expected = folora.prepare(theirs, [ev.collate(texts, CPU)], [ev.collate(task, CPU)], 0.5, 8, 4,
                              tau=0.02, lam=2.0, s_min=0.1, basis_rank=16).param_groups
    for a, b in zip(groups, expected, strict=True):
        assert (a["lr"], a["scale"]) == (b["lr"], b["scale"])
        if b["gate"] is not None:
            close(a["gate"], b["gate"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("zero_start", [True, False])
def test_the_gradient_is_of_the_whole_batch_and_of_kl_from_the_pretrained_model(
        trajectory, tiny, zero_start):
    model, batches, inputs, _ = trajectory
    ours, texts = copy.deepcopy(model), [b["input_ids"][0].tolist() for b in inputs[:2]]
    optimizer = prepare_on(ours, inputs, rank=8, zero_start=zero_start)
    losses(ours, optimizer, batches)
    moved = ours(**inputs[0]).logits
    kl = train_math.kl_from_untouched(ours, texts) / sum(len(t) - 1 for t in texts)
    assert kl.item() == pytest.approx(ev.drift(ours, model, list(map(torch.tensor, texts))), 1e-3)
    assert torch.equal(ours(**inputs[0]).logits, moved)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    examples = word_problems(tiny[1], 2)             # two micro-batches of one
    loss = ev.summed_nll(ours, ev.collate(examples, CPU))
    labels = sum(label != -100 for e in examples for label in e["labels"][1:])
    expected = torch.autograd.grad(loss / labels + 5 * kl, parameters)
    _, norm = train_math.gradients(ours, optimizer, examples, 1, 5.0, texts)
    assert norm == pytest.approx(sum(g.square().sum() for g in expected).sqrt().item(), rel=1e-4)
    _, norm = train_math.gradients(ours, optimizer, examples, 1, 1e4, texts)
    clipped = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
    assert clipped == pytest.approx(1.0, 1e-3) and norm > 1


# ---- the measurements ----------------------------------------------------------------------------

@pytest.fixture
def experiments(tmp_path, monkeypatch):
    from assets import experiments
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(experiments, "CACHE", tmp_path)
    return experiments


def test_a_suite_scores_the_command_lines_run_and_its_scaled_update_once(
        trained, experiments, monkeypatch):
    suite, setting = (*FAST, "--tasks", TASKS), experiments.grid("folora --kl-texts 4")[0]
    monkeypatch.setattr(experiments, "wanted", lambda name: [setting | {"seed": 0}])
    experiments.run_all("tiny", suite)
    row, = experiments.read("tiny")["runs"]
    scores = read_json(trained("folora")[0] / "summary.json")["scores"]["folora"]
    measures = {name: row["scores"].pop(name) for name in ("penalty", "cka")}
    del scores["Avg1(%)"]
    assert row["scores"] == pytest.approx(scores, rel=1e-4, abs=1e-6)
    for scale in (0.7, 0.5, 0.35):
        some = row["scaled"][str(scale)]
        assert some["penalty"] == pytest.approx(scale ** 2 * measures["penalty"], rel=1e-3)
        assert measures["cka"] < some["cka"] < 1 and some["drift"] < scores["drift"]
    runs, diverged = [setting | {"seed": seed} for seed in (0, 1)], []

    def diverge(options, *_):
        diverged.append(options.seed)
        raise FloatingPointError
    monkeypatch.setattr(experiments, "wanted", lambda name: runs)
    monkeypatch.setattr(train_math, "train", diverge)
    experiments.run_all("tiny", suite)
    assert diverged == [1] and len(experiments.read("tiny")["runs"]) == 1


def test_drift_by_penalty_and_cka_is_what_their_formulas_say(experiments):
    g = torch.Generator().manual_seed(0)
    body = lambda W: SimpleNamespace(device=CPU, get_decoder=lambda: lambda ids: [W[ids]],
                                     get_submodule=lambda name: SimpleNamespace(weight=W))
    X, Y, C = (torch.randn(12, 12, generator=g) for _ in range(3))
    shared = SimpleNamespace(texts=[torch.arange(12)], model=body(X), C={"x": C @ C.mT})
    kernels = [K - K.mean(0) - K.mean(1)[:, None] + K.mean() for K in (X @ X.mT, Y @ Y.mT)]
    expected = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert experiments.hidden_cka(shared, body(Y)) == pytest.approx(expected.item(), rel=1e-4)
    R = [sum(row @ C @ C.mT @ row for row in M) for M in (Y - X, X)]
    assert experiments.penalty(shared, body(Y)) == pytest.approx((R[0] / R[1]).item(), rel=1e-4)


def test_changes_do_what_they_say(experiments):
    moved = {}
    for change in ("", "A frozen", "plain Adam", "A slow", "one lr", "one lr, A slow, plain Adam"):
        A, B = nn.Parameter(torch.zeros(4, 12)), nn.Parameter(torch.zeros(10, 4))
        spectral = {"params": [A], "basis": torch.eye(12), "gate": torch.full((12,), 0.6)}
        optimizer = folora.SAdam([spectral, {"params": [B], "scale": 0.7}], lr=0.1)
        experiments.change_optimizer(optimizer, change)
        A.grad, B.grad = torch.ones(4, 12), torch.ones(10, 4)
        optimizer.step()
        moved[change] = [round(-p.mean().item(), 4) for p in (A, B)]
    assert [*moved.values()] == [[0.06, 0.07], [0, 0.07], [0.1, 0.07], [0.02, 0.07], [0.06, 0.1],
                                 [0.0333, 0.1]]


def test_the_nll_of_an_answer_is_of_the_answer_alone(experiments, tiny):
    pair, = ev.to_pairs([{"question": "who", "answer": ["Tom", "T"]}], "questions")
    example = experiments.with_answer(tiny[1], "Q: {}?\nA:", *pair)
    labelled = [i for i, label in zip(example["ids"], example["labels"]) if label != -100]
    assert tiny[1].decode(labelled) == " Tom"
    assert tiny[1].decode(example["ids"], skip_special_tokens=True) == "Q: who?\nA: Tom"


def test_the_report_and_what_is_fresh_from_the_undominated_settings(experiments, tmp_path, capsys):
    """Each further seed is worse by 0.1 in NLL and by 0.02 in KL. Not all settings have two."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib for the figure")
    named = lambda label, name="smollm2": [
        setting for some, setting in experiments.settings_of(name) if some == label]
    lora, (milora, folora, part) = named("LoRA"), (named(n)[0] for n in ("MiLoRA", "FoLoRA", ""))
    measured = [(lora[0], 2, 3.0, 0.1), (lora[1], 2, 2.5, 0.9), (lora[2], 2, 2.0, 0.3),
                (lora[3], 3, 2.2, 0.3), (milora, 2, 2.5, 0.05), (folora, 1, 2.1, 0.8),
                (part, 1, 1.5, 0.25)]
    runs, points = [], []
    for setting, seeds, nll, kl in measured:
        for seed in range(seeds):
            x, y = nll + seed / 10, seed / 50
            pairs = [(x, kl + y), (x + 1, kl / 4 + y)]
            scores = [{"nll": x, "drift": y, "penalty": x, "cka": 1 - y, "prose": y}
                      for x, y in pairs]
            runs.append(setting | {"seed": seed, "scores": scores[0], "scaled": {"0.5": scores[1]}})
            points += pairs
    untouched = {"nll": 5.0, "drift": 0.0, "GM": 1.0}
    (tmp_path / "smollm2.json").write_text(json.dumps({"untouched": untouched, "runs": runs}))
    experiments.main(["report"])
    rho = scipy.stats.spearmanr(*zip(*points))[0]
    lines = filter(None, capsys.readouterr().out.splitlines())
    assert [line for line in lines if "---" not in line] == [
        "smollm2: KL at LoRA's lowest NLL, 2.050 ± 0.071, plus",
        "| method | 0.03 | 0.01 | 0.005 | 0.0 |",
        "| LoRA | 0.303 ± 0.014 | 0.308 ± 0.014 | 0.309 ± 0.014 | 0.310 ± 0.014 |",
        "| MiLoRA | - | - | - | - |",
        "smollm2: NLL and KL (drift) in nat per token",
        "| method | setting | scale | nll | drift |",
        "| untouched |  |  | 5.0 | 0.0000 |",
        "| LoRA | lr 3e-4 | 0.5 | 4.0 ± 0.1 | 0.0350 ± 0.0141 |",
        "| LoRA | lr 1e-3 | 1.0 | 2.050 ± 0.071 | 0.310 ± 0.014 |",
        "| LoRA | lr 1e-3 | 0.5 | 3.0 ± 0.1 | 0.0850 ± 0.0141 |",
        "| MiLoRA | lr 1e-4 | 1.0 | 2.550 ± 0.071 | 0.0600 ± 0.0141 |",
        "| MiLoRA | lr 1e-4 | 0.5 | 3.5 ± 0.1 | 0.0225 ± 0.0141 |",
        "| FoLoRA | basis-rank 32 lam 1 lr 3e-3 | 1.0 | 2.100 | 0.800 |",
        "| FoLoRA | basis-rank 32 lam 1 lr 3e-3 | 0.5 | 3.1 | 0.200 |",
        "|  | preset paper zero-start 1 lam 1 s-min 0 lr 3e-3 one lr | 1.0 | 1.500 | 0.250 |",
        f"smollm2, {len(points)} points, rank correlation with prose: "
        f"{{'drift': 1.0, 'penalty': {rho:.2f}, 'cka': -1.0}}"]
    assert (tmp_path / "tradeoff.png").exists()
    assert named("LoRA", "smollm2-fresh") == [lora[0], lora[2]]  # of those that are not scaled
    seeds = [{run["seed"] for run in experiments.wanted(name)}
             for name in ("smollm2", "smollm2-fresh")]
    assert seeds == [{0}, {3, 4, 5}] and experiments.FRESH_TEXT["seed"] != ev.HELD_OUT_SEED
    searched = train_math.parse_options(experiments.SUITES["smollm2"].split()).eval_samples
    assert experiments.FRESH_TEST.start == searched


def test_every_setting_of_a_suite_is_a_command_line(experiments):
    for name in ("tiny", "smollm2", "smollm2-long"):
        for run in experiments.wanted(name):
            experiments.options_of((), run["method"], run["flags"], run["seed"])
            assert run["method"] in ("folora", "lora", *baselines.STARTS)


def test_gpu_prints_one_table(experiments, monkeypatch, capsys):
    monkeypatch.setattr(train_math, "run", lambda options, before: {
        "untouched": before or {"nll": 2.0, "drift": 0.0},
        options.method: {"nll": options.kl, "drift": options.s_min if before else 0.1}})
    experiments.main(["gpu", "--model", "tiny", "--max-steps", "1"])
    words = [line.split()[-5:] for line in capsys.readouterr().out.splitlines()]
    assert words == [["untouched", "lora", "lora-kl", "folora-paper", "folora"],
                     ["2.0000", "0.0000", "1.0000", "0.0000", "0.0000"],
                     ["0.0000", "0.1000", "0.0000", "0.3000", "0.0000"]]


# ---- the house -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, lines, code", BUDGETS)
def test_a_file_is_no_longer_than_its_budget(name, lines, code):
    """Lines of code are neither blank nor comment nor docstring."""
    text = (HERE / name).read_text()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline)
              if token.type not in skipped and token.string]
    found = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found -= set(range(node.lineno, node.end_lineno + 1))
    assert len(text.splitlines()) <= lines and len(found) <= code
    assert max(map(len, text.splitlines())) <= 100


def test_the_readme_is_short_and_its_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl"), pytest.importorskip("bitsandbytes")
    text = (HERE / "README.md").read_text()
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1380
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(ev.TINY)
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
    assert Path("runs/cats/adapter_model.safetensors").exists()


def test_the_readmes_commands_are_options_that_exist():
    text = "\n".join((HERE / name).read_text() for name in ("README.md", "assets/RESULTS.md"))
    commands = re.findall(r"train_math\.py(.*?)(?:#.*|`.*)?$", text, re.M)
    assert len(commands) > 2
    for rest in commands:
        train_math.parse_options(rest.split())
