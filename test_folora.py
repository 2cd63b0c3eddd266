"""Tests of FoLoRA, on a CPU, against scipy, numpy, torch.optim.Adam, PEFT, or a literal version."""
import ast
import contextlib
import copy
import functools
import inspect
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import accelerate
import datasets
import numpy
import peft
import pytest
import scipy.linalg
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

import eval as ev
import folora
import train_math
from assets import experiments, kill

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)
close = torch.testing.assert_close
CPU = torch.device("cpu")


def covariance(d, tokens, condition=1.0, seed=0):
    """X Xᵀ / T in float64, with X's rows scaled so that its spectrum spans about `condition`."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    scale = torch.logspace(0, -0.5 * math.log10(condition), d, dtype=torch.float64)
    X = rotation @ (scale[:, None] * torch.randn(d, tokens, generator=g, dtype=torch.float64))
    return X @ X.mT / tokens


energy = lambda rows, C: torch.trace(rows.double() @ C @ rows.double().mT).item()


def descend(model, optimizer, batches, loss_of=lambda output: output.loss):
    """The loss of each batch before the step on it."""
    losses = []
    for batch in batches:
        losses.append(loss_of(model(**batch)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


BLOCK_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


class Block(nn.Module):
    """q, k and v read one input, or k one of its own, and up flat tokens, as an expert does."""

    def __init__(self, d=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(d, d, bias=False) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x, attention_mask=None, k_reads_other=False):
        q, v, k = self.q_proj(input=x), self.v_proj(x), self.k_proj(2 * x if k_reads_other else x)
        mixed = torch.tanh(q * k + v)
        y = x + self.o_proj(mixed)
        up = torch.relu(self.up_proj(y.flatten(0, -2)))
        self.inputs = dict(zip(BLOCK_TARGETS, (x, x, x, mixed, y, up)))
        return y + self.down_proj(up).view(y.shape)


@pytest.fixture(scope="module")
def tiny():
    return ev.load_model("tiny", CPU, torch.float32)


# ---- folora.py -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_covariances_are_float32_means_of_x_xT_over_real_tokens(dtype):
    """The same tensor counts again in a new batch."""
    torch.manual_seed(0)
    model, few = Block().to(dtype), torch.randn(2, 4, 8, dtype=dtype)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 2 + [1] * 3])
    padded = {"x": torch.randn(3, 5, 8, dtype=dtype), "attention_mask": mask}
    batches = [padded, {"x": padded["x"]}, {"x": few}, {"x": few}]   # the second without a mask
    tokens = {name: [] for name in BLOCK_TARGETS}
    with torch.autocast("cpu"):                      # it would make all of them bfloat16
        ours = folora.collect_covariances(model, batches, BLOCK_TARGETS)
    for batch in batches:
        model(**batch)
        real = batch.get("attention_mask", torch.ones(batch["x"].shape[:2])).bool().flatten()
        for name, x in model.inputs.items():
            tokens[name] += x.detach().double().flatten(0, -2)[real]
    alone = folora.collect_covariances(model, batches, "q_proj")             # no other layer reads
    assert tuple(ours) == BLOCK_TARGETS and torch.equal(alone["q_proj"], ours["q_proj"])
    for name, C in ours.items():
        literal = sum(torch.outer(x, x) for x in tokens[name]) / len(tokens[name])
        close(C, literal.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [None, 3, 17])
@pytest.mark.parametrize("other", [False, True])
def test_layers_that_read_one_tensor_share_a_basis(other, k):
    model, bar = Block(), []
    inputs = [{"x": torch.randn(4, 20, 8), "k_reads_other": other}]
    C = folora.collect_covariances(model, inputs, BLOCK_TARGETS)
    bases = folora.decompose(model, C, C, 2, 0.01, k, bar.append)
    groups = " ".join("".join(basis["modules"]) for basis in bases).replace("_proj", "")
    assert groups == ("qv k o up down" if other else "qkv o up down") and sum(bar) == len(bases)
    for basis in bases:
        d = len(C[basis["modules"][0]])
        shapes = [basis[name].shape for name in ("A0", "V", "gamma")]
        assert shapes == [(2, d), (d, min(k or d, d)), (min(k or d, d),)]
    spectral = folora.attach(model, bases, 0.1).param_groups[0]["params"]
    first_readers = map(model.get_submodule, bases[0]["modules"])
    assert all(p is layer.lora_A for p, layer in zip(spectral, first_readers, strict=True))


class Sometimes(nn.Module):
    """b reads what a reads, and then something else."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x, y):
        return self.a(x).sum() + self.b(x).sum() + self.b(y).sum()


def test_a_layer_that_shares_an_input_only_sometimes_has_a_covariance_of_its_own():
    x, y, z = (torch.randn(1, n, 5) for n in (4, 7, 3))
    C = folora.collect_covariances(Sometimes(), [{"x": x, "y": y}, {"x": z, "y": x}], ["a", "b"])
    for name, read in (("a", (x, z)), ("b", (x, y, z, x))):
        X = torch.cat(read, dim=1)[0]
        close(C[name], X.mT @ X / len(X))


class Running(nn.Module):
    """Each position reads the sum of all before it, as in a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.q_proj = nn.Embedding(50, 6), nn.Linear(6, 6)

    def forward(self, input_ids, position_ids=None, attention_mask=None):
        return self.q_proj(self.embed(input_ids).cumsum(dim=1))


@pytest.mark.parametrize("first", [0, 2])               # OPT's positions begin at 2
def test_texts_are_read_as_they_are_alone_if_flattened_or_padded_on_the_left(first):
    model, rows = Running(), [[torch.randint(50, (n,)) for n in lengths]
                              for lengths in ([3, 5, 1], [1, 8])]
    positions = [torch.cat([first + torch.arange(len(text)) for text in row]) for row in rows]
    flat = {"input_ids": torch.stack([torch.cat(row) for row in rows]),
            "position_ids": torch.stack(positions), "max_length_q": 8}
    left = torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] + [1] * 8])
    twice = {"input_ids": torch.stack([flat["input_ids"][0]] * 2), "attention_mask": left[::2]}
    whole = {"input_ids": flat["input_ids"], "attention_mask": torch.ones(2, 9)}
    for batch, texts in ((flat, rows[0] + rows[1]),
                         (flat | {"attention_mask": None}, rows[0] + rows[1]),
                         ({"input_ids": torch.stack([flat["input_ids"][0]] * 3),
                           "attention_mask": left}, [flat["input_ids"][0, i:] for i in (4, 1)]),
                         (twice, [flat["input_ids"][0, i:] for i in (4, 1)]),
                         (whole, flat["input_ids"]),
                         ({"input_ids": rows[1][1][None], "position_ids": torch.arange(8)[None]},
                          rows[1][1:])):
        alone = torch.cat([model.embed(text).cumsum(dim=0) for text in texts]).detach()
        C = folora.collect_covariances(model, [batch], "q_proj")["q_proj"]
        close(C, alone.mT @ alone / len(alone))


def test_a_mask_is_used_where_it_fits_and_refused_where_it_tells_nothing():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for shape, count in (((2, 3, 4), 5), ((6, 4), 5), ((2, 1, 3, 4), 5), ((2, 4), 2)):
        x = torch.randn(shape)
        rows = folora.real_tokens(x, mask)
        close(rows, x.view(-1, 4)[mask.flatten().bool()] if count == 5 else x)
        assert len(folora.real_tokens(x, torch.ones(9, 9))) == len(x.view(-1, 4))
        assert len(folora.real_tokens(x, torch.zeros(2, 1, 3, 3))) == len(x.view(-1, 4))
    for shape in ((3, 2, 4), (1, 6, 4), (5, 4), (3, 4)):    # an expert, or another stream of tokens
        with pytest.raises(ValueError, match="give batches without padding"):
            folora.real_tokens(torch.randn(shape), mask)


def test_a_target_is_a_whole_name_or_its_end_or_every_layer_but_the_head(tiny):
    for targets in ("q_proj", ["0.q_proj"]):
        assert [*folora.find_targets(nn.Sequential(Block()), targets)] == ["0.q_proj"]
    assert len(folora.find_targets(Block(), "all-linear")) == len(BLOCK_TARGETS)
    assert folora.find_targets(tiny[0], "all-linear") == folora.find_targets(tiny[0])


def test_hooks_and_modes_are_put_back_also_when_the_forward_fails():
    model = Block().train()
    model.q_proj.register_forward_pre_hook(lambda module, args: None)
    model.o_proj.eval()                      # a mode of its own, which must survive
    with pytest.raises(TypeError):
        folora.collect_covariances(model, [{"nonsense": 1}], BLOCK_TARGETS)
    assert [len(m._forward_pre_hooks) for m in (model.q_proj, model.k_proj)] == [1, 0]
    assert model.training and model.q_proj.training and not model.o_proj.training


def test_the_owners_hooks_and_modes_are_kept_by_prepare_and_merge():
    model, seen, inputs = Block(), [], [{"x": torch.randn(2, 20, 8)}]
    model.q_proj.eval()
    model.q_proj.register_forward_pre_hook(lambda m, args, kwargs: seen.append("before"),
                                           with_kwargs=True)
    after = model.q_proj.register_forward_hook(lambda *_: seen.append("after"))
    optimizer = folora.prepare(model, inputs, inputs, 0.1, 2, target_modules="q_proj")
    for change in (lambda: None, lambda: folora.merge(model), after.remove):
        change()
        seen.clear()
        model(**inputs[0])
        assert seen == ["before", "after"][:1 if change == after.remove else 2]
        assert not model.q_proj.training
    assert optimizer.param_groups[0]["params"]


@pytest.fixture(params=[1, 2])
def threads(request):
    """Some builds of torch have a batched solver that is wrong with two threads."""
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


# (covariance's arguments for C_task, those for C_pre, tau): full rank, badly conditioned, and ranks
# of 15 and 2.
PAIRS = [((100, 500, 1e3), (100, 500, 1e3, 1), 1e-2), ((100, 500, 1e6), (100, 500, 1e6, 1), 1e-7),
         ((100, 15), (100, 20, 1, 1), 1e-5), ((100, 2), (100, 500, 1, 1), 1e-2)]


@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("tau", [1e-2, 1e-5])
@pytest.mark.parametrize("shape", [(), (8,), (4, 2)])
def test_eigenbasis_of_a_stack_against_scipy(shape, tau, k, threads):
    """Vᵀ H V = I and Vᵀ C V = Γ have one solution, but for signs and repeated eigenvalues."""
    pairs = [(covariance(*first), covariance(*second)) for first, second, _ in PAIRS]
    pairs += [(C_pre, C) for C, C_pre in pairs]
    C_task, C_pre = (torch.stack(some).view(*shape, 100, 100) if shape else some[0]
                     for some in zip(*pairs))
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, tau, k)
    d = k or 100
    assert gamma.shape == (*shape, d) and V.shape == (*shape, 100, d)
    assert (gamma.diff() <= 0).all() and (gamma >= 0).all()
    for C, P, g, v in zip(*(t.reshape(-1, *t.shape[len(shape):])
                            for t in (C_task, C_pre, gamma, V))):
        H = P + tau * torch.eye(100)
        mu = scipy.linalg.eigh(C.numpy(), H.numpy(), eigvals_only=True)      # ascending
        mu = torch.tensor(mu).flip(0)[:d]
        within = dict(rtol=0, atol=1e-7 * mu[0].item())
        close(g, mu.clamp(min=0), **within)
        close(v.mT @ H @ v, torch.eye(d).double(), rtol=0, atol=1e-7)
        close(v.mT @ C @ v, g.diag(), **within)


@pytest.mark.parametrize("first, second, tau", PAIRS)
def test_eigenbasis_of_float32_matrices_is_solved_in_float64(first, second, tau):
    C, C_pre = covariance(*first).float(), covariance(*second).float()
    kept = C_pre.clone()
    gamma, V = folora.generalized_eigenbasis(C, C_pre, tau)
    assert gamma.dtype == V.dtype == torch.float32 and torch.equal(C_pre, kept)
    H = C_pre.double() + tau * torch.eye(100)
    mu = scipy.linalg.eigh(C.double().numpy(), H.numpy(), eigvals_only=True)
    close(gamma.double(), torch.tensor(mu).flip(0), rtol=1e-6, atol=1e-6 * mu[-1])
    close(V.double().mT @ H @ V.double(), torch.eye(100).double(), rtol=0, atol=1e-4)


def test_an_eigenproblem_that_fails_is_tried_again(monkeypatch):
    """On the CPU, where a GPU's solver has failed."""
    M, eye, failure = covariance(5, 20), torch.eye(5).double(), torch.linalg.LinAlgError("GPU")
    eigh = Mock(wraps=torch.linalg.eigh, side_effect=[failure, DEFAULT])
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    gamma, V = folora.generalized_eigenbasis(M, eye, tau=1)
    assert [call.args[0].dtype for call in eigh.call_args_list] == [torch.float64] * 2
    close(V * gamma @ V.mT, eye @ M @ eye / 4)                       # H = 2 I, and eye stays I


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
    C_task, C_pre = covariance(6, 30).float(), (covariance(6, 30, seed=1).float() + 1000) / 1000
    gamma, V = folora.generalized_eigenbasis(C_task, C_pre, 0.01, request.param)
    gradients = torch.randn(4, 3, 6) * 10 ** torch.tensor([0, -1, 0.5, -8])[:, None, None]
    gate, H = folora.spectral_gate(gamma, 100.0, 0.3), C_pre.double() + 0.01 * torch.eye(6)
    return torch.randn(3, 6), gradients, V, gate, H


def dense_energy(M, H):
    """tr(M H Mᵀ), through which a gradient flows."""
    return torch.einsum("...ij,...jk,...ik->...", M, H, M)


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("start", [False, True])
def test_the_energy_of_the_update_and_its_gradients_against_autograd(start, k):
    """A stack of two layers, A anywhere in A0 + span(V), in dense float64."""
    torch.manual_seed(0)
    C_pre, C_task = (torch.stack([covariance(9, 40, seed=i + j) for i in (0, 1)]) for j in (0, 5))
    _, V = folora.generalized_eigenbasis(C_task, C_pre, 0.1, k)
    A0, H = folora.null_space(C_pre, 3), C_pre + 0.1 * torch.eye(9).double()
    A0_bar, NHN = folora.start_in_coordinates(A0, V, C_pre, 0.1)
    moves, B = torch.randn_like(A0_bar), torch.randn(2, 5, 3).double().requires_grad_()
    B0 = torch.randn(2, 5, 3).double() if start else None
    A = (A0 + moves @ V.mT).requires_grad_()
    dense = dense_energy(B @ A - (B0 @ A0 if start else 0), H)
    grad_A, grad_B = torch.autograd.grad(dense.sum() / 2, (A, B))
    found = folora.update_energy(A0_bar + moves, B.detach(), NHN, A0_bar, B0)
    for ours, theirs in zip(found, (dense.detach(), grad_A @ V, grad_B)):
        close(ours, theirs, rtol=1e-9, atol=1e-9)


class DensePenalty:
    """P by its definition, from the covariances of W0's layers."""

    def __init__(self, model, inputs, targets, w, tau=0.01):
        C_pre = folora.collect_covariances(model, inputs, targets)
        self.w, self.H, self.W0 = w, {}, {}
        for name, C in C_pre.items():
            C = C.double()
            self.H[name] = C / C.diagonal().mean() + tau * torch.eye(len(C))
            layer = model.get_submodule(name)
            self.W0[name] = getattr(layer, "base_layer", layer).weight.detach().double()

    def shares(self, model):
        """{name: R(ΔW) / R(W0)}."""
        shares = {}
        for name, W0 in self.W0.items():
            layer = model.get_submodule(name)
            W = layer.weight.double()
            for A, B, kappa in folora.factors(layer):          # none, where W itself is trained
                W = W + kappa * (B @ A).double()
            H = self.H[name]
            shares[name] = dense_energy(W - W0, H) / dense_energy(W0, H)
        return shares

    def __call__(self, model):
        return self.w / 2 * sum(self.shares(model).values())


@pytest.mark.parametrize("how", [
    dict(), dict(basis_rank=None), dict(zero_start=False, alpha=6), dict(peft={"alpha": 6}),
    dict(peft={"rank_pattern": {"k_proj": 2}})])
def test_sadam_follows_the_gradient_of_the_penalty(how):
    """Six steps with penalty=w are those of the loss plus the dense P without it. The sum of R(ΔW)
    that SAdam keeps is the dense one."""
    torch.manual_seed(0)
    how = {"rank": 3, "basis_rank": 4} | how
    pre, task = ([{"x": torch.randn(4, 20, 8) * torch.linspace(0.2, 2, 8).roll(n)}]
                 for n in (0, 3))
    block, found = Block(), []
    targets = BLOCK_TARGETS[1:] if "peft" in how else BLOCK_TARGETS      # PEFT's has no `input`
    for w in (300.0, 0.0):
        model = copy.deepcopy(block)
        if config := how.get("peft"):
            config = peft.LoraConfig(r=3, lora_alpha=config.get("alpha", 3),
                                     target_modules=list(targets),
                                     rank_pattern=config.get("rank_pattern", {}))
            model = peft.get_peft_model(model, config)
        dense = DensePenalty(model, pre, targets, 300.0)
        args = {name: value for name, value in how.items() if name != "peft"}
        optimizer = folora.prepare(model, pre, task, 0.05, target_modules=targets, penalty=w,
                                   **args)
        assert optimizer.forgetting() == 0
        for _ in range(6):
            loss = (model(**task[0]) - 1).square().mean()
            (loss if w else loss + dense(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        shares = torch.stack([*dense.shares(model).values()])
        assert shares.min() > 0
        close(optimizer.forgetting(), shares.mean().item(), rtol=1e-4, atol=0)
        found.append([p.detach() for group in optimizer.param_groups for p in group["params"]])
    for ours, theirs in zip(*found):
        close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 30.0])
def test_dense_weights_are_moved_along_v_as_in_appendix_d(w):
    """Against the literal slow version, which has the gradient of the dense P in its loss."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(50, 6) * torch.linspace(0.2, 2, 6)
    batches = [{"input": x}], [{"input": x.roll(1, 1)}]
    dense, W0 = DensePenalty(model, batches[0], ["0"], w), model[0].weight.detach().clone()
    optimizer = folora.prepare(model, *batches, 0.02, rank=2, target_modules=["0"], basis_rank=3,
                               dense=True, penalty=w)
    [group] = optimizer.param_groups
    assert [p for p in model.parameters() if p.requires_grad] == [model[0].weight]
    gradients = []
    for _ in range(4):
        loss = (model(x) - 1).square().mean()
        [G] = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
        gradients.append(G + (torch.autograd.grad(dense(model), model[0].weight)[0] if w else 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (4, 3)
    length = W0.square().sum(1).mean().sqrt().item()
    literal = literal_sadam(W0, gradients, group["basis"], group["gate"], 0.02 * length,
                            0.9, 0.999, 1e-8)
    close(model[0].weight.detach().double(), literal, rtol=1e-4, atol=1e-5)
    close(optimizer.forgetting(), dense.shares(model)["0"].item(), rtol=1e-4, atol=0)


def test_the_penalty_goes_on_from_a_state_dict_and_not_from_weights_alone(tmp_path):
    """Ā is part of the state. Without it, adapters that were loaded are not what is measured."""
    torch.manual_seed(0)
    block, inputs = Block(), [{"x": torch.randn(4, 20, 8)}]

    def prepared(w=100.0):
        model = copy.deepcopy(block)
        return model, folora.prepare(model, inputs, inputs, 0.05, 2, target_modules="q_proj",
                                     penalty=w)

    def train(model, optimizer, steps):
        for _ in range(steps):
            model(**inputs[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.forgetting()

    straight, first, second = prepared(), prepared(), prepared()
    train(*straight, 5)
    train(*first, 3)
    torch.save([part.state_dict() for part in first], tmp_path / "state")
    for part, state in zip(second, torch.load(tmp_path / "state")):
        part.load_state_dict(state)
    train(*second, 2)
    for name, p in straight[0].state_dict().items():
        assert torch.equal(p, second[0].state_dict()[name])
    for w in (100.0, 0.0):
        model, optimizer = prepared(w)
        model.load_state_dict(first[0].state_dict())
        if w:
            with pytest.raises(ValueError, match="load the optimiser's state"):
                train(model, optimizer, 1)
        else:
            assert math.isnan(train(model, optimizer, 1))


def test_without_a_weight_the_penalty_changes_no_digit():
    """And with one, the further a run is from the start, the more it is held back."""
    torch.manual_seed(0)
    block, inputs = Block(), [{"x": torch.randn(4, 20, 8)}]
    found = []
    for w in (None, 0.0, 10.0, 1000.0):
        model = copy.deepcopy(block)
        optimizer = folora.prepare(model, inputs, inputs, 0.05, 2, target_modules="q_proj",
                                   penalty=w or 0.0)
        if w is None:
            optimizer = folora.SAdam([{name: group[name] for name in ("params", "basis", "gate",
                                       "scale")} for group in optimizer.param_groups], 0.05)
        for _ in range(20):
            (model(**inputs[0]) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((model.q_proj.lora_A.detach(), optimizer))
    assert torch.equal(found[0][0], found[1][0])
    none, some, much = (optimizer.forgetting() for _, optimizer in found[1:])
    assert none > 1.5 * some > 3 * much > 0


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


def test_sadam_is_adam_without_a_basis_and_passes_what_has_no_gradient():
    torch.manual_seed(0)
    p, unused = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.ones(3, 6))
    q, gradients = nn.Parameter(p.detach().clone()), torch.randn(5, 3, 6)
    folora.SAdam([p], 0)                             # a schedule may begin so
    sadam, adam = folora.SAdam([unused, p], 0.1), torch.optim.Adam([q], 0.1)
    close(take_steps(sadam, p, gradients), take_steps(adam, q, gradients), rtol=1e-6, atol=1e-7)
    assert torch.equal(unused, torch.ones(3, 6)) and unused not in sadam.state
    assert sadam.step(lambda: p.sum().backward() or 5.0) == 5.0      # a closure and its loss
    sadam.zero_grad()
    with pytest.raises(ValueError, match="frozen or replaced the adapters after prepare"):
        sadam.step()


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
    other_rank = torch.zeros(2, V.shape[1])
    for unfit in (dict(basis=None, gate=None), dict(basis=torch.ones(6, 2)), None):
        state = copy.deepcopy(second.state_dict())
        if unfit:
            state["param_groups"][0].update(unfit)
        else:
            state["state"][0].update(exp_avg=other_rank, exp_avg_sq=other_rank)
        with pytest.raises(ValueError, match="has other bases: prepare with the same"):
            second.load_state_dict(state)
    assert torch.equal(take_steps(second, p, gradients[2:]), straight)


def test_null_space_is_scipys_bottom_eigenvectors(threads):
    """In a stack. At any scale, where one direction has nearly all, slightly indefinite, and 0."""
    C, indefinite = covariance(300, 900, 1e3), covariance(300, 20) - 1e-6 * torch.eye(300)
    # The seventh and the eighth differ by a ten-thousandth, beside one of a thousand.
    narrow = torch.tensor([1e3] + [1e-3 * (1 + 1e-4 * i) for i in range(299)]).double()
    rotation = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q
    stack = torch.stack([C, C + 200, 1e-9 * C, indefinite, 0 * C,
                         rotation * narrow @ rotation.mT]).float()
    found = folora.null_space(stack, 7)
    assert found.shape == (6, 7, 300) and found.dtype == torch.float32 and found.is_contiguous()
    for rows, one in zip(found, stack.double()):
        close(rows @ rows.mT, torch.eye(7), rtol=0, atol=1e-5)
        least = scipy.linalg.eigvalsh(one.numpy())[:7].sum()
        assert energy(rows, one) == pytest.approx(least, rel=1e-6, abs=1e-9 * one.norm().item())


def test_energy_is_the_mean_squared_length_of_the_output():
    X, M = torch.randn(2, 5, 90), torch.randn(2, 3, 5)
    close(folora.energy(M, X @ X.mT / 90), (M @ X).square().sum(1).mean(1))


def test_inputs_are_stacked_by_width_up_to_a_number_of_bytes(monkeypatch):
    """And each input's directions are those that it has alone, in the model's order."""
    widths = [8, 6, 8, 8, 6, 8]
    pre, task = ({f"layer{i}": covariance(d, 50, seed=i + j).float() for i, d in enumerate(widths)}
                 for j in (0, 10))
    monkeypatch.setattr(folora, "STACK_BYTES", 3 * 8 * 8 * 8)
    monkeypatch.setattr(folora, "eigh", eigh := Mock(wraps=folora.eigh))
    model = nn.ModuleDict({f"layer{i}": nn.Linear(d, 5) for i, d in enumerate(widths)})
    bases = folora.decompose(model, pre, task, 2, 0.1, 4, (bar := []).append)
    shapes = [tuple(call.args[0].shape) for call in eigh.call_args_list]
    assert shapes == [(n, d, d) for n, d in ((3, 8), (1, 8), (2, 6)) for _ in range(2)]
    assert bar == [3, 1, 2]
    for name, basis in zip(pre, bases, strict=True):
        assert basis["modules"] == [name]
        alone, = folora.decompose(model, {name: pre[name]}, {name: task[name]}, 2, 0.1, 4)
        for key in ("gamma", "V", "A0", "A0_bar", "NHN", "W0_energy"):
            close(basis[key].abs(), alone[key].abs(), rtol=1e-4, atol=1e-5)
            assert basis[key].untyped_storage().nbytes() == basis[key].nbytes


def test_layers_that_share_only_pretraining_inputs_have_bases_of_their_own():
    shared, task = covariance(6, 40).float(), [covariance(6, 40, seed=i).float() for i in (1, 2)]
    model = nn.ModuleDict({name: nn.Linear(6, 3) for name in "ab"})
    bases = folora.decompose(model, {"a": shared, "b": shared}, dict(zip("ab", task)), 2)
    assert [basis["modules"] for basis in bases] == [["a"], ["b"]]
    assert not torch.allclose(bases[0]["gamma"], bases[1]["gamma"])


def test_all_processes_get_the_first_ones_bases(monkeypatch):
    given = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", given.append)
    inputs = [{"x": torch.randn(2, 20, 8)}]
    folora.prepare(Block(), inputs, inputs, 0.1, 2, target_modules="q_proj")
    assert [basis["modules"] for bases in given for basis in bases] == [["q_proj"]]


@pytest.mark.parametrize("made, wanted", [
    (dict(rank=3, basis_rank=5), dict(rank=3, basis_rank=5)),
    (dict(rank=3, basis_rank=None), dict(rank=2, basis_rank=4, lam=3.0, lr=0.2, alpha=8, s_min=0.1,
                                         penalty=2.0, zero_start=False))])
def test_what_was_prepared_once_serves_other_settings(made, wanted, tmp_path):
    """Without a batch, and as if it had been prepared for them. Each basis is cut in two ways."""
    torch.manual_seed(0)
    block, cache = Block(), tmp_path / "prepared.pt"
    inputs = [[{"x": torch.randn(2, 40, 8) * torch.linspace(0.2, 2, 8).roll(n)}] for n in (0, 3)]
    common = dict(target_modules=BLOCK_TARGETS)
    folora.prepare(copy.deepcopy(block), *inputs, 0.1, **made, **common, cache=cache)
    assert [path.name for path in tmp_path.iterdir()] == ["prepared.pt"]
    assert torch.load(cache)["folora"]["tokens of text and task"] == [0, 0]  # they are not text
    wanted = dict(lr=0.1) | wanted
    models = [copy.deepcopy(block) for _ in range(2)]
    found = [folora.prepare(models[0], (), (), **wanted, **common, cache=cache),
             folora.prepare(models[1], *inputs, **wanted, **common)]
    for ours, theirs in zip(*(optimizer.param_groups for optimizer in found)):
        for name in ("A0_bar", "NHN", "basis", "gate", "A0_mark"):
            if ours[name] is not None:
                close(ours[name].abs(), theirs[name].abs(), rtol=1e-3, atol=1e-4)
        for name in ("lr", "scale", "shares", "partners", "penalty"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    x = torch.randn(3, 8)
    close(models[0](x), models[1](x), rtol=1e-3, atol=1e-3)


def test_layers_that_are_prepared_in_parts_have_the_same_bases(trajectory, monkeypatch, tmp_path):
    """And of C_pre and C_task there is a third at a time."""
    model, _, inputs, _ = trajectory
    made, found = [], []
    note = lambda model, C, *more, **how: made.append(len(C)) or DEFAULT
    monkeypatch.setattr(folora, "decompose", Mock(wraps=folora.decompose, side_effect=note))
    for passes in (1, 3):
        optimizer = prepare_on(copy.deepcopy(model), inputs, rank=8, passes=passes,
                               cache=tmp_path / f"{passes}.pt")
        found.append(torch.load(tmp_path / f"{passes}.pt"))
    whole, *thirds = made
    assert len(thirds) == 3 and sum(thirds) == whole and max(thirds) < whole / 2
    bases = [{basis["modules"][0]: basis for basis in one["bases"]} for one in found]
    assert bases[0].keys() == bases[1].keys() and len(optimizer.param_groups) > 8
    for name, basis in bases[0].items():
        close(basis["gamma"], bases[1][name]["gamma"], rtol=1e-4, atol=1e-5)
    text = inputs[:len(inputs) // 2]
    count = sum(int(batch["attention_mask"].sum()) for batch in text)
    assert found[0]["folora"]["tokens of text and task"][0] == count
    with pytest.raises(ValueError, match="passes=2 reads the batches 2 times: give lists"):
        folora.prepare(copy.deepcopy(model), iter(inputs), inputs, 0.1, 2, passes=2)


@pytest.mark.parametrize("how, message", [
    (dict(tau=0.02), "tau is 0.01 there"), (dict(rank=4), "the rank is 3 there"),
    (dict(basis_rank=6), "basis_rank is 5"), (dict(basis_rank=None), "basis_rank is 5"),
    (dict(target_modules=["q_proj"]), "there are 2 layers, such as o_proj"),
    (dict(other=True), "the weights are another model's"), (dict(broken=b"{}"), "cannot be read"),
    (dict(broken=b""), "cannot be read"), (dict(broken={}), "does not hold what folora.prepare")])
def test_what_was_prepared_for_something_else_is_refused(how, message, tmp_path):
    torch.manual_seed(0)
    how = dict(how)
    block, cache, inputs = Block(), tmp_path / "prepared.pt", [{"x": torch.randn(2, 40, 8)}]
    common = dict(rank=3, basis_rank=5, target_modules=["q_proj", "o_proj"], lr=0.1, cache=cache)
    folora.prepare(copy.deepcopy(block), inputs, inputs, **common)
    if how.pop("other", None):
        block.o_proj.weight.data *= 1.1
    broken = how.pop("broken", None)
    if isinstance(broken, dict):
        torch.save(broken, cache)
    elif broken is not None:
        cache.write_bytes(broken)
    with pytest.raises(ValueError, match=message):
        folora.prepare(block, (), (), **common | how)
    assert not any(isinstance(m, folora.LoRALinear) for m in block.modules())


def test_covariances_are_in_mean_eigenvalues():
    """And an input that is always 0 stays 0."""
    C = torch.stack([covariance(6, 40), 100 * covariance(6, 40), torch.zeros(6, 6)])
    unit = folora.unit_energy(C)
    close(torch.linalg.eigvalsh(unit).mean(-1), torch.tensor([1.0, 1.0, 0.0]).double())
    close(unit[0], unit[1])


def test_an_input_that_is_always_0_is_said_and_the_rest_is_trained():
    """On the task, or on all text."""
    x, zero = torch.randn(2, 30, 5), torch.zeros(2, 30, 5)
    for pre in (x, zero):
        model = Sometimes()
        a, b = model.a.weight.clone(), model.b.weight.clone()
        with pytest.warns(UserWarning, match="^a: the input is always 0 on the task"):
            optimizer = folora.prepare(model, [{"x": pre, "y": x}], [{"x": zero, "y": x}], 0.1, 2,
                                       target_modules=["a", "b"])
        gates = [group["gate"] for group in optimizer.param_groups if group["basis"] is not None]
        assert not gates[0].any() and gates[1].max() > 0.3
        descend(model, optimizer, [{"x": zero, "y": x}] * 3, lambda output: output)
        folora.merge(model)
        assert torch.equal(model.a.weight, a) and not torch.equal(model.b.weight, b)
        assert model.a.weight.isfinite().all() and model.b.weight.isfinite().all()


def test_prepare_is_its_parts_literally():
    """One layer by hand in float64, every option at a value of its own. The pretraining inputs are
    in 10 of 16 dimensions, the task's in 4 of those and 4 others."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    pre, task = torch.randn(400, 10) @ rotation[:10], torch.randn(300, 8) @ rotation[6:14]
    model, k = Block(16), 5
    W0, before = model.q_proj.weight.detach().clone().double(), model(task)
    a, b = folora.prepare(model, [{"x": pre}], [{"x": 100 * task}], 0.1, rank=3, alpha=6,
                          tau=0.05, lam=2.0, s_min=0.6, target_modules="q_proj", zero_start=False,
                          basis_rank=k, scale_lr_B=False).param_groups
    layer = model.q_proj
    close(model(task), before, rtol=1e-4, atol=1e-4)
    unit = lambda X: X.mT.double() @ X.double() / (X.double() ** 2).sum() * X.shape[1]
    C_pre, C_task = unit(pre), unit(task)    # the task's factor of 100 divides out
    gamma, V = scipy.linalg.eigh(C_task.numpy(), C_pre.numpy() + 0.05 * numpy.eye(16))
    gamma, V = torch.tensor(gamma).flip(0)[:k], torch.tensor(V).flip(1)[:, :k]
    assert (a["lr"], b["lr"], b["basis"], a["scale"], b["scale"]) == (0.1, 0.1, None, 1.0, 1.0)
    assert len(a["gate"]) == k
    assert a["params"] == [layer.lora_A] and b["params"] == [layer.lora_B]
    assert [p for p in model.parameters() if p.requires_grad] == a["params"] + b["params"]
    gate = torch.clamp(gamma / (gamma + 2.0), min=0.6)
    assert gate.min() == 0.6 < gate.max()
    close((a["basis"] * a["gate"] @ a["basis"].mT).double(), V * gate @ V.mT, rtol=1e-2, atol=1e-2)
    A0 = layer.lora_A.detach().double()
    assert A0.shape == (3, 16) and energy(A0, C_pre) < 1e-5          # 16 - 10 null directions
    close(2.0 * layer.lora_B.detach().double(), W0 @ A0.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, wanted", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_adapters_are_float32_bases_may_be_bfloat16_and_merge_rounds_once(dtype, wanted, tmp_path):
    model, C = nn.ModuleDict({"f": nn.Linear(16, 12).to(dtype)}), covariance(16, 40).float()
    bases = folora.decompose(model, {"f": C}, {"f": C}, 4)
    optimizer = folora.attach(model, bases, lr=0.1, alpha=8)
    layer, before = model["f"], model["f"].weight.double()
    assert optimizer.param_groups[0]["basis"].dtype == wanted
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(5, 16, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))   # B = 0
    assert layer.bias.any() and layer(x).dtype == dtype
    folora.save_adapter(model, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type is None     # it cannot generate
    W = before + 2 * nn.init.normal_(layer.lora_B).double() @ layer.lora_A.double()
    merged = folora.merge(model)["f"]
    assert type(merged) is nn.Linear and not merged.weight.requires_grad
    assert (merged.weight == W.to(dtype)).float().mean() > 0.98 and merged.bias is layer.bias


@pytest.mark.parametrize("distinct, n, equal, rejected", [
    (99, 31, 0, 1), (99, 32, 0, 0), (40, 40, 20, 1), (40, 40, 19, 0), (15, 127, 0, 0),
    (15, 128, 0, 1), (16, 128, 0, 0), (23, 200, 0, 1), (24, 200, 0, 0), (60, 255, 0, 0),
    (63, 256, 0, 1), (64, 256, 0, 0), (63, 259, 0, 1), (64, 259, 0, 0)])
def test_screen_rejects_degenerate_text_and_nothing_just_short_of_it(distinct, n, equal, rejected):
    """n tokens that go round so many distinct ones, and then so many equal ones."""
    assert folora.is_degenerate([i % distinct for i in range(n)] + [777] * equal) == rejected


class FakeGenerator(nn.Module):
    """Stands in for a language model: `generate` returns what `script` says, or random tokens."""

    def __init__(self, script=lambda: torch.randint(3, 9999, (40,)).tolist(), **config):
        super().__init__()
        self.device, self.script, self.calls = CPU, script, []
        tokens = dict(eos_token_id=None, bos_token_id=None)
        self.generation_config = SimpleNamespace(**tokens | config)

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
    script = map(lambda i: [3 + i, *range(10 ** 6, 10 ** 6 + 39)], range(10 ** 6)).__next__
    model, bar, share = FakeGenerator(script), [], Counter()
    texts = sample(model, 2000, 60, 60, bos=None, batch_size=128, progress=bar.append)
    assert len(texts) == 2000 and bar == [1] * 2000 and model.training
    written = [text[1] for text in texts]
    assert sorted(written[:500]) != sorted(written)[:500]            # a slice is a sample
    assert all(len(text) == 41 and text[0] == 2 for text in texts)   # EOS, for want of a BOS
    for call in model.calls:
        assert call["do_sample"] and call["count"] <= 128 and call["eos_token_id"] == [2]
        assert (call["min_new_tokens"], call["max_new_tokens"]) == (60, 60)
        share[call["temperature"], call["top_p"], call["top_k"]] += call["count"] / 2000
    mixture = {(1.0, 1.0, 0): 0.7, (1.0, 0.95, 0): 0.2, (1.2, 0.98, 50): 0.1}
    assert share == pytest.approx(mixture, abs=0.04) and len(model.calls) <= 2 * 3 + 2000 // 128


def test_sampling_replaces_rejects_and_duplicates_until_there_are_too_many():
    """It gives up after 64 rejects, and ten more for each accepted text."""
    good = lambda k: list(range(k, k + 50))
    queue = [good(10), good(10), [5] * 50, good(70), good(3000)[:20], good(130) + [2, 7, 7],
             good(190) + [8, 9], good(250), good(310), good(370)]
    model = FakeGenerator(lambda: queue.pop(0) if queue else [5] * 50, eos_token_id=[2, 8],
                          bos_token_id=6)
    texts = sample(model, 4, 32, 64, bos=None)                       # each ends before its EOS
    assert sorted(texts) == [[6] + good(k) for k in (10, 70, 130, 190)]
    assert model.calls[0]["eos_token_id"] == [2, 8] == model.generation_config.eos_token_id
    queue[:] = good(10), good(70)
    with pytest.raises(RuntimeError, match="91 samples were rejected and 2 accepted"):
        sample(model, 100)
    assert model.training
    for rejects, enough in ((84, True), (85, False)):                # 64 + 10 · 2
        queue[:] = [good(10), good(70), *[[5] * 50] * rejects, good(130)]
        with contextlib.nullcontext() if enough else pytest.raises(RuntimeError, match="85 samp"):
            assert len(sample(model, 3, batch_size=1)) == 3


def test_sampling_from_a_real_model_is_plain_whatever_it_is_configured_for(tiny):
    """It has a seed of its own, and leaves the global generator as it was."""
    (model, tokenizer), texts = copy.deepcopy(tiny), []
    odd = dict(repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.9, num_beams=2,
               bos_token_id=9)
    for seed in (0, 0, 1):
        state = torch.manual_seed(len(texts)).get_state()
        texts.append(folora.sample_calibration(model, tokenizer, 6, 60, 70, seed=seed))
        assert torch.equal(state, torch.random.get_rng_state())
        vars(model.generation_config).update(odd)
    assert odd.items() <= vars(model.generation_config).items()
    assert not all(map(torch.equal, texts[0], texts.pop()))
    for text, again in zip(*texts, strict=True):
        assert text[0] == tokenizer.bos_token_id and 61 <= len(text) <= 71
        assert tokenizer.eos_token_id not in text and torch.equal(text, again)


# ---- other people's models: PEFT, Trainer, quantised bases ---------------------------------------
SOME = ("q_proj", "v_proj", "down_proj")
SAME = dict(rtol=1e-5, atol=1e-5)
load_model = functools.partial(transformers.AutoModelForCausalLM.from_pretrained,
                               dtype=torch.float32)


def word_problems(tokenizer, count):
    rows = ev.read_rows(str(ev.TINY / "train.jsonl"), limit=count)
    return ev.encode_all(tokenizer, ev.to_pairs(rows, "train"), 256)


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
    return model, batches, inputs, descend(ours, optimizer, batches)


@pytest.mark.parametrize("config, same", [           # same: as with LoRALinear
    ({}, True), (dict(use_rslora=True, lora_alpha=2 * 8 ** 0.5), True),
    (dict(init_lora_weights="gaussian"), True), (dict(lora_dropout=0.5), True),
    (dict(rank_pattern={"q_proj": 4, "down_proj": 200}), False), (dict(use_dora=True), False),
    (dict(lora_bias=True), False), (dict(modules_to_save=["lm_head"]), False)])
def test_pefts_adapters_are_trained_as_ours(config, same, trajectory):
    model, batches, inputs, expected = trajectory
    theirs = wrapped(model, **config)
    before = theirs(**batches[0]).loss
    for p in theirs.parameters() if same else ():              # prepare makes it float32
        p.data = p.data.bfloat16() if p.requires_grad else p.data
    optimizer = prepare_on(theirs, inputs)
    close(theirs.eval()(**batches[0]).loss, before, **SAME)                # the start is the base
    if "rank_pattern" in config:                       # a smaller rank has the first rows of A0
        layer = theirs.base_model.model.model.layers[0].self_attn
        q, v = (module.lora_A["default"].weight for module in (layer.q_proj, layer.v_proj))
        assert len(q) == 4 and torch.equal(q, v[:4])
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, grouped)} == {id(p) for p in theirs.parameters() if p.requires_grad}
    found = descend(theirs, optimizer, batches)
    assert theirs(**batches[0]).loss < before
    if same:
        close(found, expected, **SAME)
    elif "rank_pattern" not in config:                                     # the rest is trained too
        assert optimizer.param_groups[-1]["scale"] == 0.1


@pytest.mark.parametrize("wrap, alpha, kappa, size", [
    (0, None, 1, 1), (0, 12.0, 3, 1), (1, None, 3, 1), (0, None, 1, 0)])
def test_a_step_of_b_is_measured_in_lengths_of_w0s_rows(wrap, alpha, kappa, size):
    """So that one learning rate serves every weight, but 0, and every κ, whatever the bias is."""
    model = nn.Sequential(nn.Linear(16, 32, dtype=torch.bfloat16))
    nn.init.constant_(model[0].bias, 100.0)
    model[0].weight.data *= size
    length = model[0].weight.float().norm(dim=1).square().mean().sqrt().item() or 1
    model = wrapped(model, r=4, lora_alpha=12, target_modules=["0"]) if wrap else model
    inputs = [{"input": torch.randn(90, 16, dtype=torch.bfloat16)}]
    optimizer = folora.prepare(model, inputs, inputs, 1e-2, 4, alpha, target_modules="0")
    assert optimizer.param_groups[1]["scale"] == pytest.approx(length / (4 ** 0.5 * kappa))


@pytest.mark.parametrize("kind, more", [("gpt2", {}), ("bert", dict(intermediate_size=32))])
def test_gpt2s_conv1d_and_an_encoder_with_a_pooler_are_prepared(kind, more):
    size = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, vocab_size=50)
    config = transformers.AutoConfig.for_model(kind, **size, **more)
    theirs = wrapped(transformers.AutoModel.from_config(config), target_modules="all-linear")
    ids = [dict(input_ids=torch.randint(50, (4, 20)), attention_mask=torch.ones(4, 20).tril(9))] * 8
    optimizer = prepare_on(theirs, ids)
    before = theirs(**ids[0])[0]
    descend(theirs, optimizer, ids[:1], lambda output: output[0].square().mean())
    assert (theirs(**ids[0])[0] - before).abs().max() > 1e-4


@pytest.mark.parametrize("zero_start", [True, False])
def test_an_adapter_knows_the_untouched_base_and_is_loaded_on_it(zero_start, trajectory, tmp_path):
    model, batches, inputs, _ = trajectory
    ours, untouched = copy.deepcopy(model), model(**inputs[0]).logits
    optimizer = prepare_on(ours, inputs, rank=8, alpha=16, zero_start=zero_start)
    descend(ours, optimizer, batches)
    texts = [batch["input_ids"][0] for batch in inputs[:2]]
    kl = train_math.kl_from_untouched(ours, [text.tolist() for text in texts])
    literal = literal_kl(model, ours, texts) * sum(len(text) - 1 for text in texts)
    close(kl, literal.float(), rtol=1e-3, atol=1e-5)
    folora.save_adapter(nn.ModuleDict({"module": torch.compile(ours)}), tmp_path)       # wrapped
    assert (tmp_path / "adapter_model.safetensors").read_bytes()[0] % 8 == 0           # aligned
    ours.save_pretrained(tmp_path / "whole")                               # without the adapters
    alone = load_model(tmp_path / "whole")(**inputs[0]).logits
    assert torch.allclose(alone, untouched, atol=1e-4) == zero_start
    expected = folora.merge(ours)(**inputs[0]).logits
    for loaded in (peft.PeftModel.from_pretrained(load_model(ev.TINY), tmp_path),
                   load_model(tmp_path)):
        close(loaded(**inputs[0]).logits, expected, rtol=1e-4, atol=1e-4)


class Nested(nn.Module):
    """A name that ends in another's."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.inner = nn.Linear(16, 16), nn.Sequential()
        self.inner.q_proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.inner(self.q_proj(x))


class ValueHead(nn.Module):
    """A wrapper as in reinforcement learning."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.value = inner, nn.Linear(16, 1)

    def forward(self, x):
        return self.value(self.inner(x))


def test_a_peft_model_is_found_inside_a_wrapper_or_without_its_class():
    inputs = [{"x": torch.randn(2, 30, 16)}]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    for inner in (wrapped(Nested(), target_modules=["q_proj"]),
                  peft.inject_adapter_in_model(config, Nested())):
        model = ValueHead(inner)
        *ours, others = folora.prepare(model, inputs, inputs, 0.1).param_groups
        assert others["params"] == [*model.value.parameters()] and others["scale"] == 0.1
        trained = {id(p) for group in (*ours, others) for p in group["params"]}
        assert trained == {id(p) for p in model.parameters() if p.requires_grad}
        with pytest.raises(ValueError, match="merge_and_unload"):
            folora.merge(model)


@pytest.mark.parametrize("rebuild", ["from the class", "reloaded"])
def test_merge_and_save_find_adapters_of_a_reloaded_folora(rebuild, tmp_path, monkeypatch):
    inputs = [{"x": torch.randn(2, 30, 16)}]
    model = Block(16)
    folora.prepare(model, inputs, inputs, 0.1, 2, target_modules="q_proj")
    nn.init.normal_(model.q_proj.lora_B)
    wanted = model(**inputs[0])
    if rebuild == "reloaded":                            # as importlib.reload leaves it
        monkeypatch.setattr(folora, "LoRALinear", type("LoRALinear", (nn.Linear,), {}))
    folora.save_adapter(model, tmp_path)
    close(folora.merge(model)(**inputs[0]), wanted, **SAME)
    assert type(model.q_proj) is nn.Linear
    with pytest.raises(ValueError, match="no LoRALinear is here"):
        folora.merge(model)


@pytest.mark.parametrize("zero_start, alpha", [(True, 6), (True, None), (False, 6)])
def test_layers_of_different_rank_and_alpha_are_saved_as_peft_has_them(zero_start, alpha, tmp_path):
    model, C = Nested(), {"q_proj": covariance(16, 40).float()}
    base = copy.deepcopy(model)
    bases = folora.decompose(model, C, C, 3) + [
        basis | {"modules": ["inner.q_proj"]} for basis in folora.decompose(model, C, C, 5)]
    folora.attach(model, bases, 0.1, alpha, zero_start=zero_start)
    for layer in (model.q_proj, model.inner.q_proj):
        nn.init.normal_(layer.lora_B)
    folora.save_adapter(model, tmp_path)
    loaded, x = peft.PeftModel.from_pretrained(base, tmp_path), torch.randn(7, 16)
    close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


def small(kind, **options):
    """A transformer of a few thousand weights, the same at each call."""
    torch.manual_seed(0)
    config = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    config = transformers.AutoConfig.for_model(kind, **config | options)
    auto = {"t5": transformers.AutoModelForSeq2SeqLM, "whisper": transformers.AutoModel}
    return auto.get(kind, transformers.AutoModelForCausalLM).from_config(config).float().eval()


def test_an_encoder_decoder_is_prepared_without_padding_and_saved_for_peft(tmp_path):
    make = partial(small, "t5", d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                   decoder_start_token_id=0)
    base, q = make(), "decoder.block.0.layer.0.SelfAttention.q"
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    batch = {name: torch.randint(3, 64, (2, 9)) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones(2, 9)
    model.get_submodule(q).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    seen = []
    C = folora.collect_covariances(model, [batch], [q])[q]
    rows = seen[0].flatten(0, 1)
    close(C, rows.mT @ rows / 18)
    for name, padding in (("attention_mask", 0), ("decoder_attention_mask", 0), ("labels", -100)):
        padded = batch[name].clone() if name in batch else torch.ones(2, 9)
        padded[0, 4:] = padding
        with pytest.raises(ValueError, match=f"^{name} has padding.*give batches without padding"):
            folora.collect_covariances(model, [batch | {name: padded}], [q])
    optimizer = folora.prepare(model, [batch], [batch], 0.1, 2, target_modules=["q", "v"])
    descend(model, optimizer, [batch] * 3)
    folora.save_adapter(model, tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    close(loaded(**batch).logits, model(**batch).logits, **SAME)
    assert (loaded(**batch).logits - base(**batch).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="sampling needs a decoder-only model"):
        folora.sample_calibration(model, None, 2)


def test_an_adapter_that_peft_would_drop_is_merged_and_one_that_it_loads_is_saved(tmp_path):
    """PEFT 0.21 looks for gate_proj, up_proj and down_proj in the experts, which are fused. It does
    not in Llama 4, of which it loads all."""
    llama4 = partial(small, "llama4_text", head_dim=8, num_local_experts=2,
                     intermediate_size_mlp=32, interleave_moe_layer_step=2)
    qwen3 = partial(small, "qwen3_moe", head_dim=8, num_experts=4, num_experts_per_tok=2,
                    moe_intermediate_size=8, mlp_only_layers=[0], decoder_sparse_step=1)
    batches = [{"input_ids": torch.randint(64, (2, 9))}] * 2
    for make, targets in ((llama4, folora.TARGET_MODULES), (qwen3, ("q_proj", "v_proj")),
                          (qwen3, folora.TARGET_MODULES)):
        model = make()
        optimizer = folora.prepare(model, batches, batches, 0.1, 2, target_modules=targets)
        descend(model, optimizer, batches, lambda output: output.logits.square().mean())
        if make == llama4 or len(targets) == 2:
            folora.save_adapter(model, tmp_path)
            loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
            close(loaded(**batches[0]).logits, model(**batches[0]).logits, **SAME)
    with pytest.raises(ValueError, match="PEFT would not load .*gate_proj.*merge.model"):
        folora.save_adapter(model, tmp_path)
    wanted = model(**batches[0]).logits
    close(folora.merge(model)(**batches[0]).logits, wanted, **SAME)


@pytest.mark.parametrize("package, how", [
    ("bitsandbytes", lambda _: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    ("bitsandbytes", lambda _: transformers.BitsAndBytesConfig(load_in_4bit=True,
                                                               bnb_4bit_quant_type="nf4")),
    ("torchao.quantization", lambda ao: transformers.TorchAoConfig(ao.Int8WeightOnlyConfig()))])
def test_a_quantised_base_is_trained_through_peft(package, how, trajectory):
    _, batches, inputs, expected = trajectory
    model = load_model(ev.TINY, quantization_config=how(pytest.importorskip(package)))
    with pytest.raises(ValueError, match="q_proj is quantised .use get_peft"):
        folora.find_targets(model)
    theirs = wrapped(model)
    optimizer = prepare_on(theirs, inputs)
    close(descend(theirs, optimizer, batches), expected, rtol=0.05, atol=0)
    theirs.bfloat16()                                    # as TRL does with a quantised base
    theirs(**batches[0]).loss.backward()
    with pytest.raises(ValueError, match="cast to torch.bfloat16.*p.data.float"):
        optimizer.step()


def test_sfttrainer_resumes_to_the_same_weights_and_takes_no_other_optimiser(tiny, trajectory,
                                                                             tmp_path):
    """Six steps with a checkpoint after three."""
    trl = pytest.importorskip("trl")
    rows = [{"prompt": f"{n} + 8 =", "completion": f" {n + 8}"} for n in range(24)]
    rows = datasets.Dataset.from_list(rows)

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


partial, nan = functools.partial, math.nan
I3, ADAPTED, TIED = torch.eye(3), Block(16), Block(16)
ADAPTED.q_proj, TIED.again = folora.LoRALinear(ADAPTED.q_proj, torch.eye(2, 16)), TIED.q_proj
IA3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
PEFTS, TWO = (wrapped(Block(16), target_modules=["q_proj"]) for _ in range(2))
TWO.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
TWO.base_model.set_adapter(["default", "second"])
PROMPTS = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
PRUNED, NORMED, WEIGHT, OWN, CONV, META = (Block(16) for _ in range(6))
prune.l1_unstructured(PRUNED.q_proj, "weight", 0.5)
nn.utils.parametrizations.weight_norm(NORMED.q_proj)
nn.utils.weight_norm(WEIGHT.q_proj)
OWN.q_proj.forward = OWN.q_proj.forward
CONV.q_proj = transformers.pytorch_utils.Conv1D(16, 16)
META.q_proj.to("meta")
SUBCLASS = Block(16)
SUBCLASS.q_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
FAST = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1)
HALF = wrapped(Block(16).bfloat16(), target_modules=["q_proj"], modules_to_save=["k_proj"])
BASES = folora.decompose(Block(16), {"q_proj": torch.eye(16)}, {"q_proj": torch.eye(16)}, 2)
decompose = partial(folora.decompose, None)
UNREAD = map(pytest.fail, ["a forward pass was about to run"])
collect = partial(folora.collect_covariances, Block(), batches=(), target_modules=BLOCK_TARGETS)
prepare = partial(folora.prepare, model=Block(16), pretrain_batches=UNREAD, task_batches=UNREAD,
                  lr=0.1, rank=2, target_modules="q_proj")
REFUSED = [                                  # (message, call, options that are wrong, others, ...)
    ("rank .* is not from 1 to 16, q_proj's width", prepare, dict(rank=17), dict(rank=0)),
    ("no nn.Linear is called (gate_proj|proj): there are .'down_proj', 'k_", collect,
     dict(target_modules="proj"), dict(target_modules=(*BLOCK_TARGETS, "gate_proj"))),
    ("no nn.Linear is called all-linear", folora.find_targets,
     dict(model=nn.Embedding(9, 8), target_modules="all-linear")),
    ("q_proj shares its weight with again.weight", prepare, dict(model=TIED)),
    ("q_proj has a computed weight", prepare, dict(model=PRUNED), dict(model=WEIGHT)),
    ("q_proj is parametrised", prepare, dict(model=NORMED)),
    ("q_proj has a forward of its own", prepare, dict(model=OWN)),
    ("q_proj has no numbers yet", prepare, dict(model=META)),
    ("q_proj is a NonDynamicallyQuantizableLinear, no plain", prepare, dict(model=SUBCLASS)),
    ("q_proj is a Conv1D, no plain nn.Linear: get_peft_model may", prepare, dict(model=CONV)),
    ("linear1 may not be called: TransformerEncoderLayer reads its weight", prepare,
     dict(model=FAST, target_modules="linear1"),
     dict(model=wrapped(FAST, target_modules=["linear1"]))),
    ("out_proj may not be called: MultiheadAttention reads", prepare,
     dict(model=FAST, target_modules="out_proj")),
    ("out_proj may not be called: Mamba2Mixer reads its weight itself", prepare,
     dict(model=small("mamba2", num_heads=4, head_dim=8, n_groups=1), target_modules="out_proj")),
    ("k_proj.* would be trained in torch.bfloat16.*load the model in float32", prepare,
     dict(model=HALF)),
    ("a batch is a dict for model.*not a Tensor", collect, dict(batches=[torch.ones(9)])),
    ("a batch is a dict for model.*not a str", collect, dict(batches={"input_ids": I3})),
    ("input_ids must be a tensor .batch, length.", collect, dict(batches=[{"input_ids": [5, 6]}]),
     dict(batches=[{"input_ids": I3[0]}]), dict(batches=[{"question": "q", "answer": "a"}])),
    ("an attention_mask .3, 2. does not fit input_ids .3, 3.", collect,
     dict(batches=[{"input_ids": I3, "attention_mask": I3[:, :2]}])),
    ("(lr|scale) must be a number from 0 on", partial(folora.SAdam, [nn.Parameter(I3)]),
     dict(lr=-1), dict(lr=nan), dict(lr=math.inf)),
    ("betas must be from 0 to 1, without 1", partial(folora.SAdam, [nn.Parameter(I3)], 0.1),
     dict(betas=(0.9, 1.0)), dict(betas=(nan, 0.9)), dict(betas=(-0.1, 0.9))),
    ("eps must be a positive number", partial(folora.SAdam, [nn.Parameter(I3)], 0.1),
     dict(eps=0), dict(eps=nan), dict(eps=-1), dict(eps=math.inf)),
    ("a basis .3, 2. with a gate .3,. does not fit a parameter .3, 3.", folora.SAdam,
     dict(params=[{"params": [nn.Parameter(I3)], "basis": I3[:, :2], "gate": I3[0]}], lr=1)),
    ("(lr|alpha|lam) must be a positive number", partial(folora.attach, Block(16), BASES),
     dict(lr=-1), dict(lr=nan), dict(lr=1, alpha=-1), dict(lr=1, lam=math.inf)),
    ("s_min must be", partial(folora.attach, Block(16), BASES, 1), dict(s_min=nan)),
    ("q_proj has the width 8, and 16 in its basis", folora.attach,
     dict(model=Block(8), bases=BASES, lr=1)),
    ("q_proj shares its weight with again", folora.attach, dict(model=TIED, bases=BASES, lr=1)),
    ("q_proj has the width None", folora.attach, dict(model=nn.Module(), bases=BASES, lr=1)),
    ("q_proj has an adapter from before", folora.attach, dict(model=ADAPTED, bases=BASES, lr=1)),
    ("there are no bases", folora.attach, dict(model=Block(), bases=[], lr=1)),
    ("(tau|basis_rank) must be a positive", partial(decompose, {"a": I3}, {"a": I3}, 2),
     dict(tau=0), dict(tau=nan), dict(tau=math.inf), dict(basis_rank=-1)),
    ("rank (0|4|-1) is not from 1 to 3, a's width", partial(decompose, {"a": I3}, {"a": I3}),
     dict(rank=0), dict(rank=4), dict(rank=-1)),
    ("(a|b)'s C_pre and C_task are of shapes", partial(decompose, {"a": I3}, rank=1),
     dict(C_task={"b": I3}), dict(C_task={"a": torch.eye(2)})),
    ("q_proj has read no token: leave it out", collect, dict(batches=[]), dict(
        batches=[{"x": torch.ones(1, 2, 8), "attention_mask": torch.zeros(1, 2)}])),
    ("q_proj reads numbers that are not finite", collect,
     dict(batches=[{"x": nan * torch.ones(1, 2, 8)}])),
    ("input is not positive-definite", partial(folora.generalized_eigenbasis, I3, tau=0.1),
     dict(C_pre=-I3), dict(C_pre=nan * I3)),
    ("(lr|tau|lam|alpha|basis_rank) must be a (positive |whole )*number, not", prepare,
     dict(lr=-1), dict(lr=nan), dict(lr=math.inf), dict(lr="3e-3"), dict(lr=None), dict(tau=0),
     dict(lam=0), dict(lam=nan), dict(basis_rank=0), dict(basis_rank=1.5), dict(alpha=-1)),
    ("s_min must be from 0 to 1, not", prepare, dict(s_min=1.1), dict(s_min=nan)),
    ("rank 2.0 is not from 1 to 16", prepare, dict(rank=2.0)),
    ("target_modules names no layer", prepare, dict(target_modules=())),
    ("PEFT's own models have", partial(folora.save_adapter, directory="/dev/null"),
     dict(model=Block())),
    ("zero_start=True: the paper's start", prepare, dict(model=PEFTS, zero_start=False)),
    ("needs one linear, trainable adapter, B = 0, rank", folora.find_targets,
     dict(model=TWO), *(dict(model=wrapped(Block(), **wrong)) for wrong in (
         dict(r=9), dict(init_lora_weights="pissa"), dict(init_lora_weights=False),
         dict(inference_mode=True), dict(target_modules=[], target_parameters=["q_proj.weight"])))),
    ("q_proj has an adapter from before: call merge", folora.find_targets, dict(model=ADAPTED)),
    ("this PEFT model has no active LoRA adapter", folora.find_targets,
     dict(model=wrapped(nn.Sequential(nn.Embedding(9, 8)), target_modules=["0"])),
     dict(model=peft.get_peft_model(Block(), IA3)),
     dict(model=peft.get_peft_model(small("llama"), PROMPTS))),
]
sampled = partial(folora.sample_calibration, tokenizer=SimpleNamespace(bos_token_id=None,
                                                                       eos_token_id=None))
GPT = partial(small, "gpt2", n_positions=600)
REFUSED += [
    ("max_new_tokens is 31: B.4's screen rejects", partial(sampled, GPT(), num_samples=2),
     dict(min_new_tokens=5, max_new_tokens=31)),
    ("num_samples and batch_size must be positive, and", partial(sampled, GPT()),
     dict(num_samples=0), dict(num_samples=2, batch_size=0),
     dict(num_samples=2, min_new_tokens=600), dict(num_samples=2, min_new_tokens=-1)),
    ("the model reads 600 tokens: max_new_tokens must be lower", partial(sampled, GPT()),
     dict(num_samples=2, max_new_tokens=600)),
    ("sampling needs a decoder-only model", sampled, dict(model=Block(), num_samples=2)),
    ("token 50256, which begins or ends texts, is beyond the model's vocabulary of 64", sampled,
     dict(model=GPT(), num_samples=2)),
    ("neither generation_config nor the tokenizer has an eos_token_id", sampled,
     dict(model=GPT(bos_token_id=None, eos_token_id=None), num_samples=2)),
]


@pytest.mark.parametrize("message, call, how", [
    (message, call, how) for message, call, *hows in REFUSED for how in hows])
def test_misuse_of_folora_is_refused(message, call, how):
    with pytest.raises((ValueError, torch.linalg.LinAlgError), match=message):
        call(**how)


# ---- eval.py -------------------------------------------------------------------------------------
# text, answers, correct on nq_open, on triviaqa: the verdicts of lm-eval 0.4.13
EXACT = [("Paris", ["Paris", "Lutetia"], 1, 1), ("paris", ["Paris"], 1, 1), ("", ["Paris"], 0, 0),
         ("the Eiffel Tower", ["Eiffel Tower"], 1, 0), ("Eiffel", ["Eiffel Tower"], 0, 0),
         ("The Eiffel tower!", ["eiffel tower"], 1, 0), ("U.S.A", ["USA"], 1, 1),
         ("an apple", ["a apple"], 1, 0), ("banana the", ["banana"], 0, 0),
         ("December 14 1972", ["14 December 1972 UTC", "December 14, 1972"], 1, 1),
         ("theatre", ["atre"], 0, 0), ("THE WHO", ["who"], 0, 0)]


def test_answers_are_judged_as_by_lm_eval():
    for text, answers, *verdicts in EXACT:
        assert [ev.exact_match(text, answers, articles) for articles in (True, False)] == verdicts


def test_rows_are_read_whole_and_pairs_found_under_every_name(tmp_path):
    """No separator but a line feed ends a line of a file, and GSM8K's notes go."""
    rows = [{"text": "t", "question": "q", "answer": "2+3=<<2+3=5>>5.\n#### 5"},     # GSM8K
            {"instruction": "é\u2028\u0085", "input": "i", "output": "r"},           # Alpaca
            {"query": "q", "answer": "r", "lang": "python"},                         # CodeFeedback
            {"query": "q", "original_question": "o", "response": "r"}]               # MetaMathQA
    path, lines = tmp_path / "x.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n\n")
    assert ev.read_rows(str(path)) == rows and ev.given_texts(rows[:1], "x") == ["t"]
    assert ev.to_pairs(rows, "x") == [("q", ["2+3=5.\nThe answer is: 5"]),
                                      ("é\u2028\u0085\ni", ["r"]), ("q", ["r"]), ("q", ["r"])]
    for answer in ("a", ["a"], {"aliases": ["a", ""]}):
        assert ev.to_pairs([{"question": "q", "answer": answer}], "x") == [("q", ["a"])]
    for nothing in (None, 5, " ", [5], {"aliases": []}):
        with pytest.raises(ev.UserError, match="x, line 2: no field called answers or answer or"):
            ev.to_pairs([rows[0], {"question": "q", "answer": nothing}], "x")


def test_a_hub_data_set_is_asked_for_by_name_configuration_and_split(monkeypatch):
    rows = [{"question": "q", "answer": "The answer is: 1"}]
    monkeypatch.setattr(datasets, "load_dataset", load := Mock(return_value=rows))
    ev.load_tasks("webqs,drift", 1)
    ev.read_rows(train_math.parse_options(["--model", "Qwen2.5-1.5B"]).data)
    asked = [(*call.args, call.kwargs["split"]) for call in load.call_args_list]
    assert asked == [("stanfordnlp/web_questions", None, "test"), ("openai/gsm8k", "main", "train")]


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
    with pytest.raises(ev.UserError, match="most prompts fill .* tokens: --max-length"):
        ev.encode_all(tokenizer, pairs[1:], len(prompt))             # not one label would be left


@pytest.mark.parametrize("kind, options", [
    ("Gemma2", {"final_logit_softcapping": 0.5}), ("Granite", {"logits_scaling": 3.0}),
    ("Cohere", {"logit_scale": 0.25}), ("OPT", {"word_embed_proj_dim": 16, "ffn_dim": 32}),
    ("GPT2", {}), ("Mixtral", {"output_router_logits": True})])
def test_the_loss_of_padded_rows_is_that_of_each_alone_whatever_the_head_does(kind, options):
    options |= dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
                    pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    examples = [{"ids": list(range(3, 12)), "labels": [-100] * 6 + [9, 10, 11]},
                {"ids": list(range(12, 18)), "labels": [-100] * 2 + [14, 15, 16, 17]}]
    own = 0
    for example in examples:
        logits, labels = model(torch.tensor([example["ids"]])).logits[0, :-1], example["labels"][1:]
        own += nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
    close(ev.summed_nll(model, ev.collate(examples, CPU)), own)


def literal_kl(model, other, texts):
    """KL(model || other), a mean over the next-token positions of the texts, in nat."""
    kl = []
    for text in texts:
        p, q = (m(text[None]).logits[0, :-1].double().softmax(-1) for m in (model, other))
        kl.append((p * (p / q).log()).sum(-1))
    return torch.cat(kl).mean()


def test_drift_is_the_kl_of_next_token_distributions(tiny):
    model, tokenizer = tiny
    other = copy.deepcopy(model)
    other.model.layers[2].mlp.down_proj.weight.data.mul_(1.5)
    texts = [tokenizer(text, return_tensors="pt")["input_ids"][0]
             for text in ("12 + 7 = 19\n", "Q: what is 4 + 4?\nA: 8\nQ: ")]
    close(ev.drift(other, model, texts), literal_kl(model, other, texts).item(), rtol=1e-3, atol=0)


def test_greedy_is_the_argmax_whatever_the_checkpoint_sets_and_stops_at_its_end(tiny):
    model, tokenizer = copy.deepcopy(tiny)
    prompts = ["Question: what is 12 + 7\nAnswer:", "3 + 3 ="]
    vars(model.generation_config).update(num_beams=3, no_repeat_ngram_size=1, do_sample=True,
                                         repetition_penalty=9.0)
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
    (model, tokenizer), verdicts = tiny, []
    own = ev.greedy(model, tokenizer, ["Question: what is 12 + 7\nAnswer:"], 3)[0]
    for ask, *answers in (("what is 12 + 7", "19", "20", tokenizer.decode(own).strip()),
                          ("what is 12 + 7", "x"), ("say", "A: 1", "b")):
        prompt, literal = f"Question: {ask}\nAnswer:", False
        start = len(tokenizer(prompt)["input_ids"])
        for answer in answers:
            ids = torch.tensor(tokenizer(f"{prompt} {answer}")["input_ids"])
            likeliest = model(ids[None]).logits[0, start - 1:-1].argmax(-1)
            literal |= torch.equal(likeliest, ids[start:])
        assert ev.count_right(model, tokenizer, [(ask, answers)], "webqs") == literal
        verdicts.append(literal)
    assert any(verdicts) and not all(verdicts)


@pytest.mark.parametrize("task, text, wanted, right", [
    ("facts", " The Sun.\nQ: and", "sun", 1), ("facts", " Sunday", "sun", 0),
    ("triviaqa", " The Sun", "sun", 0), ("triviaqa", " sun, I say", "Sun", 1),
    ("gsm8k", "2. The answer is: 5", "The answer is: 5.0", 1),
    ("gsm8k", "5", "The answer is: 5", 0), ("gsm8k", "The answer is: none", "18", 1),
    ("gsm8k", "The answer is: $1,234.50.", "The answer is: 1234.5", 1),
    ("gsm8k", "The answer is: 3. The answer is: -4", "The answer is: -4", 1)])
def test_each_task_is_judged_by_its_own_rule(tiny, monkeypatch, task, text, wanted, right):
    """An answer without a number is None, and equal to None alone."""
    monkeypatch.setattr(ev, "greedy", greedy := Mock(return_value=[tiny[1](text)["input_ids"]]))
    assert ev.count_right(*tiny, [("q", [wanted])], task) == right
    assert greedy.call_args.args[3] == (256 if task == "gsm8k" else 64)          # new tokens


def test_summary_rows():
    before = {"gsm8k": 10.0, "nq_open": 20.0, "webqs": 30.0, "drift": 0.0}
    after = {"gsm8k": 40.0, "nq_open": 15.0, "triviaqa": 25.0, "drift": 0.1}
    wanted = {"Avg1": 20.0, "Avg1(%)": 80.0, "Avg2": 40.0, "GM": pytest.approx(math.sqrt(800))}
    assert ev.summarise(after, before) == wanted
    assert ev.summarise(after | ev.summarise(after, before), before) == wanted
    assert "Avg1(%)" not in ev.summarise(after, {**before, "nq_open": 0.0, "webqs": 0.0})
    assert "Avg1(%)" not in ev.table({"folora": after})


@pytest.mark.parametrize("name, weight", [
    ("model.norm.weight", None), ("model.norm.weight", torch.ones(5)), ("x", torch.ones(2))])
def test_wrong_weights_are_refused(tmp_path, name, weight, capsys):
    other = shutil.copytree(ev.TINY, tmp_path / "other") / "model.safetensors"
    weights = load_file(other) | {name: weight}
    save_file({n: w for n, w in weights.items() if w is not None}, other, {"format": "pt"})
    line = stopped(ev.main, [other.parent, "--tasks", "facts", "--limit", "2"], capsys)
    assert f"cannot load the model {other.parent}: " in line


def weights_of(path, dtype=torch.float32):
    return ev.load_model(str(path), CPU, dtype)[0].state_dict()


def test_a_run_or_an_adapter_is_the_model_that_peft_makes_of_it(tiny, tmp_path):
    model = wrapped(tiny[0], r=4, init_lora_weights=False, use_rslora=True)
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.merge_and_unload().state_dict()
    close(weights_of(tmp_path / "adapter"), wanted, rtol=0, atol=0)
    for name, rounded in weights_of(tmp_path / "adapter", torch.bfloat16).items():      # only once
        assert (rounded == wanted[name].bfloat16()).float().mean() > 0.999
    model.peft_config["default"].alpha_pattern = {"q_proj": 3}
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(ev.UserError, match="merge it with PEFT: .'alpha_pattern'"):
        weights_of(tmp_path / "odd")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ev.UserError, match="has no base_model_name_or_path: add it"):
        ev.find_model(str(tmp_path))
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"options": {"model": "tiny"}}')
    path = tmp_path / "adapter/adapter_config.json"                  # the run knows better
    path.write_text(path.read_text().replace('"tiny"', '"/moved/away"'))
    assert ev.find_model(str(tmp_path)) == (str(ev.TINY), tmp_path / "adapter", {"model": "tiny"})
    close(weights_of(tmp_path), wanted)
    shutil.copytree(ev.TINY, tmp_path / "merged")
    assert ev.find_model(str(tmp_path)) == (str(tmp_path / "merged"), None, {"model": "tiny"})


def ending(tokenizer, before, after, **options):
    """The tokenizer, with special tokens before and behind each text, as a model's directory."""
    tokenizer = copy.deepcopy(tokenizer)
    names = [name for name in (before, after) if name]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(filter(None, (before, "$A", after))),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names])
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize("before", ["<bos>", ""])
def test_a_tokenizer_that_ends_each_text_changes_no_score_and_no_label(before, tiny):
    model, tokenizer = tiny
    plain, ends = (ending(tokenizer, before, after) for after in ("", "<eos>"))
    texts = ["the hill", "a", "<eos>", "twice <eos><eos>"]
    assert ev.encode(ends, texts) == ev.encode(plain, texts) == plain(texts)["input_ids"]
    assert ends("a")["input_ids"] == [*plain("a")["input_ids"], 1]
    pairs = [("What is 2 + 2?", ["4.\nThe answer is: 4"]), ("Sort: b a", ["a b"])]
    assert ev.encode_all(ends, pairs, 256) == ev.encode_all(plain, pairs, 256)
    assert ev.greedy(model, ends, ["3 + 3 ="], 4) == ev.greedy(model, plain, ["3 + 3 ="], 4)
    own = plain("Q: hm\nA: it is")["input_ids"][len(plain("Q: hm\nA:")["input_ids"]):]
    assert ev.is_continuation(ends, "Q: hm\nA:", ["no", "it is"], own)
    found = [experiments.with_answer(some, "Q: {}\nA:", "hm", ["it is"]) for some in (plain, ends)]
    assert found[0] == found[1] and found[0]["labels"][-len(own):] == own


def test_berts_tokenizer_ends_a_response_with_its_own_token(tiny, tmp_path):
    ending(tiny[1], "<bos>", "<pad>", eos_token=None, sep_token="<pad>").save_pretrained(tmp_path)
    tokenizer = ev.load_tokenizer(tmp_path)
    ids = ev.encode_all(tokenizer, [("q", ["a"])], 256)[0]["ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<pad>") != ids[-2]
    ending(tiny[1], "<bos>", "", eos_token=None, sep_token=None).save_pretrained(tmp_path)
    with pytest.raises(ev.UserError, match="has no eos_token: set one"):
        ev.load_tokenizer(tmp_path)


def test_what_is_cut_or_left_out_is_said_and_half_may_be(tiny, capsys):
    tokenizer, long = tiny[1], ("long " * 250, ["is left out"])
    examples = ev.encode_all(tokenizer, [("q", ["a"]), long], 256)   # exactly half
    assert len(examples) == 1 and "0 of 2 responses are cut at 256 tokens, and 1 are left out" \
        in capsys.readouterr().err
    length = len(examples[0]["ids"])
    assert ev.encode_all(tokenizer, [("q", ["a"])], length - 1)[0]["ids"] == \
        examples[0]["ids"][:-1]
    assert f"1 of 1 responses are cut at {length - 1} tokens" in capsys.readouterr().err
    with pytest.raises(ev.UserError, match="most prompts fill 256"):
        ev.encode_all(tokenizer, [("q", ["a"]), long, long], 256)
    assert [len(ids) for ids in ev.encode_texts(tokenizer, ["a b c d", "a"], 3, "x")] == [3, 2]
    assert "x: 1 of 2 texts are cut at 3 tokens" in capsys.readouterr().err
    assert ev.by_length([[1], [1] * 3, [1] * 2], 2) == [[[1] * 3, [1] * 2], [[1]]]   # longest first


def test_prose_is_the_models_own_loss(tiny):
    model, tokenizer = tiny
    texts, total, count = ["a shop has 14 marbles. " * 90, "Tapo Luke packs 5 bags"], 0, 0
    for text in texts:                               # the first is cut at the model's positions
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    scores = ev.evaluate(model, tokenizer, {"prose": texts})
    assert scores == {"prose": pytest.approx(total / count, rel=1e-4)} and count > 511


def test_held_out_text_is_not_calibration_text(tiny):
    held, texts = ev.held_out(*tiny, 40, 2), folora.sample_calibration(*tiny, 2, 40, 40)
    assert not any(torch.equal(a, b) for a in held for b in texts)
    with pytest.raises(SystemExit):                  # its seed, 1000, is no --seed
        train_math.main(["--seed", "1000"])


@pytest.mark.parametrize("message, weights, config", [
    ("has no weights", lambda w: {}, {}),
    ("a lora_A or a lora_B, but not both", lambda w: {k: v for k, v in w.items() if "_B" in k}, {}),
    ("a lora_A or a lora_B, but not both", lambda w: {k: v for k, v in w.items() if "_A" in k}, {}),
    ("has factors .* on a weight .192, 192.", lambda w: {
        k: v[:1] if "_B" in k else v for k, v in w.items()}, {}),
    ("has the rank 1, and adapter_config.json has another r", lambda w: {
        k: v[:1] if "_A" in k else v[:, :1] for k, v in w.items()}, {}),
    ("is no nn.Linear of the adapter's base", lambda w: {
        k.replace("layers.0", "layers.7"): v for k, v in w.items()}, {}),
    ("no number as lora_alpha", None, {"lora_alpha": "8"}), ("not plain", None, {"use_dora": True}),
    ("is an adapter whose base is itself", None, {"base_model_name_or_path": "{itself}"}),
    ("has no base_model_name_or_path", None, {"base_model_name_or_path": 5}),
    ("damaged or gone: it holds no", None, [1]), ("damaged or gone: it holds no", None, None)])
def test_a_wrong_adapter_is_refused_before_any_model_is_scored(
        message, weights, config, tiny, tmp_path, monkeypatch, capsys):
    model, folder = wrapped(tiny[0], r=4, target_modules=["q_proj"]), tmp_path / "adapter"
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(folder)
    if weights:
        path = folder / "adapter_model.safetensors"
        save_file({k: v.contiguous() for k, v in weights(load_file(path)).items()}, path)
    path = folder / "adapter_config.json"
    if config != {}:
        whole = {**read_json(path), **config} if isinstance(config, dict) else config
        path.write_text(json.dumps(whole).replace("{itself}", str(folder)))
    monkeypatch.setattr(ev, "load_model", lambda *_: pytest.fail("a model was loaded"))
    line = stopped(ev.main, ["tiny", folder, "--tasks", "facts", "--limit", "2"], capsys)
    assert re.search(message, line)


def test_scores_appear_as_they_are_known_and_stay_if_the_next_model_fails(tmp_path, capsys):
    """A weight that is no number is refused at loading, and so is a score."""
    other = shutil.copytree(ev.TINY, tmp_path / "other") / "model.safetensors"
    save_file(load_file(other) | {"model.norm.weight": torch.full((192,), nan)}, other,
              {"format": "pt"})
    with pytest.raises(SystemExit):
        ev.main(["tiny", str(other.parent), "--tasks", "facts", "--limit", "2"])
    printed = capsys.readouterr()
    assert "tiny: facts 100.00" in printed.err and re.search("facts .* 100.00", printed.out)
    assert printed.err.endswith("model.norm.weight has numbers that are not finite\n")


def test_a_score_that_is_no_number_ends_the_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ev, "mean_nll", lambda *_: nan)
    ask = ["tiny", "--tasks", f"nll={ev.TINY / 'test.jsonl'}", "--limit", "2"]
    assert stopped(ev.main, ask, capsys, status=1) == "nll: the score is nan"


def test_models_with_other_tokens_have_no_drift(tiny, tmp_path, capsys):
    other = shutil.copytree(ev.TINY, tmp_path / "other")
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_tokens(["Fema"])
    tokenizer.save_pretrained(other)
    line = stopped(ev.main, ["tiny", other, "--tasks", "drift"], capsys)
    assert "has other tokens than tiny: leave drift out of --tasks" in line


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


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nmore"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_one_line(error, capsys):
    @ev.one_line
    def main(arguments=None):
        bar = tqdm(total=3)                          # it is open and must not share the line
        bar.update()
        raise type(error)(*error.args)
    assert stopped(main, [], capsys).endswith("lower --micro-batch-size, --max-length or --rank")


# ---- train_math.py, end to end -------------------------------------------------------------------
COMMON = ("--max-samples 64 --batch-size 8 --micro-batch-size 4 --max-steps 6 --log-every 2 "
          "--rank 8 --calibration-max-tokens 40 --eval-samples 4").split()
FAST = [*COMMON, *"--calibration-samples 4 --task-samples 8 --basis-rank 16 --compare no".split()]
TASKS = f"gsm8k={ev.TINY / 'test.jsonl'},facts,nll={ev.TINY / 'test.jsonl'},drift"
PAPER = ("folora", "--preset", "paper", "--kl", "5")
COMPARED = ("folora", *"--tasks facts,drift --compare lora --merge 1 --kl 2 --lr 1e-2 --lam 2 "
            "--s-min 0.7 --penalty 5 --gradient-checkpointing 1 "
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


@pytest.mark.parametrize("run", [("folora",), ("lora",), PAPER])
def test_training_writes_a_run_that_eval_reads(run, trained, capsys):
    method, (out, printed) = run[0], trained(*run)
    assert all(row in printed for row in ("untouched", method, "gsm8k", "facts", "nll", "Avg1(%)"))
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(f"\n    {name}   " in train_math.__doc__ for name in lines[0])
    assert [line["drift"] is not None for line in lines] == [False, True] * 3
    assert lines[-1]["loss"] < lines[0]["loss"] == pytest.approx(1.784, abs=1e-3)
    config, scores = read_json(out / "config.json"), read_json(out / "summary.json")["scores"]
    assert config["options"]["rank"] == 8 and config["torch"] == torch.__version__
    left = sorted(p.name for p in out.iterdir())
    kept = {"adapter", "config.json", "held_out.json", "metrics.jsonl", "summary.json",
            "untouched.json"}
    if method == "folora":
        kept |= {"calibration.json", "prepared.pt"}
    assert {*left} == kept
    assert scores[method]["nll"] < scores["untouched"]["nll"] and scores[method]["drift"] > 0
    ev.main([str(out), "tiny", "--tasks", TASKS, "--limit", "4"])
    row = {line.split()[0]: line.split()[-2:] for line in capsys.readouterr().out.splitlines()}
    for task, digits in (("nll", 2e-3), ("drift", 1e-4)):
        columns = [scores[column][task] for column in (method, "untouched")]
        assert [*map(float, row[task])] == pytest.approx(columns, abs=digits)


@pytest.mark.parametrize("run, kl, how", [
    (("lora",), 0, dict(lr=4e-3)),
    (("lora", "--penalty", "1000", "--calibration-samples", "4"), 0, dict(lr=4e-3)),
    (PAPER, 5, folora.PAPER | dict(lr=6e-3, basis_rank=16)),
    (COMPARED, 2, dict(lr=1e-2, s_min=0.7, lam=2.0, penalty=5.0,
                       target_modules=("q_proj", "down_proj")))])
def test_training_is_a_literal_loop_without_micro_batches(run, kl, how, trained, tiny):
    """The loss is the batch's, plus kl times KL(untouched || now) on four calibration texts. The
    gradient of the penalty joins it when it has been clipped."""
    untouched, tokenizer = tiny
    held_out = ev.held_out(untouched, tokenizer, 40)[:4]
    model, examples = copy.deepcopy(untouched), word_problems(tokenizer, 64)
    texts = folora.sample_calibration(untouched, tokenizer, 4, 40, 40)
    task = [torch.tensor(example["ids"]) for example in examples[:8]]
    inputs = [[ev.collate(batch, CPU) for batch in ev.by_length(some, 4)] for some in (texts, task)]
    lora_with_penalty = run[0] == "lora" and "--penalty" in run     # SAdam has its own
    if lora_with_penalty:
        dense = DensePenalty(model, inputs[0], folora.TARGET_MODULES, 1000.0)
    torch.manual_seed(0)
    if run[0] == "lora":
        optimizer = train_math.add_adapters(train_math.parse_options(command("lora")), model)
    else:
        optimizer = folora.prepare(model, *inputs, **dict(rank=8, basis_rank=16) | how)
    order, lines = train_math.data_order(64, 8, None, 6, 0), metrics(trained(*run)[0])
    for step, (batch, line) in enumerate(zip(order, lines, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = how["lr"] * train_math.schedule(step, 6)
        loss = model(**ev.collate([examples[i] for i in batch], CPU)).loss
        if kl:
            (kl * literal_kl(untouched, model, texts)).backward()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if lora_with_penalty:
            dense(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        if run[0] == "lora":
            assert line["forgetting"] is None
        else:
            assert line["forgetting"] == pytest.approx(optimizer.forgetting(), rel=1e-2)
        literal = [loss.item(), group["lr"], norm.item()]
        assert [line["loss"], line["lr"], line["grad_norm"]] == pytest.approx(literal, rel=1e-3)
        with torch.no_grad():
            now = literal_kl(untouched, model, held_out).item()
        assert line["drift"] in (None, pytest.approx(now, rel=1e-2, abs=1e-6))


def test_lora_is_compared_in_the_same_run(trained, tiny, capsys):
    out, printed = trained(*COMPARED)
    assert printed.split()[:3] == ["untouched", "folora", "lora"]
    options = [read_json(run / "config.json")["options"] for run in (out, out / "lora")]
    assert [(o["lr"], o["kl"]) for o in options] == [(1e-2, 2.0), (4e-3, 0.0)]
    train_math.main(command(*COMPARED, "--out", str(out), "--micro-batch-size", "2"))
    assert printed == capsys.readouterr().out        # a finished run prints its table
    merged, adapter = weights_of(out), weights_of(out / "adapter")
    close(merged, adapter)
    for name, untouched in tiny[0].state_dict().items():
        assert torch.equal(merged[name], untouched) != ("q_proj" in name or "down_proj" in name)


def test_killed_runs_go_on_to_the_same_numbers(trained, tmp_path):
    """Killed by SIGKILL, and in a process of their own: TRL has started threads in this one."""
    moments = {"in the eigenproblems": ("folora",), "summary.json half written": PAPER,
               "first checkpoint.pt half written": ("lora",)}
    runs = {moment: [*command(*run), "--out", str(tmp_path / moment)]
            for moment, run in moments.items()}
    code = (f"import torch; from assets import kill; torch.set_num_threads(1)\n"
            f"for moment, run in {runs}.items():\n"
            f"    assert kill.killed(kill.start(run, kill.MOMENTS[moment]))[0]")
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
    for moment, run in moments.items():
        train_math.main(runs[moment])
        assert kill.result(tmp_path / moment) == kill.result(trained(*run)[0])


def test_what_stops_a_run_is_said_in_a_line_and_it_resumes(trained, tmp_path, monkeypatch, capsys):
    """NaN in step 4, then Ctrl-C in step 3. What is finished is not repeated."""
    out, finished = tmp_path / "run", kill.result(trained("folora")[0])
    arguments = command("folora", "--out", str(out))
    answers = [*[DEFAULT] * 3, (math.nan, 1.0), KeyboardInterrupt, *[DEFAULT] * 4]
    gradients = Mock(wraps=train_math.gradients, side_effect=answers)
    monkeypatch.setattr(train_math, "gradients", gradients)
    line = stopped(train_math.main, arguments, capsys, status=1)
    assert "step 4: loss nan, norm 1.0: lower --lr" in line
    assert [line["step"] for line in metrics(out)] == [1, 2]
    for module, name in ((train_math, "sample"), (folora, "decompose")):
        monkeypatch.setattr(module, name, None)
    assert "KeyboardInterrupt" in stopped(train_math.main, arguments, capsys)
    train_math.main(arguments)
    assert kill.result(out) == finished and gradients.call_count == len(answers)


def test_a_directory_belongs_to_one_run(trained, tmp_path, capsys):
    arguments = command("folora", "--out", str(trained("folora")[0]))
    stop = lambda *more: stopped(train_math.main, [*arguments, *more], capsys)
    assert "holds a run with another merge, rank: give" in stop("--rank", "4", "--merge", "1")
    assert "is an adapter: train it" in stop("--model", arguments[-1], "--out", tmp_path)


def test_a_second_run_takes_what_a_first_has_prepared(trained, tmp_path, monkeypatch, capsys):
    """It neither samples nor decomposes nor scores the untouched model, and with the same options
    it has the same numbers. calibration.json serves --kl."""
    first, evaluate = trained("folora")[0], Mock(wraps=ev.evaluate)
    for module, name in ((train_math, "sample"), (train_math, "solve"), (ev, "held_out")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(ev, "evaluate", evaluate)
    arguments = command("folora", "--prepared", str(first), "--out")
    train_math.main([*arguments, str(tmp_path / "second")])
    (ours, _), (theirs, _) = map(kill.result, (tmp_path / "second", first))
    assert ours == theirs and evaluate.call_count == 1
    train_math.main([*arguments, str(tmp_path / "third"), "--rank", "4", "--basis-rank", "8",
                     "--lr", "1e-2", "--penalty", "1", "--tasks", "nll=tiny/test.jsonl"])
    assert evaluate.call_count == 3                  # other tasks: the untouched model's, too
    A = load_file(tmp_path / "third" / "adapter" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in A.items() if "lora_A" in name} == {4}
    stop = lambda *more: stopped(train_math.main, [*arguments, str(tmp_path / "x"), *more], capsys)
    assert "was made for something else: the rank is 8 there" in stop("--rank", "9")
    (tmp_path / "prepared.pt").write_bytes((first / "prepared.pt").read_bytes()[:-99])
    assert "is damaged" in stop("--prepared", str(tmp_path / "prepared.pt"))
    for nothing in (tmp_path / "nowhere", Path("tiny").absolute()):  # no file, no run
        assert "there is no" in stop("--prepared", str(nothing))
    assert not (tmp_path / "x").exists()
    monkeypatch.undo()
    texts = str(first / "calibration.json")
    options = train_math.parse_options(command("folora", "--calibration", texts))
    assert train_math.sample(options, None, None) == read_json(first / "calibration.json")["value"]


def a_run(tmp_path, *more):
    """(options, directory) of a run that reads a file of its own and has only just begun."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(GOOD)
    out = tmp_path / "run"
    arguments = command("folora", "--data", str(data), "--out", str(out), *more)
    options = train_math.parse_options(arguments)
    train_math.claim(out, options)
    return options, out


def test_another_value_of_any_option_that_counts_is_another_run(tmp_path):
    options, out = a_run(tmp_path)
    config = read_json(out / "config.json")
    for name in vars(options):
        changed = {**config["options"], name: "other"}
        (out / "config.json").write_text(json.dumps({**config, "options": changed}))
        if name in {"out", "micro_batch_size", "gradient_checkpointing", "compare"}:
            train_math.judge_directory(options)
        else:
            with pytest.raises(ev.UserError, match=f"holds a run with another {name}: give"):
                train_math.judge_directory(options)


def test_a_file_that_has_changed_since_a_run_began_is_refused(tmp_path):
    options, out = a_run(tmp_path)
    files = read_json(out / "config.json")["files"]
    read = {"data.jsonl", "test.jsonl", "facts.jsonl", "model.safetensors", "tokenizer.json"}
    assert read < {Path(file).name for file in files}
    train_math.judge_directory(options)
    Path(options.data).write_bytes(GOOD + GOOD)
    with pytest.raises(ev.UserError, match="data.jsonl has changed since .*run was begun: put"):
        train_math.judge_directory(options)
    Path(options.data).unlink()                      # a finished run needs it no longer
    train_math.judge_directory(options)
    (out / "config.json").unlink()
    (out / "held_out.json").write_text("[]")
    with pytest.raises(ev.UserError, match="has no config.json of a run, and other files .held_o"):
        train_math.judge_directory(options)


def test_a_part_of_another_run_is_neither_used_nor_removed(tmp_path):
    options, out = a_run(tmp_path)
    _, other = a_run(tmp_path / "run", "--rank", "4")
    parts = {"held_out.json": [[1, 2]], "prepared.pt": [{"V": torch.ones(2)}],
             "checkpoint.pt": {"step": 1}}
    for name, value in parts.items():
        for folder in (out, other):
            train_math.keep(value, folder / name)
        assert str(train_math.once(out / name, pytest.fail)) == str(value)
        for damage in (b"{}", b"null", b"[1]", b"{", b"", (other / name).read_bytes()):
            (out / name).write_bytes(damage)
            with pytest.raises(ev.UserError, match=f"{name} is .*: delete it"):
                train_math.kept(out / name)
    with pytest.raises(ev.UserError, match="checkpoint.pt is not this run's: delete it"):
        train_math.resume(out, None, None)
    for summary in ("{}", "null", "[1]"):
        (out / "summary.json").write_text(summary)
        with pytest.raises(ev.UserError, match="summary.json is not this run's: delete it"):
            train_math.finish(out, options)
    train_math.save({"run": train_math.identity(out), "scores": {}}, out / "summary.json")
    assert train_math.finish(out, options) == {} and all((out / name).exists() for name in parts)
    train_math.keep({"step": 1}, out / "checkpoint.pt")              # now it is this run's
    assert train_math.finish(out, options) == {} and not (out / "checkpoint.pt").exists()
    train_math.keep([5], tmp_path / "cache.pt")      # outside a run nothing is signed
    assert torch.load(tmp_path / "cache.pt") == train_math.kept(tmp_path / "cache.pt") == [5]


def test_old_texts_take_turns_and_an_infinite_norm_stops(tiny, tmp_path, monkeypatch):
    """With the seed of --seed, which the data's order and calibration text have, too."""
    options = train_math.parse_options([*FAST, "--seed", "1", "--kl", "1", "--max-steps", "4",
                                        "--calibration-max-tokens", "140"])
    monkeypatch.setattr(train_math, "gradients", gradients := Mock(return_value=(1.0, 1.0)))
    monkeypatch.setattr(ev, "drift", lambda *_, **__: 0.0)
    run = lambda: train_math.train(options, nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(
        torch.ones(1))]), list(range(64)), [], tmp_path, list("abcdef"))
    run()
    taken = [(call.args[2], "".join(call.args[-1])) for call in gradients.call_args_list]
    order = train_math.data_order(64, 8, None, 4, 1)
    assert taken == [*zip(order, ["abcd", "efab", "cdef", "abcd"])]
    (tmp_path / "checkpoint.pt").unlink()
    gradients.return_value = (1.0, math.inf)
    with pytest.raises(FloatingPointError, match="step 1: loss 1.0, norm inf: lower --lr"):
        run()
    monkeypatch.setattr(folora, "sample_calibration", draw := Mock(return_value=[]))
    train_math.sample(options, *tiny)
    assert draw.call_args.args[2:] == (4, 128, 140) and draw.call_args.kwargs["seed"] == 1


def test_the_gradient_is_clipped_and_checkpointing_runs_the_layers_again(tiny):
    model, calls, examples = copy.deepcopy(tiny[0]), [], word_problems(tiny[1], 1)
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    for on, texts in ((1, []), (0, [[5]])):          # a text of one token has no KL
        train_math.recompute(model, on)
        assert not any(m.training for m in model.modules() if isinstance(m, nn.Linear))
        (sgd := torch.optim.SGD(model.parameters())).zero_grad()
        _, norm = train_math.gradients(model, sgd, examples, 1, 1.0, texts)
        clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert clipped == pytest.approx(1.0, rel=1e-3) and norm > 1.1
    assert len(calls) == 5                   # twice with, once without and twice for the text


def test_on_gpus_the_loss_on_the_cpu_is_summed_as_well(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(train_math, "PROCESSES", 2)
    monkeypatch.setattr(train_math, "dist", group := Mock())
    train_math.resolve(train_math.parse_options([]))
    group.init_process_group.assert_called_with("cpu:gloo,cuda:nccl")


def test_two_processes_do_what_one_does(trained, tmp_path):
    """The same batch and KL texts, divided by torchrun: the same losses, scores and weights."""
    one, two = trained(*COMPARED)[0], tmp_path / "two"
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    done = subprocess.run([*launch, "train_math.py", *command(*COMPARED), "--out", two], text=True,
                          cwd=HERE, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Avg1(%)") == done.stderr.count("eigenproblems:   0%") == 1
    for method, *runs in (("folora", one, two), ("lora", one / "lora", two / "lora")):
        losses = [[line["loss"] for line in metrics(run)] for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        scores = [read_json(run / "summary.json")["scores"][method] for run in runs]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-6)
        a, b = map(weights_of, runs)
        assert all((a[name] - b[name]).norm() < 1e-5 * a[name].norm() for name in a)


def test_schedule_and_order_of_the_data():
    rates = [train_math.schedule(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[3] == max(rates) == 1
    assert 0 < rates[-1] < 1e-3 and len(train_math.data_order(10, 4, 1, 7, 0)) == 7
    order = train_math.data_order(10, 4, 2, None, 0)
    assert order != train_math.data_order(10, 4, 2, None, 1)
    assert [len(batch) for batch in order] == [4] * 5
    assert sorted(sum(order, []))[::2] == list(range(10))


GOOD = b'{"question": "q", "answer": "a"}\n'
FILES = {"good": GOOD, "half": GOOD + b'{"question": "q"}\n', "list": GOOD + b"[1, 2]\n",
         "cut": GOOD + b'{"question"\n', "latin": b'{"question": "\xe9", "answer": "a"}\n',
         "pairs": b'[["question", "q"], ["answer", "a"]]\n',
         "long": GOOD + GOOD.replace(b'"q"', b'"' + b"why " * 600 + b'"'),
         "half_pair": GOOD + b'{"question": "\\ud800", "answer": "a"}\n',
         "input": GOOD.replace(b"}", b', "input": [5]}'),
         "inputs": GOOD.replace(b"}", b', "input": ["x"]}'),
         "two": GOOD.replace(b'"q"', b'["q", "r"]'),
         "null": b'{"question": null, "answer": "a"}\n', "five": b'{"text": 5}\n', "none": b""}
BAD = [            # (message, arguments, others, ...): eval.py's if they begin with a model
    ("{flag}: must be from 0 to 1e+09, not {value}", "--kl -1", "--kl inf", "--basis-rank -1"),
    ("{flag}: must be from 1e-09 to 1e+09", "--lam 0", "--lam nan", "--lr 0", "--lr inf"),
    ("{flag}: must be from 1 to 1e+09", "--rank 0", "--max-steps 0", "--log-every 0",
     "tiny --limit -1", "tiny --limit 0"),
    ("{flag}: must be from 0 to 1, not 2", "--s-min 2"), ("{value}: expected one", "--lr"),
    ("{flag}: invalid number value: 'much'", "--lr much"), ("required: MODEL", ""),
    ("{flag}: invalid number value: 'few'", "tiny --limit few"),
    ("nothing to score", "--tasks=", "--tasks ,", "tiny --tasks ,", "tiny --tasks="),
    ("--out: must not be empty", "--out="), ("--calibration: must not be empty", "--calibration="),
    ("--batch-size {value} exceeds the 64 examples", "--batch-size 65", "--batch-size 1000000000"),
    ("{value} steps of --batch-size 8 exceed 1e7 examples", "--max-steps 1250001"),
    ("--max-length 513 exceeds the model's 512 positions", "--max-length 513"),
    ("tokens 512 must be below the model's 512 positions", "--calibration-max-tokens 512"),
    ("a model is named twice", "tiny tiny"), ("facts is named twice", "--tasks facts,facts"),
    ("facts= names no file", "tiny --tasks facts="),
    ("drift takes no file", "tiny --tasks drift=good.jsonl"),
    ("invalid choice: '{value}'", "--method milora"),
    ("unrecognized arguments: {flag} {value}", "--steps 5", "tiny --banana 5"),
    ("rank 193 is not from 1 to 192, model.layers.0.self_attn.q_proj's width", "--rank 193"),
    ("most prompts fill {value} tokens: {flag}", "--max-length 20"),
    ("no nn.Linear is called nothing", "--target-modules nothing"),
    ("lm_head shares its weight with model.embed_tokens.weight", "--target-modules lm_head"),
    ("{value}: no such directory, and no short name", "--model nowhere", "--model runs/nowhere",
     "nowhere", "good.jsonl"), ("unknown task {value}", "--tasks trivia", "--tasks GM"),
    ("gone.jsonl: no such file", "--tasks nll=gone.jsonl", "--data gone.jsonl",
     "--calibration gone.jsonl"),
    ("list.jsonl, line 2: not JSON", "--data list.jsonl"),
    ("in UTF-8: a row is one line, not [[", "--data pairs.jsonl"),
    ("{value}, line 2: not JSON with fields, {{...}}, in UTF-8", "--data half_pair.jsonl"),
    ("{value}, line 1: no field called input with a text", "--data input.jsonl"),
    ("{value}, line 1: question or query or instruction or problem takes one text, not a list",
     "--data two.jsonl"), ("{value}, line 1: input takes one text", "--data inputs.jsonl"),
    ("{value}: no .jsonl file, and no hub id", "--data x.csv", "--data a.jsonl.gz",
     "--data good.csv", "--data folder", "--calibration /a/b"),
    ("facts, row 2: a prompt of", "tiny --tasks facts=long.jsonl", "--tasks facts=long.jsonl"),
    ("cut.jsonl, line 2: not JSON", "tiny --tasks nll=cut.jsonl"),
    ("{value}, line 1: not JSON with fields, {{...}}, in UTF-8", "--data latin.jsonl"),
    ("good.jsonl, line 1: its answer has no number after ####", "--tasks gsm8k=good.jsonl"),
    ("half.jsonl, line 2: no field called answers or answer", "--data half.jsonl"),
    ("{value}, line 1: no field called question", "--data null.jsonl"),
    ("{value}, line 1: no field called text or question", "--calibration five.jsonl"),
    ("none.jsonl: no rows", "--data none.jsonl"),
    ("good.jsonl is no directory that can be", "--out good.jsonl", "--out good.jsonl/run"),
    ("folder has no config.json of a run, and other files (summary.json)", "--out folder"),
    ("ours/config.json is not that of a run", "--out ours"),
    ("new has no config.json of a run, and other files (lora)", "--compare lora --out new")]


@pytest.mark.parametrize("arguments, idle", [
    (f"--method lora {option}", option.split()[0])
    for option in ("--lam 1", "--s-min 1", "--zero-start 1", "--scale-lr-B 1", "--task-samples 1",
                   "--basis-rank 1", "--calibration-samples 1", "--preset paper",
                   "--calibration self", "--compare lora")] + [("--epochs 2", "--epochs")])
def test_an_option_that_would_do_nothing_is_refused_on_the_command_line_alone(
        arguments, idle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = stopped(train_math.main, [*COMMON, *arguments.split()], capsys)
    assert line.startswith((f"{idle} would do nothing with --m", "--compare lora needs --method"))
    options = train_math.parse_options([*COMMON, *arguments.split(), "--kl", "1"])
    given = {"rank", "kl", "calibration", "calibration_samples"}
    train_math.check_combination(options, given)             # with --kl it reads old texts


@pytest.mark.parametrize("message, arguments", [
    (message, arguments) for message, *some in BAD for arguments in some])
def test_bad_input_gets_one_line_before_any_work(message, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, content in FILES.items():
        Path(f"{file}.jsonl").write_bytes(content)
    for file in ("good.csv", "folder/summary.json", "new/lora/mine", "ours/config.json"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{}")
    state = lambda: {str(path): path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    before, *_, flag, value = state(), "", "", *arguments.split()
    main, given = (train_math.main, FAST) if arguments.startswith("--") else (ev.main, [])
    line = stopped(main, [*given, *arguments.split()], capsys)
    assert message.format(flag=flag, value=value) in line and state() == before


def test_defaults_are_the_papers_or_marked_as_ours(capsys):
    paper = train_math.parse_options("--model Qwen2.5-1.5B --preset paper".split())
    wanted = dict(rank=128, lam=1.0, s_min=0.3, batch_size=128, max_length=512, basis_rank=None,
                  calibration_samples=2000, task_samples=256, zero_start=False, compare="no",
                  scale_lr_B=False, lr=3e-4)
    assert (wanted | folora.PAPER).items() <= vars(paper).items()
    assert {*folora.PAPER} < {*inspect.signature(folora.prepare).parameters}
    for function in (folora.prepare, folora.attach):
        ours, preset = inspect.signature(function).parameters.items(), train_math.PRESETS["tuned"]
        assert all(p.default == preset[name] for name, p in ours if name in preset)
    tuned = train_math.parse_options("--lam 2 --rank 16 --max-steps 1".split())
    wanted = train_math.TINY | dict(lam=2.0, s_min=0.0, zero_start=1, rank=16, lr=2.4e-2,
                                    penalty=0.3)
    assert wanted.items() <= vars(tuned).items()
    assert folora.PAPER.items() <= vars(train_math.parse_options(["--preset", "paper"])).items()
    assert all("ours" in text or "the paper's" in text for *_, text in train_math.OPTIONS)


def test_help_fits_and_says_each_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train_math.main(["--help"])
    text = capsys.readouterr().out
    options, table = text[text.index("options:"):].split("what --preset")
    assert max(map(len, text.splitlines())) <= 100 and "(None)" not in text
    described = re.split(r"\n  (?=--)", options)
    below = {item.split()[0] for item in described if "below)" in " ".join(item.split())}
    assert len(below) > 5 and below <= {*re.findall(r"\n  (--\S+)", table)}


def test_loras_start_is_pefts(tiny):
    """A is uniform in ± 1 / √d_in, and B is 0."""
    ours, theirs = copy.deepcopy(tiny[0]), wrapped(tiny[0])
    train_math.add_adapters(train_math.parse_options("--method lora --rank 8".split()), ours)
    for model in (ours, theirs):
        (A, B, _), = folora.factors(next(m for m in model.modules() if folora.factors(m)))
        assert A.abs().max().item() == pytest.approx(A.shape[1] ** -0.5, rel=0.02)
        assert A.std().item() == pytest.approx((3 * A.shape[1]) ** -0.5, rel=0.1) and not B.any()
    trainable = {name.rpartition(".")[2] for name, p in ours.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}


# ---- the house -----------------------------------------------------------------------------------
def test_folora_stands_alone():
    """On torch and the standard library, also inside its functions."""
    tree = ast.parse((HERE / "folora.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", node.names[0].name).split(".")[0] for node in imports}
    assert names <= {"torch", "safetensors", *sys.stdlib_module_names}
    at_top = [node for node in tree.body if node in imports]
    assert not any("safetensors" in ast.dump(node) for node in at_top)


def test_every_package_that_is_imported_is_required():
    required = {re.match(r"[\w-]+", line)[0] for line in
                (HERE / "requirements.txt").read_text().splitlines()}
    ours = {"eval", "folora", "train_math", "tiny", "assets"}
    for name in ("folora.py", "eval.py", "train_math.py"):
        tree = ast.parse((HERE / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                package = getattr(node, "module", node.names[0].name).split(".")[0]
                assert package in {*required, *ours, *sys.stdlib_module_names}, (name, package)


GUARD = """
import copy, gc, pickle, torch
from torch.optim import optimizer as hooks
import folora
seen = lambda: len(hooks._global_optimizer_pre_hooks) + len(hooks._global_optimizer_post_hooks)
assert seen() == 0
batches = [{"input": torch.randn(30, 6)}]
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(6, 5)
    def forward(self, input):
        return self.q_proj(input)
first, second = Model(), Model()
optimizers = [folora.prepare(m, batches, batches, 0.1, 2, target_modules="q_proj")
              for m in (first, second)]
m = None
adam = torch.optim.AdamW(second.parameters())
del first, optimizers
gc.collect()
try:
    adam.step()
except ValueError as error:
    assert "optimizers=(optimizer, None)" in str(error)
else:
    raise AssertionError("AdamW was let through")
for copied in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
    assert seen() == 3                                       # its own, and one on each copy
    try:
        torch.optim.AdamW(copied.parameters()).step()
    except ValueError:
        pass
    else:
        raise AssertionError("AdamW was let through on a copy")
del copied
gc.collect()
assert seen() == 1
other = torch.nn.Linear(3, 3)
torch.optim.AdamW(other.parameters()).step()                 # other models are free
folora.merge(second)
gc.collect()
assert seen() == 0
"""


def test_importing_folora_changes_nothing_and_the_guard_lives_as_long_as_a_prepared_model():
    done = subprocess.run([sys.executable, "-c", GUARD], cwd=HERE, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_example_in_folora_runs(capsys):
    """The direction that only the task uses is ranked first, and SAdam forgets less than Adam."""
    folora.toy()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()
            if line.strip()}
    assert float(rows["γ"][0]) > 10 and float(rows["SAdam"][0]) < 0.5 * float(rows["Adam"][0])
    assert float(rows["SAdam"][2]) > 5 * float(rows["Adam"][2])


@pytest.mark.parametrize("how, scale, floor, square, moved", [
    ({}, False, 0.0, False, False), (dict(scale_lr_B=False), True, 0.0, False, False),
    (dict(s_min=0.3), False, 0.3, False, False), (dict(basis_rank=None), False, 0.0, True, False),
    (dict(zero_start=False), False, 0.0, False, True), (folora.PAPER, True, 0.3, True, True)])
def test_each_departure_from_the_paper_is_switched_alone(how, scale, floor, square, moved):
    """scale: B has A's learning rate. moved: W0 has become W_res."""
    torch.manual_seed(0)
    model, inputs = Block(16), [{"x": torch.randn(9, 40, 16) * torch.logspace(0, -2, 16)}]
    text = [{"x": torch.randn(9, 40, 16) * torch.logspace(-2, 0, 16)}]
    W0 = model.q_proj.weight.clone()
    how = dict(basis_rank=12) | how
    a, b = folora.prepare(model, text, inputs, 0.1, 2, target_modules="q_proj", **how).param_groups
    length = W0.norm(dim=1).square().mean().sqrt().item()
    assert b["scale"] == pytest.approx(1.0 if scale else length / 2 ** 0.5)
    assert (a["gate"].min() == 0.3) if floor else (a["gate"].min() < 0.29)
    assert a["basis"].shape == (16, 16 if square else 12)
    assert torch.equal(model.q_proj.weight, W0) != moved == model.q_proj.lora_B.any()


def test_the_readme_is_short_and_its_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl"), pytest.importorskip("bitsandbytes")
    text = (HERE / "README.md").read_text()
    assert len(text.split()) <= 1100
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(ev.TINY)
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
    assert Path("runs/cats/adapter_model.safetensors").exists()


def test_the_readmes_commands_are_options_that_exist():
    text = "\n".join((HERE / name).read_text() for name in ("README.md", "assets/RESULTS.md"))
    commands = re.findall(r"python train_math\.py(.*?)(?:#.*|`.*)?$", text, re.M)
    assert len(commands) > 2
    for rest in commands:
        train_math.parse_options(rest.split())


# ---- on a GPU where there is one, against the CPU: python -m pytest -k on_this_device ------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on(device, batches):
    return [{name: t.to(device) for name, t in batch.items()} for batch in batches]


@pytest.mark.parametrize("k", [16, None])
def test_bases_on_this_device_are_the_cpus(k, trajectory):
    model, _, inputs, _ = trajectory
    groups = []
    for device in (CPU, DEVICE):
        here = copy.deepcopy(model).to(device)
        optimizer = prepare_on(here, on(device, inputs), rank=8, basis_rank=k)
        groups.append([group for group in optimizer.param_groups if group["basis"] is not None])
    for ours, theirs in zip(*groups, strict=True):
        assert theirs["basis"].device.type == DEVICE.type
        close(theirs["gate"].cpu(), ours["gate"], rtol=1e-2, atol=1e-3)
        assert theirs["shares"] == pytest.approx(ours["shares"], rel=1e-3)
        # The gated projector: V itself is known up to signs, and close γ make it turn.
        a, b = (V * gate @ V.mT for V, gate in
                ((g["basis"].cpu().double(), g["gate"].cpu().double()) for g in (ours, theirs)))
        assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_training_on_this_device_is_the_cpus_and_resumes(penalty, trajectory, tmp_path):
    model, batches, inputs, _ = trajectory
    found = []
    for device in (CPU, DEVICE):
        here = copy.deepcopy(model).to(device)
        optimizer = prepare_on(here, on(device, inputs), rank=8, penalty=penalty)
        losses = descend(here, optimizer, on(device, batches))
        found.append([*losses.tolist(), optimizer.forgetting()])
    assert found[1] == pytest.approx(found[0], rel=2e-2)
    torch.save([here.state_dict(), optimizer.state_dict()], tmp_path / "state")
    other = copy.deepcopy(model).to(DEVICE)
    resumed = prepare_on(other, on(DEVICE, inputs), rank=8, penalty=penalty)
    weights, state = torch.load(tmp_path / "state", CPU)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    again = [descend(m, o, on(DEVICE, batches)).tolist()
             for m, o in ((here, optimizer), (other, resumed))]
    assert again[0] == pytest.approx(again[1], rel=1e-6)


def test_sampling_on_this_device_is_repeated_by_its_seed_alone(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]).to(DEVICE), tiny[1]
    before = torch.get_rng_state()
    first, second, other = (folora.sample_calibration(model, tokenizer, 6, 40, 48, seed=seed)
                            for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, second)) and not all(map(torch.equal, first, other))


def test_bfloat16_on_this_device_learns(trajectory):
    model, batches, inputs, _ = trajectory
    model = copy.deepcopy(model).bfloat16().to(DEVICE)
    optimizer = prepare_on(model, on(DEVICE, inputs), rank=8, penalty=1.0)
    group = optimizer.param_groups[0]
    assert group["basis"].dtype == torch.bfloat16 and group["params"][0].dtype == torch.float32
    first, *_ = descend(model, optimizer, on(DEVICE, batches))
    last, *_ = descend(model, optimizer, on(DEVICE, batches))
    assert last < first and optimizer.forgetting() > 0
