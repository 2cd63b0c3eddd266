"""FoLoRA: LoRA fine-tuning that keeps what the model knows. The method needs torch alone.

An unofficial reference implementation of "Foundation-Preserving Adaptation via Generalized
Rayleigh-Quotient Optimization" by Kim, de Wynter, Chen, Kim and Vikalo (arXiv 2606.00132). Numbers
such as 3.2, B.3 and Eq. 16 are the paper's. Part I below is the method: read it beside the paper.
Part II fits it to real models: skip it on a first reading. `python folora.py` runs a small example.

LoRA adds a trainable product B A to a frozen linear layer W0. It learns the task, but it also
changes what the layer does on all other text, and so the model forgets. FoLoRA asks of every
direction in the layer's input: how much does the task use it, and how much does the text of
pretraining? The answers are in two covariances of the input, C_pre on pretraining text and C_task
on the task. With H = C_pre + τ I, where τ is a small ridge, a change ΔA of A has

    forgetting   R(ΔA) = tr(ΔA H ΔAᵀ)        mean square change of A's output on old text, + τ |ΔA|²
    utility      U(ΔA) = tr(ΔA C_task ΔAᵀ)   mean square change of A's output on the task

With G, the gradient of the loss for A, FoLoRA's step of A is

    ΔA = -lr · Adam(G V) · diag(s) · Vᵀ

The columns v of V solve C_task v = γ H v: γ is what a step along v brings in utility for each unit
of forgetting that it costs. The gate s = γ / (γ + λ) lets useful directions pass and holds back the
others. A starts in the directions in which inputs from pretraining text are smallest on average.
That text needs no data set: it is sampled from the model itself.

    texts = folora.sample_calibration(model, tokenizer, 128)        # what must not be forgotten
    pretrain = [{"input_ids": text[None]} for text in texts]        # batches for model(**batch)
    optimizer = folora.prepare(model, pretrain, task_batches, lr=3e-3, rank=32)
    ...                                              # train as always: backward, step, zero_grad
    folora.save_adapter(model, "adapter")            # PEFT can load it; or folora.merge(model)

Letters. d_in and d_out are a layer's widths, r is the rank, k a number of directions.

    W0, W_res         (d_out, d_in)           weight            frozen; W = W_res + κ B A
    A, B              (r, d_in), (d_out, r)   lora_A, lora_B    the adapter, trained
    κ                 scalar                  scaling           alpha / r, or 1 without an alpha
    C_pre, C_task     (d_in, d_in)            C_pre, C_task     means of x xᵀ over tokens
    τ, H              scalar, (d_in, d_in)    tau, H            the ridge; H = C_pre + τ I
    V, γ              (d_in, k), (k,)         V, gamma          directions, utility per forgetting
    s, λ, s_min       (k,), scalars           gate, lam, s_min  gate, the γ of gate 1/2, its floor
    G, Ḡ              (r, d_in), (r, k)       G, G_bar          gradient for A; in V's coordinates
    m, v, t           (r, k), scalar          m, v, t           Adam's two moments, steps so far

Where we depart from the paper. What changes results is marked [ours] again where it happens. Each
switch switches one thing, and prepare(..., **folora.PAPER) switches the first four. The learning
rate, the rank and the amount of text are the caller's: the paper has 2e-5, 128 and 2,000 texts.

    the paper                               here, by default                  switch
    all d_in directions                     the 96 of largest γ               basis_rank=None
    floor of the gate: 0.3                  0                                 s_min=0.3
    B0 = κ⁻¹ W0 A0ᵀ, W0 becomes W_res       B0 = 0, W0 stays as it is         zero_start=False
    one learning rate for A and B           B's follows the size of W0        scale_lr_B=False
    no penalty on the whole update          none either, but see 3.3          penalty=0
    open: sums or means over tokens         means                             none
    open: the scale of C_pre and C_task     each in its own mean eigenvalues  none (unit_energy)
    open: the size of τ                     0.01 mean eigenvalues of C_pre    tau
    open: the size of κ                     1                                 alpha
    open: are responses part of C_task?     yes, all that the masks keep      task_batches
    open: the precision of each part        float64 solver, float32 A and B,  none
                                            bfloat16 V on a bfloat16 layer
    symmetric root H^(1/2)                  a Cholesky factor: the same V up  none
                                            to signs, for distinct γ
    a covariance for each layer             one for all that read one tensor  none
    samples in float16, from BOS, until     the model's dtype; from EOS if    none
    enough are accepted                     there is no BOS; gives up if
                                            nearly all are rejected
    (not treated) PEFT's other weights      plain Adam at a tenth of lr       none

Not included: weight decay, schedules, fused experts, offloading, FSDP,
DeepSpeed, MPS, GradScaler. Schedules and clipping belong to the training loop: see train_math.py.
"""
import functools
import inspect
import itertools
import json
import math
import re
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# ==================================================================================================
# Part I: the method
# ==================================================================================================

# The seven projections of a transformer block, which the paper adapts (Appendix B).
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- 3.1  Covariances: what a layer reads, on old text and on the task ---------------------------
#
# What must an update leave alone? Let X_pre (d_in, T) be a layer's inputs on T tokens of
# pretraining text, one column a token. If W0 changes by ΔW, then the block around it changes, to
# first order, by a fixed linear function of ΔW X_pre (Eq. 1-2). So ΔW X_pre has to stay small. At
# the start the adapted layer computes exactly W0 x. Later, with A = A0 + ΔA, B = B0 + ΔB and κ = 1,
# its output has changed by
#
#     ΔW X_pre = ΔB A0 X_pre + (B0 + ΔB) ΔA X_pre                                            (Eq. 3)
#
# The first term is small if A0 X_pre is: the start sees to that (B.3, below). For the second,
#
#     |(B0 + ΔB) ΔA X_pre| <= |B0 + ΔB|₂ |ΔA X_pre|                                          (Eq. 4)
#
# (|·| is the Frobenius norm, |·|₂ the largest singular value.) So what remains is to hold down
# |ΔA X_pre|² = tr(ΔA C_pre ΔAᵀ) with C_pre = X_pre X_preᵀ. One (d_in, d_in) matrix is all that we
# need to know of a text, however long it is. A small ridge τ makes every direction cost something.
# This is the forgetting; the same for the task, without a ridge, is the utility:
#
#     R(ΔA) = tr(ΔA H ΔAᵀ),  H = C_pre + τ I,        U(ΔA) = tr(ΔA C_task ΔAᵀ)             (Eq. 5-7)

def energy(M, C):
    """tr(M C Mᵀ): the mean square E|M x|² of the outputs for inputs x with C = E[x xᵀ].

    With M = ΔA it is R(ΔA) for C = H, and U(ΔA) for C = C_task (Eq. 5-7). M is (..., m, d), C is
    (..., d, d), the result is (...).
    """
    return ((M @ C) * M).sum((-2, -1))


@torch.inference_mode(False)       # inference tensors could not take part in training afterwards
@torch.no_grad()
def collect_covariances(model, batches, target_modules=TARGET_MODULES):
    """C_pre or C_task, depending on the text: the mean of x xᵀ over all tokens that a layer reads.

    model            any model that takes model(**batch)
    batches          an iterable of dicts. Where a batch has an "attention_mask" (batch, length),
                     tokens with mask 0 do not count. Flattened texts are read one by one
    target_modules   names of layers, or their ends, as in PEFT; "all-linear": all but the head
    returns          {name of a layer: (d_in, d_in), float32, on the CPU}. Layers that always read
                     the same tensors, such as q, k and v, have one and the same tensor here
    raises           ValueError if a layer reads no token, or numbers that are not finite
    """
    targets = find_targets(model, target_modules)       # {name: module}: Part II
    device = next(model.parameters()).device

    # q, k and v read one tensor, and so do gate and up. [ours] Its X Xᵀ is computed once, when the
    # first of them reads it, and added to a sum that belongs to just the layers that have read it.
    sums = {}              # a frozenset of layers -> Σ x xᵀ over the tokens that all of them read
    tokens = Counter()     # the same set -> the number of these tokens
    last_x, mask, product, count, readers = None, None, None, 0, set()

    def settle():
        """No other layer will read the last tensor: add its product to the sum of its readers."""
        if readers:
            key = frozenset(readers)
            if key in sums:
                sums[key] += product
            else:
                sums[key] = product
            tokens[key] += count
            readers.clear()

    def read(module, args, kwargs):
        """A hook that runs before each layer."""
        nonlocal last_x, product, count
        x = args[0] if args else next(iter(kwargs.values()))
        if x is not last_x:
            settle()
            last_x = x                                  # (batch, length, d_in)
            rows = real_tokens(x, mask).float()         # Xᵀ without padding, (count, d_in)
            product = rows.mT @ rows                    # X Xᵀ, (d_in, d_in)
            count = len(rows)
        readers.add(module)

    # Autocast would round the products to bfloat16.
    with plain_mode(model), torch.autocast(device.type, enabled=False), ExitStack() as stack:
        for module in targets.values():
            hook = module.register_forward_pre_hook(read, with_kwargs=True)
            stack.callback(hook.remove)
        for batch in arguments(model, batches, device):                      # Part II
            mask = batch.get("attention_mask")
            model(**batch)
            settle()
            last_x = None
    return means_by_layer(targets, sums, tokens)


def means_by_layer(targets, sums, tokens):
    """{name: mean of x xᵀ} from the sums of collect_covariances, which are overwritten.

    The paper writes X Xᵀ, a sum, and does not say whether it is divided by the number of tokens.
    [ours] We take the mean, which does not depend on how much text was read."""
    parts = defaultdict(tuple)      # a layer -> the sets that it is in, nearly always one
    for key, C in sums.items():
        C /= max(1, tokens[key])    # in place: the sums become means, and 0 where all was padding
        for module in key:
            parts[module] += (key,)

    covariances, shared = {}, {}
    for name, module in targets.items():
        keys = parts[module]
        total = sum(tokens[key] for key in keys)
        if total == 0:
            raise ValueError(f"{name} has read no token: leave it out of target_modules")
        if keys not in shared:
            C = sums[keys[0]]
            if len(keys) > 1:       # it shares an input with one layer here, with another there
                C = sum(tokens[key] / total * sums[key] for key in keys)
            if not C.isfinite().all():
                raise ValueError(f"{name} reads numbers that are not finite")
            shared[keys] = C.cpu()
        covariances[name] = shared[keys]
    return covariances


# ---- 3.2  The generalized eigenbasis: input directions by utility per unit of forgetting ---------
#
# Which input directions should an update use? A rank-one update ΔA = u vᵀ has the forgetting
# R = |u|² vᵀ H v (Eq. 6) and the utility U = |u|² vᵀ C_task v (Eq. 7). The ratio does not depend on
# u. It is the generalized Rayleigh quotient of v,
#
#     ρ(v) = U / R = vᵀ C_task v / vᵀ H v                                                 (Eq. 8-10)
#
# It is stationary exactly where C_task v = γ H v, and there ρ(v) = γ (Eq. 11-15). So these
# generalized eigenvectors, by falling γ, are the directions from the most to the least useful per
# unit of forgetting. They become the columns of V. V is not orthogonal: V Vᵀ is no projection. It
# is orthonormal in the metric of H instead, and it makes the utility diagonal:
#
#     Vᵀ H V = I,        Vᵀ C_task V = diag(γ)                                           (Eq. 16-17)

def with_ridge(C_pre, tau):
    """H = C_pre + τ I, (..., d, d) (Eq. 6)."""
    H = C_pre.clone()
    H.diagonal(dim1=-2, dim2=-1).add_(tau)
    return H


def generalized_eigenbasis(C_task, C_pre, tau, k=None):
    """Solve C_task v = γ H v with H = C_pre + τ I, exactly, for one layer or a stack of layers.

    C_task, C_pre   (..., d, d), symmetric, positive semidefinite, any floating dtype
    tau             the ridge, > 0: H has an inverse even where the text has no energy
    k               how many directions to keep, those of largest γ (None: all d, as in the paper)
    returns         gamma (..., k), falling, >= 0, and V (..., d, k), in the dtype of C_pre
    raises          torch.linalg.LinAlgError if H is not positive definite
    """
    # [ours] Everything is done in float64. If one massive activation holds nearly all the energy,
    # as at the first token of many models, the largest eigenvalue of H is up to d / τ times its
    # smallest: 1e5 for d = 1,000 and τ = 0.01. Float32 would then err by up to 1e5 · 1e-7: 1%.
    C_task = C_task.double()
    H = with_ridge(C_pre.double(), tau)                 # H = C_pre + τ I                   Eq. 6

    # [ours] Cholesky's method turns it into an ordinary symmetric eigenproblem. With H = L Lᵀ, L
    # lower triangular, and v = L⁻ᵀ e, C_task v = γ H v becomes (L⁻¹ C_task L⁻ᵀ) e = γ e.
    # The paper has the symmetric root H^(1/2) in place of L. Both give the same V, up to the signs
    # of its columns, and SAdam does the same with either sign. Only where two γ were exactly equal,
    # which does not happen with real data, could V also be rotated among their columns.
    L = torch.linalg.cholesky(H)                        # H = L Lᵀ, (..., d, d)
    half = torch.linalg.solve_triangular(L, C_task, upper=False)     # L⁻¹ C_task
    # C_task is symmetric, so the transpose of `half` is C_task L⁻ᵀ.
    M = torch.linalg.solve_triangular(L, half.mT, upper=False)       # M = L⁻¹ C_task L⁻ᵀ
    gamma, E = eigh(M)                                  # M = E diag(γ) Eᵀ                  Eq. 16

    # eigh sorts γ from small to large, and we want it to fall. Rounding can leave a γ below 0.
    gamma = gamma.flip(-1)[..., :k].clamp(min=0)        # (..., k)
    E = E.flip(-1)[..., :k]                             # (..., d, k)
    V = torch.linalg.solve_triangular(L.mT, E, upper=True)           # V = L⁻ᵀ E            Eq. 17
    return gamma.to(C_pre.dtype), V.to(C_pre.dtype)


# ---- 3.3  SAdam: Adam in the coordinates of V, its step gated along each direction ---------------
#
# How should A move? Write it in the coordinates of V, A = Ā Vᵀ: column i of Ā (r, k) says how much
# A uses direction i. By the chain rule the gradient for Ā is Ḡ = G V (Eq. 18-19), and a step ΔĀ is
# the step ΔA = ΔĀ Vᵀ (Eq. 24). The step needs the products G V and ΔĀ Vᵀ alone, and not Ā itself.
# [ours] With k < d_in it is A = Ā Vᵀ + N: the steps change Ā alone, and the rest N stays as it is
# in A0.
#
# In these coordinates forgetting is plain squared length, since Vᵀ H V = I:
#
#     R(ΔĀ Vᵀ) = |ΔĀ|² = Σ_i |ΔĀ_i|²,        U(ΔĀ Vᵀ) = Σ_i γ_i |ΔĀ_i|²
#
# Adam moves every coordinate by about lr, however small its gradient is. So without a gate each
# direction would cost the same forgetting, about lr² for each row of A, whether its γ is 9 or 0.01.
# With the gate, below, it costs s² lr²: for λ = 1 that is 0.81 lr² or 0.0001 lr².

def spectral_gate(gamma, lam, s_min):
    """How much of Adam's step passes along each direction: s = max(γ / (γ + λ), s_min) (Eq. 22).

    With λ = 1 and s_min = 0, directions of γ = 9, 1 and 0.1 have the gates 0.9, 0.5 and 0.09.

    gamma     (..., k), >= 0
    lam       λ > 0, the γ whose gate is one half
    s_min     the floor, from 0 to 1
    returns   (..., k), from s_min to 1
    """
    gate = gamma / (gamma + lam)
    return gate.clamp(min=s_min)


def adam_direction(G, m, v, t, betas=(0.9, 0.999), eps=1e-8):
    """Adam's direction D for the gradient G: the step is -lr · D. The moments m and v, of G's
    shape, are updated in place. t counts the steps from 1."""
    beta1, beta2 = betas
    m.mul_(beta1).add_(G, alpha=1 - beta1)              # m ← β₁ m + (1 - β₁) G             Eq. 20
    v.mul_(beta2).addcmul_(G, G, value=1 - beta2)       # v ← β₂ v + (1 - β₂) G²
    # m and v begin at 0, which makes them too small at first. Eq. 21 corrects that.
    m_hat = m / (1 - beta1 ** t)
    v_hat = v / (1 - beta2 ** t)
    return m_hat / (v_hat.sqrt() + eps)


def sadam_direction(G, V, gate, m, v, t, betas=(0.9, 0.999), eps=1e-8, P_bar=None):
    """SAdam's direction D for A: the step is ΔA = -lr · D (Eq. 18-24).

    G          (..., r, d), the loss's gradient for A
    V, gate    (..., d, k) and (..., k), from generalized_eigenbasis and spectral_gate
    m, v, t    moments (..., r, k), updated in place, and the number of this step, from 1
    P_bar      (..., r, k), a gradient for Ā to add, such as the penalty's below, or None
    returns    D (..., r, d), and D̄ (..., r, k), the same in V's coordinates: D = D̄ Vᵀ
    """
    # [ours] V may be bfloat16, which halves its memory. Then both products with V are computed in
    # bfloat16.
    G_bar = (G.to(V.dtype) @ V).to(m.dtype)             # Ḡ = G V, (..., r, k)           Eq. 18-19
    if P_bar is not None:
        G_bar = G_bar + P_bar                           # [ours]
    D_bar = adam_direction(G_bar, m, v, t, betas, eps)  # (..., r, k)                    Eq. 20-21
    # The gate acts on the step. A factor on the gradient would be divided out again by √v̂.
    D_bar = D_bar * gate[..., None, :]                  # column i times s_i             Eq. 23
    D = (D_bar.to(V.dtype) @ V.mT).to(G.dtype)          # D = D̄ Vᵀ, (..., r, d)          Eq. 24
    return D, D_bar


# ---- 3.3, continued  [ours] A penalty on what all steps together have changed --------------------
#
# The gate makes each step cheap. But steps add up, and in a long run their sum can forget much.
# What has the whole update ΔW = κ (B A - B0 A0) changed so far? The paper's R tells: R(ΔW) is the
# mean square change of the layer's output on pretraining text. We hold it against R(W0), the mean
# square of the output itself, and let the sum over the layers join the loss, with a weight w:
#
#     P = w/2 Σ R(ΔW) / R(W0)
#
# This needs no old text while training, and not even H. In V's coordinates A0 = Ā0 Vᵀ + N, where
# Ā0 = A0 H V. The rest N has no part in V, since N H V = A0 H V - Ā0 Vᵀ H V = 0. No step changes N,
# so that later A = Ā Vᵀ + N, and
#
#     B A - B0 A0 = E Vᵀ + (B - B0) N      with      E = B Ā - B0 Ā0
#     R(B A - B0 A0) = |E|² + tr((B - B0) N H Nᵀ (B - B0)ᵀ)
#
# by Pythagoras in the metric of H. So all that SAdam needs is Ā, which it moves along with A, and
# the small matrix N H Nᵀ. The gradients of R / 2 are Bᵀ E for Ā and E Āᵀ + (B - B0) N H Nᵀ for B.

def start_in_coordinates(A0, V, C_pre, tau):
    """Ā0 = A0 H V (..., r, k) and N H Nᵀ (..., r, r) of a start A0 (..., r, d), in float64.

    V is (..., d, k), with Vᵀ H V = I, and C_pre (..., d, d). H = C_pre + τ I."""
    A0, V = A0.double(), V.double()
    H = with_ridge(C_pre.double(), tau)
    A0_bar = A0 @ H @ V                                 # Ā0
    # A0 H A0ᵀ = Ā0 Ā0ᵀ + N H Nᵀ, since N H V = 0
    NHN = A0 @ H @ A0.mT - A0_bar @ A0_bar.mT
    return A0_bar, NHN


def update_energy(A_bar, B, NHN, A0_bar, B0=None):
    """R(B A - B0 A0), and the gradients of R / 2 for Ā and B.

    A_bar, A0_bar   Ā and Ā0, (..., r, k)
    B, B0           (..., d_out, r). B0 None: 0
    NHN             N H Nᵀ, (..., r, r)
    returns         (...), (..., r, k) and (..., d_out, r)
    """
    E, dB = B @ A_bar, B                                # (..., d_out, k), (..., d_out, r)
    if B0 is not None:
        E, dB = E - B0 @ A0_bar, B - B0
    R = (E * E).sum((-2, -1)) + energy(dB, NHN)
    return R, B.mT @ E, E @ A_bar.mT + dB @ NHN


class SAdam(torch.optim.Optimizer):
    """Adam with a spectral gate for the matrices A, and plain Adam for all else (3.3).

    params    parameters or groups, as for torch.optim.Adam. A group may have "basis" V (d, k) and
              "gate" (k,): its parameters (r, d) then move by sadam_direction. Groups without a
              basis get torch.optim.Adam's numbers. A group's "scale" multiplies its learning rate
    lr        learning rate. A schedule may change each group's "lr" at any time
    betas     decay of the two moments
    eps       added to √v̂
    penalty   [ours] w, the weight of P, for groups of A that say how R(ΔW) is found, as those of
              `attach` do: "A0_bar" Ā0 (r, k) and "NHN" N H Nᵀ (r, r), and for each of its A in
              turn the index of B's group in "partners" and κ² / R(W0) in "shares". B's group may
              have a "B0" (d_out, r). A partner None: the parameter is W itself (Appendix D)

    state_dict holds the bases, too. The signs of V do not matter to a run that keeps one V, but a V
    that is computed again may have others, and the saved moments are in the old coordinates. In the
    paper B is trained by AdamW without weight decay, which is Adam.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, penalty=0.0):
        defaults = dict(lr=lr, betas=betas, eps=eps, penalty=penalty, scale=1.0, basis=None,
                        gate=None, A0_bar=None, NHN=None, A0_mark=None, partners=(), shares=(),
                        B0=None)
        super().__init__(params, defaults)
        check_groups(self.param_groups)                                      # Part II

    @torch.no_grad()
    def step(self, closure=None):
        """One step on all parameters that have a gradient. Returns the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = with_gradients(self.param_groups)      # Part II
        extra = {}                                      # the gradients of P, Ā's under A
        if any(group["penalty"] > 0 for group in groups):
            for _, gradients, w in self._updates():
                extra |= {p: w * gradient for p, gradient in gradients.items()}
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, extra.get(p))
        return loss

    def _update(self, p, group, extra):
        G, V, gate = p.grad, group["basis"], group["gate"]
        require_float32(p)                              # Part II
        state = self.state[p]
        if not state:                                   # the first step of p
            shape = G.shape if V is None else (*G.shape[:-1], V.shape[-1])
            state["step"] = 0
            state["exp_avg"] = G.new_zeros(shape)       # m, as torch.optim.Adam calls it
            state["exp_avg_sq"] = G.new_zeros(shape)    # v
            if group["partners"]:
                state["A_bar"] = first_A_bar(p, group)  # Ā. Part II
        state["step"] += 1
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
        betas, eps = group["betas"], group["eps"]
        lr = group["lr"] * group["scale"]
        if V is None:
            if extra is not None:
                G = G + extra
            p.sub_(lr * adam_direction(G, m, v, t, betas, eps))
        else:
            D, D_bar = sadam_direction(G, V, gate, m, v, t, betas, eps, extra)
            p.sub_(lr * D)                              # A ← A + ΔA,  ΔA = -lr · D
            if "A_bar" in state:
                state["A_bar"].sub_(lr * D_bar)         # Ā ← Ā + ΔĀ

    def _updates(self):
        """For each adapted layer R(ΔW) / R(W0), the gradients {parameter: gradient} of half of it,
        Ā's under A, and w."""
        for group in self.param_groups:
            for A, number, share in zip(group["params"], group["partners"], group["shares"]):
                if A in self.state:
                    A_bar = self.state[A]["A_bar"]
                else:
                    A_bar = first_A_bar(A, group)       # Part II
                if number is None:                      # Appendix D: ΔW = Ā Vᵀ, R(ΔW) = |Ā|²
                    yield share * A_bar.square().sum(), {A: share * A_bar}, group["penalty"]
                    continue
                r = len(A)                              # PEFT's rank_pattern may have cut A0
                A0_bar, NHN = group["A0_bar"][:r], group["NHN"][:r, :r]
                partner = self.param_groups[number]
                [B] = partner["params"]
                R, grad_A_bar, grad_B = update_energy(A_bar, B, NHN, A0_bar, partner["B0"])
                yield share * R, {A: share * grad_A_bar, B: share * grad_B}, group["penalty"]

    @torch.no_grad()
    def forgetting(self):
        """[ours] The mean over the layers of R(ΔW) / R(W0): by which share of their mean square the
        adapters have changed the layers' outputs on pretraining text. It takes no forward pass.
        nan where A was loaded or changed without this optimiser's knowledge."""
        shares = [share.item() for share, _, _ in self._updates()]
        return sum(shares) / len(shares) if shares else math.nan

    def load_state_dict(self, state_dict):
        """As torch's. ValueError if the state was saved with bases or moments of other shapes."""
        check_state(self.param_groups, state_dict)                           # Part II
        super().load_state_dict(state_dict)
        move_bases(self.param_groups)                                        # Part II


# ---- B.3  The start: A0 reads what pretraining text hardly has -----------------------------------
#
# Where should A begin? ΔB A0 X_pre, the first term of Eq. 3, grows with B. It stays small if the
# rows of A0 are the directions in which pretraining text has the least energy, the eigenvectors
# U_perp (d, r) of C_pre with the smallest eigenvalues. Then A0 = U_perpᵀ, and |A0 X_pre|² is the
# sum of the r smallest eigenvalues, the least that r orthonormal rows can have.
#
# And B? The paper lets the adapter take over what W0 does along these directions, so that the
# layer still computes W0 x at the start:
#
#     B0 = κ⁻¹ W0 U_perp,        W_res = W0 - κ B0 A0,        W_res + κ B0 A0 = W0
#
# [ours] We begin with B0 = 0, as LoRA does: W0 stays as it is. In bfloat16 the rounding of W_res
# would change the model before the first step, and an adapter could not simply be taken off again.

def null_space(C_pre, rank):
    """A0 = U_perpᵀ: the eigenvectors of C_pre with the smallest eigenvalues, as rows (B.3).

    C_pre     (..., d, d), symmetric, positive semidefinite
    rank      r <= d
    returns   (..., r, d), orthonormal rows, in the dtype of C_pre
    """
    _, U = eigh(C_pre.double())                         # columns by rising eigenvalue
    U_perp = U[..., :rank]                              # (..., d, r)
    return U_perp.mT.to(C_pre.dtype).contiguous()


def paper_start(W0, A0, kappa):
    """The paper's B0 = κ⁻¹ W0 U_perp, (d_out, r), for W0 (d_out, d_in) and A0 (r, d_in)."""
    W0 = W0.float()
    return W0 @ A0.to(W0).mT / kappa


class LoRALinear(nn.Linear):
    """y = W_res x + κ B A x + bias: a frozen nn.Linear and a trainable adapter of rank r.

    linear    the layer to adapt. Its weight and bias are taken over, and the weight is frozen
    A0        the start of A, (r, d_in)
    B0        the start of B, (d_out, r). None: 0, as in LoRA. Else W_res = W0 - κ B0 A0
    alpha     κ = alpha / r. None: κ = 1

    [ours] A and B are float32 whatever the layer is, since small steps would be rounded away in
    bfloat16. The class is an nn.Linear, so that code which looks for one still finds it. But
    from_pretrained knows no lora_A and ignores it without an error: use save_adapter or merge.
    """

    def __init__(self, linear, A0, B0=None, alpha=None):
        d_out, d_in, rank = linear.out_features, linear.in_features, len(A0)
        super().__init__(d_in, d_out, bias=False, device="meta")             # no memory yet
        self.scaling = alpha / rank if alpha else 1.0   # κ
        device = linear.weight.device
        A0 = A0.to(device, torch.float32)
        W = linear.weight.detach()
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        if B0 is None:
            B0 = A0.new_zeros(d_out, rank)
        else:
            B0 = B0.to(device, torch.float32)
            W_res = W.float() - self.scaling * B0 @ A0  # W_res = W0 - κ B0 A0               B.3
            W = W_res.to(W.dtype)
            # What is learned is W - W0 = κ (B A - B0 A0), so A0 and B0 are kept.
            self.start_A, self.start_B = A0.clone(), B0.clone()
        self.weight = nn.Parameter(W, requires_grad=False)
        self.bias = linear.bias
        self.lora_A = nn.Parameter(A0.clone())
        self.lora_B = nn.Parameter(B0.clone())

    def forward(self, input):
        x = input                                       # (..., d_in)
        Ax = x @ self.lora_A.to(x.dtype).mT             # (..., r)
        BAx = Ax @ self.lora_B.to(x.dtype).mT           # (..., d_out)
        return F.linear(x, self.weight, self.bias) + self.scaling * BAx


# ---- 3.4, B.4  Pretraining text from the model itself --------------------------------------------
#
# Where does the text behind C_pre come from? The data that a model was pretrained on is seldom
# public. But a good model is close to it. Smooth the true next-token distribution by a share α (not
# LoRA's alpha). If the model's logits are within η of its log-probabilities after every prefix that
# can occur, then Theorem 3.1 bounds the divergence KL(true || model) of texts of T tokens by
# T (2 η - log(1 - α)). So we sample from the model itself, from nothing but the token that begins a
# text (Eq. 27). Only this part needs a Hugging Face model.

# B.4: the share of the samples, and how they are drawn.
DECODING = (
    (0.7, dict(temperature=1.0, top_p=1.0, top_k=0)),
    (0.2, dict(temperature=1.0, top_p=0.95, top_k=0)),
    (0.1, dict(temperature=1.2, top_p=0.98, top_k=50)),
)


def is_degenerate(tokens):
    """Whether B.4's screen rejects a text, a list of token ids, as too short or too repetitive."""
    n = len(tokens)
    if n < 32:
        return True
    longest_run = max(len(list(run)) for _, run in itertools.groupby(tokens))
    if longest_run >= 20:
        return True
    if n >= 128 and len(set(tokens)) / n < 0.12:        # the share of different tokens
        return True
    if n >= 256:
        fours = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))
        return len(set(fours)) / len(fours) < 0.25      # and of different 4-grams
    return False


def sample_calibration(model, tokenizer, num_samples, min_new_tokens=128, max_new_tokens=512,
                       batch_size=64, seed=0, progress=None):
    """Sample pretraining text from the model by B.4's protocol (Eq. 27).

    model, tokenizer   a Hugging Face decoder-only model and its tokenizer
    num_samples        how many texts; the paper has 2,000
    min_new_tokens     no end of sequence before so many tokens; the paper's 128
    max_new_tokens     a text is cut there; the paper's 512
    batch_size         texts that are sampled side by side, [ours] in the model's dtype
    seed               the texts depend on it, and on batch_size, device and dtype. The global
                       random state is left as it was
    progress           called with 1 for each accepted text, such as the update of a tqdm bar
    returns            a list of LongTensors (length,), each from its begin-of-sequence token on,
                       without its end-of-sequence token
    raises             RuntimeError if nearly all texts are degenerate or duplicates
    """
    check_sampling(model, num_samples, min_new_tokens, max_new_tokens, batch_size)      # Part II
    bos, ends = start_and_end_tokens(model, tokenizer)  # Part II
    device = model.device
    how = dict(do_sample=True, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens,
               eos_token_id=ends, pad_token_id=ends[0])
    shares = torch.tensor([share for share, _ in DECODING])
    accepted, seen, rejected, waiting = [], set(), 0, []
    with plain_mode(model), own_random_state(device, seed):
        while len(accepted) < num_samples:
            # Each missing text draws its decoding. Sorted, so that texts of one decoding stand
            # together and one call of generate can sample up to batch_size of them.
            if not waiting:
                missing = num_samples - len(accepted)
                drawn = torch.multinomial(shares, missing, replacement=True)
                waiting = sorted(drawn.tolist())
            kind = waiting[0]
            count = min(batch_size, waiting.count(kind))
            waiting = waiting[count:]
            start = torch.full((count, 1), bos, device=device)
            mask = torch.ones_like(start)
            _, decoding = DECODING[kind]
            rows = model.generate(start, attention_mask=mask, **decoding, **how)
            for row in rows[:, 1:].tolist():            # without the BOS
                tokens = list(itertools.takewhile(lambda token: token not in ends, row))
                text = tokenizer.decode(tokens)
                if text in seen or is_degenerate(tokens):
                    rejected += 1
                else:
                    accepted.append(torch.tensor([bos, *tokens]))
                    if progress:
                        progress(1)
                seen.add(text)
            # [ours] The paper repeats until it has enough. A model that only repeats itself would
            # never get there.
            if rejected > 64 + 10 * len(accepted):
                raise RuntimeError(f"the model's own text is degenerate: {rejected} samples were "
                                   f"rejected and {len(accepted)} accepted. Give other texts")
        # They stand in the order of their decoding: shuffle, so that the first n are a sample, too.
        return [accepted[i] for i in torch.randperm(num_samples)]


# ---- The recipe ----------------------------------------------------------------------------------

# The paper's values of the arguments whose defaults may differ: prepare(..., **folora.PAPER).
PAPER = dict(lam=1.0, s_min=0.3, basis_rank=None, zero_start=False, scale_lr_B=False, penalty=0.0)

# One call of eigh gets a stack of at most this many bytes, but at least one matrix. About eight
# such stacks exist at a time. 64 MiB are 25 layers of width 576, or 2 of width 2,048.
STACK_BYTES = 2 ** 26


def unit_energy(C):
    """C / (its mean eigenvalue), (..., d, d). An input that is always 0 stays 0.

    [ours] The paper leaves the scale open. C_pre and C_task are each divided by their own mean
    eigenvalue. γ then compares which share of the task's energy E|x|² a direction has with which
    share of the pretraining text's, so that the same τ, λ and learning rate can serve every layer.
    """
    mean = C.diagonal(dim1=-2, dim2=-1).mean(-1)        # trace / d, the mean eigenvalue
    return C / mean.clamp(min=1e-30)[..., None, None]


def decompose(model, C_pre, C_task, rank, tau=0.01, basis_rank=None, progress=None, device="cpu"):
    """From covariances to directions: A0, V and γ of every input that the adapted layers read.

    model           its weights are read for R(W0)
    C_pre, C_task   from collect_covariances
    rank            r, the rows of A0
    tau             [ours] the ridge, in mean eigenvalues of C_pre
    basis_rank      k, how many directions to keep (None: all)
    progress        called with the number of inputs that have been solved
    device          where to solve. A GPU is many times faster
    returns         [{"modules": names of layers that share an input, "A0": (rank, d_in),
                    "gamma": (k,), "V": (d_in, k), "A0_bar": (rank, k), "NHN": (rank, rank),
                    "W0_energy": R(W0) of each of the layers}], tensors on the CPU
    """
    check_covariances(C_pre, C_task, rank, tau, basis_rank)                  # Part II
    inputs = {}                                         # the two matrices -> the layers they serve
    for name in C_pre:
        key = id(C_pre[name]), id(C_task[name])
        inputs.setdefault(key, []).append(name)
    groups = list(inputs.values())                      # q, k and v are one group

    by_first = {names[0]: names for names in groups}
    solved = {}                                         # a group's first layer -> its directions
    for names in stacks_of_equal_width(groups, C_pre):  # Part II
        pre = torch.stack([C_pre[name] for name in names]).to(device)        # (n, d, d)
        task = torch.stack([C_task[name] for name in names]).to(device)      # (n, d, d)
        pre, task = unit_energy(pre), unit_energy(task)
        gamma, V = generalized_eigenbasis(task, pre, tau, basis_rank)        # (n, k), (n, d, k)
        A0 = null_space(pre, rank)                                           # (n, r, d)
        A0_bar, NHN = start_in_coordinates(A0, V, pre, tau)                  # (n, r, k), (n, r, r)
        for i, name in enumerate(names):
            H = with_ridge(pre[i], tau)
            W0s = [read_weight(model.get_submodule(n)) for n in by_first[name]]   # Part II
            W0_energy = torch.stack([energy(W0.to(device), H) for W0 in W0s])     # R(W0)
            directions = {"A0": A0[i], "gamma": gamma[i], "V": V[i], "A0_bar": A0_bar[i].float(),
                          "NHN": NHN[i].float(), "W0_energy": W0_energy}
            solved[name] = {key: own_copy(t) for key, t in directions.items()}
        if progress:
            progress(len(names))
    return [{"modules": names, **solved[names[0]]} for names in groups]


@torch.inference_mode(False)
@torch.no_grad()
def attach(model, bases, lr, alpha=None, lam=1.0, s_min=0.0, zero_start=True, scale_lr_B=True,
           penalty=0.0):
    """Put adapters on the layers of `bases`, freeze all else, and return their optimiser.

    model        adapted in place
    bases        from decompose
    returns      SAdam, with one parameter group for all A that share an input, and one for each B
    others       as in prepare
    """
    check_and_freeze(model, bases, lr=lr, alpha=alpha, lam=lam, s_min=s_min,
                     penalty=penalty)                   # Part II
    spectral, plain = [], []
    for basis in bases:
        A0, V = basis["A0"], basis["V"]
        gate = spectral_gate(basis["gamma"], lam, s_min)
        As, partners, shares = [], [], []
        for name, W0_energy in zip(basis["modules"], basis["W0_energy"].tolist()):
            layer = model.get_submodule(name)
            length = row_length(layer)                  # ℓ of W0's rows: Part II
            if has_adapter(layer):                      # another library's: Part II
                restart_adapter(layer, A0)
            else:
                kappa = alpha / len(A0) if alpha else 1.0
                B0 = None                               # [ours] B starts at 0
                if not zero_start:
                    B0 = paper_start(layer.weight, A0, kappa)
                layer = replace(model, name, LoRALinear(layer, A0, B0, alpha))         # Part II
            [(A, B, kappa)] = factors(layer)            # Part II
            As.append(A)

            # How fast should B learn? Adam moves all entries of B by about lr a step. [ours] Let ℓ
            # be the root mean square length of W0's rows. With this scale the first step changes
            # each row of κ B by a vector of length lr · ℓ, so that one lr serves layers and models
            # of every size. A needs no scale: in V's coordinates a step of size lr always costs
            # the same forgetting.
            scale = 1.0
            if scale_lr_B:
                scale = length / (math.sqrt(len(A)) * kappa)
            # B's group comes after one group for each of the bases.
            partners.append(len(bases) + len(plain))
            shares.append(share_of(layer, kappa, W0_energy, penalty))        # Part II
            plain.append({"params": [B], "scale": scale, "B0": getattr(layer, "start_B", None)})
        # [ours] V is bfloat16 on a bfloat16 layer and float32 on any other. Small gradients would
        # vanish in float16.
        device, dtype = As[0].device, torch.float32
        if layer.weight.dtype == torch.bfloat16:        # the layers of one input have one dtype
            dtype = torch.bfloat16
        spectral.append({
            "params": As, "basis": V.to(device, dtype), "gate": gate.to(device),
            "partners": partners, "shares": shares, "A0_bar": basis["A0_bar"].to(device),
            "NHN": basis["NHN"].to(device), "A0_mark": mark(A0).to(device)})
    groups = spectral + plain + other_groups(model, spectral + plain)
    optimizer = SAdam(groups, lr, penalty=penalty)
    guard(model, bases, spectral + plain)               # Part II: against a Trainer's own AdamW
    return optimizer


@torch.no_grad()
def attach_dense(model, bases, lr, lam=1.0, s_min=0.0, penalty=0.0):
    """Appendix D: no adapters. SAdam moves the weights of the layers of `bases` themselves, W
    (d_out, d_in) in place of A, along the k directions that are kept: the moments are (d_out, k).

    [ours] A layer's rate is lr · ℓ, where ℓ is the root mean square length of W0's rows, so that
    one lr serves layers of every size. The arguments are those of `attach`. Returns SAdam."""
    check_and_freeze(model, bases, lr=lr, lam=lam, s_min=s_min, penalty=penalty)        # Part II
    groups = []
    for basis in bases:
        V, gate = basis["V"], spectral_gate(basis["gamma"], lam, s_min)
        for name, W0_energy in zip(basis["modules"], basis["W0_energy"].tolist()):
            layer = model.get_submodule(name)
            W = layer.weight.requires_grad_(True)
            require_float32(W)                          # Part II
            groups.append({
                "params": [W], "scale": row_length(layer),
                "basis": V.to(W), "gate": gate.to(W), "A0_mark": mark(W),
                "A0_bar": W.new_zeros(len(W), len(gate)),                    # Ā, of ΔW, starts at 0
                "partners": [None], "shares": [1 / (W0_energy or 1.0)]})
    optimizer = SAdam(groups, lr, penalty=penalty)
    guard(model, bases, groups)                         # Part II
    return optimizer


def prepare(model, pretrain_batches, task_batches, lr, rank=128, alpha=None, tau=0.01, lam=1.0,
            s_min=0.0, target_modules=TARGET_MODULES, zero_start=True, basis_rank=96,
            scale_lr_B=True, penalty=0.0, dense=False, cache=None, passes=1):
    """FoLoRA in one call: adapt a model in place, freeze the rest, and return its optimiser.

    Move the model to its device and dtype before. A PEFT model keeps its own rank, alpha, targets
    and whatever else is trainable in it.

    pretrain_batches   dicts for model(**batch), of text that must not be forgotten
    task_batches       the same of the target task; the paper has 256 examples
    lr                 learning rate of A. B's is scaled, see scale_lr_B
    rank, alpha        of the adapters. κ = alpha / rank. [ours] alpha None: κ = 1
    tau                [ours] the ridge τ, in mean eigenvalues of C_pre
    lam                λ, the γ at which the gate is one half. A larger λ slows both
                       learning and forgetting
    s_min              the gate's floor. [ours] 0; the paper has 0.3
    target_modules     names of layers or their ends, or "all-linear"
    zero_start         [ours] True: B starts at 0. False: the paper's B0 = κ⁻¹ W0 A0ᵀ
    basis_rank         [ours] k, the directions in which A may move; 96 to save memory. None: all,
                       as in the paper. A larger k allows more learning and more forgetting
    scale_lr_B         [ours] True: B's rate is lr · ℓ / (κ √r), where ℓ is the root mean square
                       length of W0's rows. False: B has A's rate, as in the paper
    penalty            [ours] w, the weight of P, which keeps the sum of all steps from forgetting
                       much. 0: none, as in the paper
    dense              True: Appendix D. No adapters: the float32 weights themselves are trained,
                       and model.save_pretrained saves them. rank, alpha, zero_start and scale_lr_B
                       have no meaning then
    cache              a file for what is slow here, the directions. Where it exists, they are read
                       from it, also with another lr, alpha, lam, s_min, penalty or a smaller rank
                       or basis_rank, and no batch is read. Else they are computed and written
    passes             C_pre and C_task together take 8 d_in² bytes for each input of a layer, first
                       on the GPU, then in host memory: 44 GB for Llama-2-7B. With n passes the
                       layers are prepared in n parts, one after another, in an n-th of it. The
                       batches, which must be lists then, are read n times
    returns            SAdam
    raises             ValueError: for bad arguments or layers, or a cache that was made for
                       others, before the model has run; for a layer that reads no token, or numbers
                       that are not finite, after it
    """
    check_numbers(lr=lr, alpha=alpha, tau=tau, lam=lam, s_min=s_min, basis_rank=basis_rank,
                  penalty=penalty)                                           # Part II
    rank = check_model(model, target_modules, rank, zero_start, dense)       # Part II
    check_batches((pretrain_batches, task_batches), passes)                  # Part II
    device = next(model.parameters()).device

    if cache and Path(cache).exists():
        names = find_targets(model, target_modules)
        found = load_prepared(cache)                                         # Part II
        bases = unpack_prepared(found, cache, model, names, rank, tau, basis_rank)
    else:
        bases = []
        for part in parts(model, target_modules, passes):                    # Part II
            C_pre = collect_covariances(model, pretrain_batches, part)                     # 3.1
            C_task = collect_covariances(model, task_batches, part)
            bases += decompose(model, C_pre, C_task, rank, tau, basis_rank, device=device)  # 3.2
            del C_pre, C_task                           # before the next part's are summed
        if cache:
            tokens = [count_tokens(some) for some in (pretrain_batches, task_batches)]
            save_prepared(cache, pack_prepared(model, bases, tau, basis_rank, tokens))
    bases = same_in_all_processes(bases)                                     # Part II
    if dense:
        return attach_dense(model, bases, lr, lam, s_min, penalty)           # Appendix D
    return attach(model, bases, lr, alpha, lam, s_min, zero_start, scale_lr_B, penalty)


@torch.no_grad()
def merge(model):
    """Put an nn.Linear with W = W_res + κ B A in place of each LoRALinear. Returns the model."""
    for name, layer in adapted_layers(model).items():   # Part II
        BA = layer.lora_B @ layer.lora_A
        W = layer.weight.float() + layer.scaling * BA   # float32, and rounded once
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(W.to(layer.weight.dtype), requires_grad=False)
        linear.bias = layer.bias
        replace(model, name, linear)                    # Part II
    return model


# ==================================================================================================
# Part II: fitting it to real models
# ==================================================================================================
#
# Nothing below is in the paper. Each function says what breaks without it.

# ---- Which layers are adapted, and whose adapters they have --------------------------------------

def factors(layer):
    """[(A, B, κ)] of a layer: one for a LoRALinear, one for each active adapter of PEFT's.

    PEFT keeps them in dicts under the adapters' names. No peft is imported: its layers are known by
    a lora_A that is an nn.ModuleDict."""
    if is_ours(layer):
        return [(layer.lora_A, layer.lora_B, layer.scaling)]
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
            for name in names]


def has_adapter(layer):
    return bool(factors(layer))


def is_ours(layer):
    """Whether it is a LoRALinear. isinstance would not know one from before importlib.reload."""
    return hasattr(layer, "start_A")


def is_peft_model(model):
    """Also inside a wrapper, such as a value head, or with layers from inject_adapter_in_model."""
    return any(hasattr(m, "peft_config") or isinstance(getattr(m, "lora_A", None), nn.ModuleDict)
               for m in model.modules())


def adapted_layers(model):
    """{name: LoRALinear}, never empty: merge and save_adapter would do nothing, and say nothing."""
    layers = {name: m for name, m in model.named_modules() if is_ours(m)}
    if not layers:
        raise ValueError("no LoRALinear is here: PEFT's own models have save_pretrained and "
                         "merge_and_unload")
    return layers


def find_targets(model, target_modules=TARGET_MODULES, rank=1):
    """The layers to adapt, {full name: module}, in the model's order.

    In a PEFT model they are those that PEFT has wrapped, and target_modules is not used. Else they
    are each nn.Linear whose name ends in one of target_modules, or with "all-linear" every one but
    the output head. ValueError: a layer cannot be adapted, or not with this rank."""
    wrapped = {name: m for name, m in model.named_modules() if has_adapter(m)}
    for name, module in wrapped.items():
        check_adapter(model, name, module)
    if wrapped:
        return wrapped
    if is_peft_model(model):        # IA3 or prompt tuning: plain adapters would stand beside it
        raise ValueError("this PEFT model has no active LoRA adapter of a linear layer, and FoLoRA "
                         "trains no other kind: give the model without PEFT")

    # The model itself, whose name is empty, cannot be replaced.
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name}
    head = None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    if isinstance(target_modules, str):
        target_modules = [target_modules]
    found = set()
    for end in target_modules:
        some = {name for name, m in linears.items() if f".{name}".endswith(f".{end}")}
        if end == "all-linear":
            some = {name for name, m in linears.items() if m is not head}
        if not some:
            raise ValueError(no_linear(model, end, linears))
        found |= some
    if not found:
        raise ValueError("target_modules names no layer")

    targets = {name: m for name, m in linears.items() if name in found}
    owners = owners_of_weights(model)
    for name, m in targets.items():
        check_linear(model, name, m, owners)
        check_rank(rank, m.in_features, name)
    return targets


def no_linear(model, end, linears):
    """Why no layer was found: GPT-2's Conv1D and GPTQ's layers have the name, but another class."""
    classes = {type(m).__name__ for name, m in model.named_modules()
               if f".{name}".endswith(f".{end}")}
    if classes:
        return f"{end} is a {min(classes)}, no plain nn.Linear: get_peft_model may adapt it"
    names = sorted({name.split(".")[-1] for name in linears})
    return f"no nn.Linear is called {end}: there are {names}"


def owners_of_weights(model):
    """{the id of a parameter: its names}, of which it has several where it is tied."""
    owners = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)].append(name)
    return owners


def check_linear(model, name, layer, owners):
    """Refuse a layer that LoRALinear would change or break, and say which of the reasons it is."""
    check_called(model, name)
    weight = vars(layer)["_parameters"].get("weight")
    others = [other for other in owners[id(weight)] if other != f"{name}.weight"]
    if hasattr(layer, "parametrizations"):
        # LoRALinear would take the weight of this moment, and what computes it would be gone.
        cause = "is parametrised: call torch.nn.utils.parametrize.remove_parametrizations before"
    elif weight is None:
        cause = ("has a computed weight, as pruning and weight or spectral norm make it: call "
                 "prune.remove or remove_weight_norm or remove_spectral_norm before")
    elif "forward" in vars(layer):
        # LoRALinear has another forward. accelerate's offloading replaces it, for one.
        cause = "has a forward of its own, which something has set, such as offloading: undo it"
    elif type(weight) is not nn.Parameter or weight.element_size() < 2:
        # The weights of bitsandbytes, torchao and others cannot be read as plain numbers.
        cause = "is quantised (use get_peft_model)"
    elif type(layer) is not nn.Linear:
        # A subclass may compute something else than a linear map.
        cause = f"is a {type(layer).__name__}, no plain nn.Linear: get_peft_model may adapt it"
    elif weight.is_meta:
        cause = "has no numbers yet: it is on the meta device"
    elif others:
        # Merging one layer's adapter into a weight that two share would change both.
        cause = f"shares its weight with {others[0]}: name others in target_modules"
    else:
        return
    raise ValueError(f"{name} {cause}")


def check_called(model, name):
    """Refuse a layer that its parent does not call. nn.MultiheadAttention, the fast path of
    nn.TransformerEncoderLayer and the kernels of Mamba read the weight themselves, on some devices
    or in one mode only. There the model would run without the adapter, and nothing would say so.

    The parent's code is searched for a use of the weight as a whole: x.weight.dtype is harmless."""
    parent, _, child = name.rpartition(".")
    kind = type(model.get_submodule(parent))
    use = rf"(?<!isinstance\()\bself\.{child}\.weight(\.t\(\)|\.m?T)?\s*[,)@]"
    if re.search(use, forward_source(kind)):
        raise ValueError(f"{name} may not be called: {kind.__name__} reads its weight itself, and "
                         "an adapter would be ignored. Name other layers in target_modules")


@functools.cache
def forward_source(kind):
    """The text of a class's methods called forward, torch_forward, cuda_kernels_forward and so on.
    A class that was typed into a console has none, and is trusted."""
    texts = []
    for name in ("forward", *dir(kind)):
        if name == "forward" or "forward" in name and not hasattr(nn.Module, name):
            try:
                texts.append(inspect.getsource(getattr(kind, name)))
            except (OSError, TypeError):
                pass
    return "\n".join(texts)


def check_rank(rank, width, name):
    """null_space would return fewer rows than were asked for."""
    if not isinstance(rank, Integral) or not 0 < rank <= width:
        raise ValueError(f"rank {rank} is not from 1 to {width}, {name}'s width")


def check_adapter(model, name, layer):
    """PEFT has many kinds of adapters. Ours needs the plain one, at its start, and alone: SAdam
    would train anything else towards something that PEFT does not compute."""
    if is_ours(layer):      # attaching again would throw away what it has learned
        raise ValueError(f"{name} has an adapter from before: call merge, or load the model again")
    check_called(model, name)
    [(A, B, _), *more] = factors(layer)
    is_linear = A.ndim == 2 and not hasattr(layer, "parameter_name")         # target_parameters
    fresh = not B.any() and A.requires_grad
    if more or not is_linear or not fresh or len(A) > A.shape[1]:
        raise ValueError(f"{name} needs one linear, trainable adapter, B = 0, rank <= width: set "
                         "PEFT's init_lora_weights=True, or merge a trained adapter first")


def replace(model, name, layer):
    """Put a layer in another's place, with the hooks and the mode that its owner has set on it."""
    old = model.get_submodule(name)
    kept = {key: value for key, value in vars(old).items() if "hook" in key or key == "training"}
    vars(layer).update(kept)
    model.set_submodule(name, layer)
    return layer


def restart_adapter(layer, A0):
    """Let PEFT's adapter begin at A0 and B = 0. PEFT's rank_pattern may give a layer fewer rows."""
    [(A, B, _)] = factors(layer)
    A.data = A0[:len(A)].to(A.device, copy=True)
    B.data = torch.zeros_like(B, dtype=A0.dtype)


def share_of(layer, kappa, W0_energy, penalty):
    """κ² / R(W0), by which update_energy's result becomes R(ΔW) / R(W0). Where W0 is 0, R(ΔW).

    With DoRA the layer's weight is no sum of W0 and κ B A, and so its R(ΔW) is another."""
    if getattr(layer, "lora_magnitude_vector", None):
        if penalty > 0:
            raise ValueError("the penalty does not know DoRA's update: use penalty=0 or no DoRA")
        return math.nan
    return kappa ** 2 / (W0_energy or 1.0)


def other_groups(model, groups):
    """[a group] of what else is trainable in a PEFT model, such as modules_to_save, or [].

    [ours] It gets plain Adam at a tenth of lr: a whole weight needs smaller steps than a factor."""
    ours = {id(p) for group in groups for p in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    return [{"params": others, "scale": 0.1}] if others else []


def check_other_weights(model):
    """What else a PEFT model trains would stand still in bfloat16, whose steps are rounded away."""
    ours = {id(p) for layer in model.modules() for A, B, _ in factors(layer) for p in (A, B)}
    for name, p in model.named_parameters():
        if p.requires_grad and p.element_size() < 4 and id(p) not in ours:
            raise ValueError(f"{name} would be trained in {p.dtype}, which rounds small steps away:"
                             " load the model in float32, or p.data = p.data.float()")


def read_weight(layer):
    """W0 (d_out, d_in) in float32.

    A layer that PEFT has wrapped may be quantised in one of many formats. So W0 is read as the
    layer's output for the identity matrix, without its bias, which every format can compute."""
    if type(layer) is nn.Linear:
        return layer.weight.detach().float()
    base, weight = getattr(layer, "base_layer", layer), layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # An input that needs a gradient keeps bitsandbytes from repacking its weights (see below).
    identity = torch.eye(layer.in_features, dtype=dtype, device=weight.device, requires_grad=True)
    no_bias = {} if base.bias is None else {"bias": torch.zeros_like(base.bias)}
    W0 = torch.func.functional_call(base, no_bias, (identity,))              # W0ᵀ (d_in, d_out)
    return W0.detach().float().mT


def row_length(layer):
    """The root mean square length of W0's rows, or 1 where W0 is 0: B's rate would be 0."""
    length = read_weight(layer).norm().item() / math.sqrt(layer.out_features)
    return length or 1.0


# ---- Refusals, before any long work --------------------------------------------------------------

def check_batches(batches, passes):
    """An iterator can be read once: later parts of the layers would read nothing."""
    if passes > 1 and any(iter(some) is some for some in batches):
        raise ValueError(f"passes={passes} reads the batches {passes} times: give lists")


def check_numbers(**values):
    """NaN and numbers out of range would show as a loss that is not finite, or not at all."""
    for name, value in values.items():
        if value is None and name in ("alpha", "basis_rank"):
            continue
        try:
            if name == "s_min":
                wanted, good = "from 0 to 1", 0 <= value <= 1
            elif name == "penalty":
                wanted, good = "a number from 0 on", 0 <= value < math.inf
            elif name == "basis_rank":
                wanted, good = "a positive whole number", value > 0 and isinstance(value, Integral)
            else:
                wanted, good = "a positive number", 0 < value < math.inf
        except TypeError:                               # the text "3e-3" from a file of settings
            wanted, good = "a number", False
        if not good:
            raise ValueError(f"{name} must be {wanted}, not {value!r}")


def check_groups(groups):
    """torch.optim.Adam refuses such numbers, too. An eps of 0 would divide 0 by 0."""
    for group in groups:
        check_numbers(eps=group["eps"])
        for name in ("lr", "scale"):                    # a schedule may begin at 0
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} must be a number from 0 on, not {group[name]}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be from 0 to 1, without 1, not {group['betas']}")
        V, gate = group["basis"], group["gate"]
        for p in group["params"]:
            if V is not None and (p.shape[-1] != len(V) or gate.shape != V.shape[1:]):
                raise ValueError(f"a basis {tuple(V.shape)} with a gate {tuple(gate.shape)} does "
                                 f"not fit a parameter {tuple(p.shape)}")


def check_model(model, target_modules, rank, zero_start, dense):
    """Refuse what cannot be adapted. Returns the rank: a PEFT model has its own, or several."""
    targets = find_targets(model, target_modules, rank)
    if dense:
        if is_peft_model(model):
            raise ValueError("dense=True trains the weights: give the model without PEFT")
        for layer in targets.values():
            require_float32(layer.weight)
    if not is_peft_model(model):
        return rank
    if not zero_start:
        raise ValueError("PEFT's adapters need zero_start=True: the paper's start changes W0")
    check_other_weights(model)
    return max(len(A) for layer in targets.values() for A, _, _ in factors(layer))


def check_covariances(C_pre, C_task, rank, tau, basis_rank):
    """Refuse what cannot be decomposed, and say where there is nothing to learn from: a layer whose
    input is always 0 on the task has gradients and gates of 0, and its A would silently stay."""
    check_numbers(tau=tau, basis_rank=basis_rank)
    for name in {**C_pre, **C_task}:
        shapes = [tuple(C[name].shape) if name in C else None for C in (C_pre, C_task)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}'s C_pre and C_task are of shapes {shapes[0]} and {shapes[1]}")
    widths = {name: len(C) for name, C in C_pre.items()}
    widest = max(widths, key=widths.get)                # PEFT's rank_pattern is cut to each width
    check_rank(rank, widths[widest], widest)
    zeros = [name for name, C in C_task.items() if not C.any()]
    if zeros:
        warnings.warn(f"{', '.join(zeros)}: the input is always 0 on the task, so that nothing "
                      "will be learned there", stacklevel=3)


def check_and_freeze(model, bases, **numbers):
    """Refuse bases of another model, and a second attach: it would throw the first's training away,
    or freeze its adapters. Then freeze all parameters. PEFT has done so, and left trainable what
    its user wants trained."""
    check_numbers(**numbers)
    if not bases:
        raise ValueError("there are no bases")
    for name, layer in model.named_modules():
        if has_adapter(layer):
            check_adapter(model, name, layer)
    modules, owners = dict(model.named_modules()), owners_of_weights(model)
    for basis in bases:
        for name in basis["modules"]:
            width = getattr(modules.get(name), "in_features", None)
            if width != len(basis["V"]):
                raise ValueError(f"{name} has the width {width}, and {len(basis['V'])} in its "
                                 "basis: these bases are of another model")
            if not has_adapter(modules[name]):
                check_linear(model, name, modules[name], owners)
    if is_peft_model(model):
        check_other_weights(model)
    else:
        model.requires_grad_(False)


def with_gradients(groups):
    """The groups. Without any gradient nothing would be trained, and a Trainer would log its loss
    as if it were."""
    if all(p.grad is None for group in groups for p in group["params"]):
        raise ValueError("no parameter of this optimiser has a gradient: something has frozen or "
                         "replaced the adapters after prepare, such as get_peft_model, a Trainer's "
                         "peft_config or prepare_model_for_kbit_training. Do that before prepare")
    return groups


def require_float32(p):
    """TRL casts the adapters of a quantised model to bfloat16, in which steps are rounded away."""
    if p.element_size() < 4:
        raise ValueError(f"cast to {p.dtype}, as TRL does: p.data = p.data.float() for all")


def guard(model, bases, groups):
    """Refuse to let another optimiser train the adapters, as a Trainer without `optimizers` would:
    it would run, learn, and forget."""
    layer = model.get_submodule(bases[0]["modules"][0])
    layer.folora_guard = Guard([p for group in groups for p in group["params"]])


class Guard:
    """A mark on parameters, and a hook that looks for it while an adapted layer keeps its guard.

    torch offers only a hook that sees the steps of all optimisers in the process, so it goes when
    the guard goes. copy.deepcopy makes new parameters without the mark. But it copies the guard as
    well, by __setstate__, which marks them, and so does pickle."""

    def __init__(self, params):
        self.__setstate__({"params": params})

    def __setstate__(self, state):
        self.params = state["params"]
        for p in self.params:
            p.needs_sadam = True
        handle = register_optimizer_step_pre_hook(refuse_others)
        weakref.finalize(self, handle.remove).atexit = False


def refuse_others(optimizer, *_):
    for group in optimizer.param_groups:
        if "basis" not in group and any(hasattr(p, "needs_sadam") for p in group["params"]):
            raise ValueError("give the Trainer the optimiser of prepare: "
                             "optimizers=(optimizer, None)")


# ---- What a model reads --------------------------------------------------------------------------

def arguments(model, batches, device):
    """Arguments for model(**arguments), on the device, in which a text is read as it is alone."""
    for batch in batches:
        check_batch(model, batch)
        for some in separate_texts(batch):
            yield {key: v.to(device) if torch.is_tensor(v) else v for key, v in some.items()}


def check_batch(model, batch):
    """A text, a row of a data set and a mask of another size would fail deep inside the model."""
    if not isinstance(batch, Mapping):
        raise ValueError('a batch is a dict for model(**batch), such as {"input_ids": tokens (batch'
                         f", length)}}, and not a {type(batch).__name__}")
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    only_text = all(isinstance(v, str) for v in batch.values())
    if only_text or ids is not None and (not torch.is_tensor(ids) or ids.ndim < 2):
        raise ValueError("a batch's input_ids must be a tensor (batch, length): a single text is "
                         "text[None], and rows of a data set need a tokenizer and a collator")
    if ids is not None and getattr(mask, "ndim", 0) == 2 and mask.shape != ids.shape:
        raise ValueError(f"an attention_mask {tuple(mask.shape)} does not fit input_ids "
                         f"{tuple(ids.shape)}")
    # In an encoder-decoder the shape does not tell whose padding a mask or the labels describe.
    configs = (getattr(m, "config", None) for m in model.modules())
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        for name, v in batch.items():
            padding = {"labels": -100}.get(name, 0 if name.endswith("attention_mask") else None)
            if padding is not None and torch.is_tensor(v) and (v == padding).any():
                raise ValueError(f"{name} has padding, which is not told apart in an encoder and a "
                                 "decoder: give batches without padding, such as one text each")


def separate_texts(batch):
    """[the batch], or each of its texts where one would change what is read of another.

    A text is changed by padding on its left in models that count positions from the left, such as
    GPT-2, or that carry a state, such as RecurrentGemma. It is changed by the text before it in a
    row that has been flattened, as for FlashAttention: position_ids start again, without a mask."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    texts = []                                          # (row, start, end)
    if mask is None and getattr(positions, "ndim", 0) == 2:
        shape = positions.shape
        for i, row in enumerate(positions):
            starts = [0, *(1 + (row.diff() <= 0).nonzero().flatten()).tolist(), len(row)]
            texts += [(i, *ends) for ends in itertools.pairwise(starts)]
        if len(texts) == len(positions):
            return [batch]
    elif getattr(mask, "ndim", 0) == 2 and not mask[:, 0].all():
        shape = mask.shape
        for i, row in enumerate(mask):
            real = row.nonzero().flatten().tolist()
            texts += [(i, real[0], real[-1] + 1)] if real else []
    else:
        return [batch]

    def part(v, i, start, end):
        if not torch.is_tensor(v) or v.shape[:1] != shape[:1]:
            return v
        return v[i:i + 1, start:end] if v.shape[:2] == shape else v[i:i + 1]

    # FlashAttention's own limits are those of the whole row.
    kept = {key: v for key, v in batch.items()
            if not key.startswith(("cu_seq_lens_", "max_length_", "seq_idx"))}
    return [{key: part(v, *text) for key, v in kept.items()} for text in texts]


def real_tokens(x, mask):
    """The rows (tokens, d_in) of a layer's input x whose attention_mask is not 0.

    Padding would count as text otherwise. Some layers read all tokens flattened, and a pooler one
    row a text. Whatever else a mask does not fit, such as an expert that reads some of the tokens
    or another stream of tokens, is refused: an equal number of rows would prove nothing."""
    rows = x.reshape(-1, x.shape[-1])
    if not torch.is_tensor(mask) or mask.ndim != 2 or mask.all():            # no padding is marked
        return rows
    # DeepSeek's layers read (batch, 1, length, width): a dimension of 1 changes no order.
    shape, fits = ([n for n in sizes if n > 1] for sizes in (x.shape[:-1], mask.shape))
    if shape == fits or x.shape[:-1] == (mask.numel(),):
        return rows[mask.flatten().bool().to(rows.device)]
    if len(rows) == len(mask):
        return rows
    raise ValueError(f"a layer reads {tuple(x.shape)}, and an attention_mask {tuple(mask.shape)} "
                     "does not tell which rows are padding: give batches without padding, such as "
                     "one text each")


@contextmanager
def plain_mode(model):
    """Evaluation mode, without the checkpoint's own habits of generating. Both are put back.

    Dropout would add noise to the covariances. A chat model's repetition penalty or beams, which
    its generation_config sets, are no part of B.4's sampling."""
    names = ("training", "generation_config")
    before = [(m, {name: vars(m)[name] for name in names if name in vars(m)})
              for m in model.modules()]
    try:
        for module, kept in before:
            if "training" in kept:
                module.training = False
            if "generation_config" in kept:
                module.generation_config = type(module.generation_config)()
            keep_weights_differentiable(module)
        yield
    finally:
        for module, kept in before:
            vars(module).update(kept)


def keep_weights_differentiable(module):
    """bitsandbytes 0.50 on a CPU repacks NF4 weights at the first call in evaluation mode. Their
    input then has no gradient, and nothing below them would be trained."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError("bitsandbytes has repacked its weights: call prepare before the "
                             "model is used in evaluation mode")
        module.support_avx512bf16_for_cpu = False


def check_sampling(model, num_samples, min_new_tokens, max_new_tokens, batch_size):
    """Else sampling would fail deep in generate, loop for ever, or blame the model's text."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        raise ValueError("sampling needs a decoder-only model that can generate: give pretraining "
                         "texts of your own")
    if not (num_samples > 0 and batch_size > 0 and 0 <= min_new_tokens <= max_new_tokens):
        raise ValueError("num_samples and batch_size must be positive, and min_new_tokens at most "
                         "max_new_tokens")
    if max_new_tokens < 32:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: B.4's screen rejects texts of fewer "
                         "than 32 tokens")
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if max_new_tokens >= positions:                     # the BOS takes one, too
        raise ValueError(f"the model reads {positions} tokens: max_new_tokens must be lower, and "
                         f"is {max_new_tokens}")


def start_and_end_tokens(model, tokenizer):
    """(the token that begins a text, [the tokens that end one]). Chat models have several ends.
    [ours] Some models, such as Qwen's, have no BOS: their texts were separated by EOS."""
    config = model.generation_config
    ends = config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise ValueError("neither generation_config nor the tokenizer has an eos_token_id: set one")
    ends = torch.tensor(ends).flatten().tolist()
    starts = (tokenizer.bos_token_id, config.bos_token_id, ends[0])
    bos = next(start for start in starts if start is not None)
    # A configuration may be left from another vocabulary. The model would fail at its embedding.
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", math.inf)
    for token in (bos, *ends):
        if not 0 <= token < size:
            raise ValueError(f"token {token}, which begins or ends texts, is beyond the model's "
                             f"vocabulary of {size}: set bos_token_id and eos_token_id of the "
                             "tokenizer and of model.generation_config")
    return bos, ends


@contextmanager
def own_random_state(device, seed):
    """A seed of its own: sampling must not change what the caller's training draws afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# ---- Numerics and state --------------------------------------------------------------------------

def eigh(M):
    """torch.linalg.eigh, on the CPU where a GPU's solver gives up, as it may at a low rank."""
    try:
        return torch.linalg.eigh(M)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(M.cpu())
        return values.to(M.device), vectors.to(M.device)


def stacks_of_equal_width(groups, C_pre):
    """Lists of first layers whose matrices can be stacked: of one width, in at most STACK_BYTES."""
    widths = {}
    for names in groups:
        widths.setdefault(len(C_pre[names[0]]), []).append(names[0])
    for d, names in widths.items():
        size = max(1, STACK_BYTES // (8 * d * d))       # float64 has 8 bytes
        for i in range(0, len(names), size):
            yield names[i:i + size]


def own_copy(t):
    """On the CPU, in memory of its own: a view would be saved with all of the stack behind it."""
    return t.cpu().clone(memory_format=torch.contiguous_format)


def is_distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def in_first_process():
    """Two processes that wrote one file would spoil it."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def same_in_all_processes(bases):
    """Under torchrun, the first process's bases: two solvers may differ in signs."""
    if is_distributed():
        torch.distributed.broadcast_object_list(bases)
    return bases


def check_state(groups, state_dict):
    """The moments are coordinates in the saved basis: with another k or rank they fit nothing."""
    saved = state_dict["param_groups"]
    shapes = [[getattr(group.get("basis"), "shape", None) for group in some]
              for some in (groups, saved)]
    fits = shapes[0] == shapes[1]
    for group, other in zip(groups, saved):
        for p, index in zip(group["params"], other["params"]):
            m, V = state_dict["state"].get(index, {}).get("exp_avg"), group["basis"]
            wanted = p.shape if V is None else (*p.shape[:-1], V.shape[-1])
            fits &= m is None or m.shape == wanted
    if not fits:
        raise ValueError("the saved optimiser has other bases: prepare with the same arguments")


def move_bases(groups):
    """torch moves loaded moments to their parameter's device, but not what else a group holds."""
    for group in groups:
        device = group["params"][0].device
        for name, value in group.items():
            if torch.is_tensor(value):
                group[name] = value.to(device)


def mark(A):
    """A few numbers (rows,) by which a matrix A is known again: its product with a fixed vector."""
    generator = torch.Generator().manual_seed(0)
    return A.float() @ torch.randn(A.shape[1], generator=generator).to(A.device)


def first_A_bar(A, group):
    """Ā before the first step: Ā0. That holds only while A is at its start. If trained adapters
    were loaded without the optimiser's state, the penalty would hold down something else."""
    A0_bar, A0_mark = group["A0_bar"][:len(A)], group["A0_mark"][:len(A)]
    if (mark(A) - A0_mark).abs().max() < 0.01:          # products of unit rows are about 1
        return A0_bar.clone()
    if group["penalty"] > 0:
        raise ValueError("an adapter is not where prepare has put it: load the optimiser's state "
                         "with it, or train with penalty=0")
    return torch.full_like(A0_bar, torch.nan)


# ---- Preparing in parts, and once ----------------------------------------------------------------

def parts(model, target_modules, count):
    """The adapted layers as `count` lists of names, each of whole blocks of the model: layers that
    share an input stay together, or they would get the same basis twice."""
    blocks = {}
    for name in find_targets(model, target_modules):
        block = re.match(r"(.*\.\d+\.|)", name).group()  # "model.layers.3." of a projection's name
        blocks.setdefault(block, []).append(name)
    blocks = list(blocks.values())
    for i in range(min(count, len(blocks))):
        yield [name for block in blocks[i::count] for name in block]

def count_tokens(batches):
    """The number of tokens in batches of text, for the file to say, or None if they were an
    iterator and are gone."""
    if iter(batches) is batches:
        return None
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
             for batch in batches if "input_ids" in batch]
    return sum(int((mask != 0).sum()) for mask in masks)


def pack_prepared(model, bases, tau, basis_rank, tokens=None):
    """What goes into a file: the bases, and what they were made for. The lengths of the weights'
    rows tell one model from another of the same shape."""
    lengths = {name: row_length(model.get_submodule(name))
               for basis in bases for name in basis["modules"]}
    made_for = {"tau": tau, "basis_rank": basis_rank, "rank": len(bases[0]["A0"]),
                "row_lengths": lengths, "tokens of text and task": tokens}
    return {"folora": made_for, "bases": bases}


def unpack_prepared(found, path, model, names, rank, tau, basis_rank):
    """The bases of pack_prepared for the layers `names`, cut to a smaller rank or basis_rank.
    Anything else that differs would train other directions than those that were asked for."""
    try:
        made_for, bases = found["folora"], found["bases"]
        saved_rank, saved_k, saved_tau, lengths = (
            made_for[key] for key in ("rank", "basis_rank", "tau", "row_lengths"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold what folora.prepare has found: delete it, or name "
                         "another") from error
    differ = []
    if saved_tau != tau:
        differ.append(f"tau is {saved_tau}")
    if rank > saved_rank:
        differ.append(f"the rank is {saved_rank}")
    if saved_k is not None and (basis_rank is None or basis_rank > saved_k):
        differ.append(f"basis_rank is {saved_k}")
    if set(lengths) != set(names):
        differ.append(f"there are {len(lengths)} layers, such as {min(lengths)}")
    elif any(abs(row_length(model.get_submodule(name)) / length - 1) > 0.01
             for name, length in lengths.items()):
        differ.append("the weights are another model's")
    if differ:
        raise ValueError(f"{path} was made for something else: {', '.join(differ)} there. Delete "
                         "it, or name another file")
    return [cut(basis, rank, basis_rank) for basis in bases]


def save_prepared(path, packed):
    """Under another name first, so that an interruption leaves no half of a file. Of several
    processes the first one writes."""
    if in_first_process():
        part = Path(f"{path}.part")
        torch.save(packed, part)
        part.replace(path)


def load_prepared(path):
    try:
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:                          # torch raises half a dozen kinds
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): delete it, or name "
                         "another") from error


def cut(basis, rank, k):
    """The same input's directions with the first `rank` rows of A0 and the first k directions."""
    A0_bar, NHN = basis["A0_bar"][:rank], basis["NHN"][:rank, :rank]
    if k is not None:                                   # what V no longer has is part of N
        NHN = NHN + A0_bar[:, k:] @ A0_bar[:, k:].mT
    kept = {"A0": basis["A0"][:rank], "gamma": basis["gamma"][:k], "V": basis["V"][:, :k],
            "A0_bar": A0_bar[:, :k], "NHN": NHN}
    return basis | {name: own_copy(t) for name, t in kept.items()}


# ---- Saving --------------------------------------------------------------------------------------

def save_adapter(model, directory):
    """Write adapter_model.safetensors and adapter_config.json, which PEFT loads on the base model.

    From B = 0 the adapter has rank r. The paper's start has changed W0 as well, and there the
    update W - W0 = κ (B A - B0 A0) is written as one adapter of rank 2 r:
    [B, -B0] [A; A0]. ValueError: the model has no LoRALinear, or PEFT would drop some of them."""
    from safetensors.torch import save_file  # comes with transformers
    model = getattr(model, "module", model)             # inside DistributedDataParallel
    layers = {name.replace("_orig_mod.", ""): m         # torch.compile adds this to the names
              for name, m in adapted_layers(model).items()}
    check_peft_loads(model, layers)
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        if layer.start_A is not None:
            A = torch.cat([A, layer.start_A])           # (2 r, d_in)
            B = torch.cat([B, -layer.start_B], dim=1)   # (d_out, 2 r)
        tensors[f"base_model.model.{name}.lora_A.weight"] = own_copy(A.float())
        tensors[f"base_model.model.{name}.lora_B.weight"] = own_copy(B.float())
        key = "^" + re.escape(name)                     # PEFT takes it for a regular expression
        ranks[key] = len(A)
        alphas[key] = layer.scaling * len(A)            # PEFT's κ is lora_alpha / r
    rank, alpha = ranks[key], alphas[key]
    config = {
        "peft_type": "LORA",
        "task_type": peft_task(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "target_modules": list(layers),
        "r": rank,
        "lora_alpha": alpha,
        # Layers that were attached with ranks or alphas of their own.
        "rank_pattern": {key: r for key, r in ranks.items() if r != rank},
        "alpha_pattern": {key: a for key, a in alphas.items() if a != alpha},
    }
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def peft_task(model):
    """PEFT's task type: its Auto classes refuse another. Models that read something else than
    tokens have none, because PEFT's class for a task would hand them input_ids."""
    if not hasattr(model, "generate") or getattr(model, "main_input_name", "") == "input_features":
        return None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"


def check_peft_loads(model, names):
    """Where experts that were layers are fused into a parameter gate_up_proj (experts, 2 h, width),
    PEFT takes targets that are called as such layers were for the experts, and drops the adapters
    of dense layers. Llama 4's experts, (experts, width, 2 h), have never been layers."""
    weights = dict(model.named_parameters())
    fused = any(name.endswith("experts.gate_up_proj") and
                p.shape[1] == 2 * weights[name.replace("gate_up", "down")].shape[2]
                for name, p in weights.items())
    dropped = [name for name in names
               if name.split(".")[-1] in ("gate", "gate_proj", "up_proj", "down_proj")]
    if fused and dropped:
        raise ValueError(f"PEFT would not load the adapter of {dropped[0]}, because this model has "
                         "fused experts: leave it out of target_modules, or save the whole model "
                         "by folora.merge(model).save_pretrained")


# ==================================================================================================
# A small example: python folora.py
# ==================================================================================================

def toy():
    """A layer with four inputs. Pretraining text uses mainly the first two and the task mainly the
    middle two, so that only the third is both useful and cheap. Prints γ, the gate and V, and then
    forgetting and utility of one step of Adam and of SAdam, without and with its gate."""
    torch.manual_seed(0)
    names = ["text only", "text and task", "task only", "neither"]
    C_pre = torch.diag(torch.tensor([4.0, 2.0, 0.1, 0.1]))
    C_task = torch.diag(torch.tensor([0.01, 2.0, 2.0, 0.01]))
    C_task[1, 2] = C_task[2, 1] = 1.0                   # on the task these two go together
    tau, lam, lr = 0.01, 1.0, 0.1
    H = C_pre + tau * torch.eye(4)

    gamma, V = generalized_eigenbasis(C_task, C_pre, tau)
    gate = spectral_gate(gamma, lam, s_min=0.0)
    print("Directions (columns of V) by utility per unit of forgetting:\n")
    print(f"{'γ':>16}", *(f"{x:8.3f}" for x in gamma))
    print(f"{'gate γ/(γ+λ)':>16}", *(f"{x:8.3f}" for x in gate))
    for name, row in zip(names, V):
        print(f"{name:>16}", *(f"{x:8.3f}" for x in row))
    error = (V.mT @ H @ V - torch.eye(4)).abs().max().item()
    print(f"\nVᵀ H V is the identity, up to {error:.0e}.\n")

    G = torch.randn(2, 4)                               # the loss's gradient for A (r = 2, d = 4)
    steps = {}
    m, v = torch.zeros(2, 4), torch.zeros(2, 4)
    steps["Adam"] = -lr * adam_direction(G, m, v, t=1)
    m, v = torch.zeros(2, 4), torch.zeros(2, 4)
    steps["SAdam, gate 1"] = -lr * sadam_direction(G, V, torch.ones(4), m, v, t=1)[0]
    m, v = torch.zeros(2, 4), torch.zeros(2, 4)
    steps["SAdam"] = -lr * sadam_direction(G, V, gate, m, v, t=1)[0]
    print(f"{'one step of':>16} {'forgetting R':>14} {'utility U':>12} {'U / R':>8}")
    for name, step in steps.items():
        R, U = energy(step, H).item(), energy(step, C_task).item()
        print(f"{name:>16} {R:14.4f} {U:12.4f} {U / R:8.2f}")


if __name__ == "__main__":
    toy()
