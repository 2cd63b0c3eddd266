"""FoLoRA: LoRA fine-tuning that does not forget (arXiv 2606.00132), in one file. Needs torch (2.5 or newer) and nothing else.

The idea. An update ΔW of a linear layer harms what the model knew by as much as it moves the layer's outputs on pretraining
text, ΔW X_pre, and helps by as much as it moves them on the task, ΔW X_task. Both are quadratic forms of two input
covariances, so their generalized eigenvectors v rank all input directions by ρ(v) = task utility per unit of forgetting.
LoRA's down-projection A starts where pretraining activations are nearly zero, and is trained by Adam in the coordinates of
these eigenvectors. A gate scales the Adam step of each coordinate: 1 where ρ is large, a small floor where it is small. The
pretraining text is sampled from the model itself: the closer its conditionals are to those of its training data, the closer
its text is to that data (Theorem 3.1).

    paper                                    here
    3.1  forgetting and utility, Eq. 5-10    collect_covariances
    3.2  generalized eigenbasis, Eq. 11-17   generalized_eigenbasis
    3.3  spectral-gated Adam, Eq. 18-24      spectral_gate, SAdam
    3.4  model-generated text, Eq. 27, B.4   reject_reason, sample_calibration
    B.3  null-space start, Eq. 3             null_space, LoRALinear
    all  the recipe, in order                prepare = collect_covariances (twice), decompose, attach; later merge

    symbol           shape                    in code                    meaning
    W0, W_res        (d_out, d_in)            base_layer.weight          pretrained weight; what is left of it beside κ B0 A0
    A, B             (r, d_in), (d_out, r)    lora_A, lora_B             W = W_res + κ B A; A0 = U_perpᵀ, B0 at the start
    κ                scalar                   scaling                    alpha / rank
    X_pre, X_task    (d_in, tokens)           rows, transposed           a layer's inputs on D_pre (self-generated), on the task
    C_pre, C_task    (d_in, d_in)             C_pre, C_task              means of x xᵀ over tokens, then divided by trace / d_in
    τ, H             scalar, (d_in, d_in)     tau, H                     H = C_pre + τ I = L Lᵀ, positive definite
    Γ, V             (d_in,), (d_in, d_in)    gamma, V; "basis"          C_task v = γ H v, γ descending, Vᵀ H V = I
    λ, s_min, s̃      scalars, (d_in,)         lam, s_min, "gate"         the gate: its sharpness, its floor, its values
    G, Ā, Ḡ          (r, d_in)                p.grad, -, G_bar           gradient of A; A = Ā Vᵀ and its gradient Ḡ = G V
    m, v (moments)   (r, d_in)                m, sq                      Adam's running means of Ḡ and Ḡ²

Use it on any model with nn.Linear layers (name them in target_modules if they are not Llama's seven). For a transformer:

    import folora
    texts = folora.sample_calibration(model, tokenizer, 2000)
    pretrain = [{"input_ids": t[None]} for t in texts]   # batches are dicts, passed as model(**batch)
    optimizer = folora.prepare(model, pretrain, task[:16], lr=3e-4, rank=128)        # task: batches with "labels"; 256 examples of it
    for batch in task:                                   # any loop, any scheduler, any gradient accumulation; batches on its device
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = folora.merge(model)                          # a plain model again, as large and as fast as before

Move and cast the model before `prepare`. Save it merged: lora_A and lora_B alone belong to W_res and not to W0. Under
torch.distributed give each process its share of both texts (sample_calibration with a `seed` of its own, or all sample the same):
all get the same covariances and bases, and each solves its share.

Where the paper is silent, or we leave it. Figures: SmolLM2-135M-Instruct (dequantised from 4 bits) in bfloat16, rank 32, 40 steps of
8 GSM8K examples, as NLL of test solutions / KL from the untouched model, nat per token, 3 seeds unless it says one; untouched
1.391 / 0. `tiny` is the 2.4M-parameter model of the repository, `tuned` the preset of train_math.py (see 3). What has no figure is
not measured yet; a figure without a file was measured once, by hand.
 1. Scale. With sums over tokens γ would depend on the numbers of tokens, and so would the length of V's columns, which is the
    step of A. `decompose` divides each covariance by its mean eigenvalue, trace / d_in. γ then compares *shares* of energy: where
    a direction has the share c of both texts' energy (1: an average direction), γ = c / (c + τ), so 1 far above τ and 0 far below.
    One huge direction, as the first token makes in some layers, raises the mean and pushes all others towards τ.
 2. τ = 0.01, relative to that mean eigenvalue. No column of V is longer than 1/√τ, so Adam's step, about lr, in one
    eigen-coordinate moves a row of A by about 10 lr at most, and in all d of them by √d times that (plain Adam: √d lr). A smaller
    τ would let A run into directions that the calibration text merely happened to miss. On tiny τ = 0.1 and 1 cost more KL at
    the same NLL (tuned, three rates, one seed: assets/tiny.json).
 3. The learning rate of A may differ from B's (`lr_a`): a step in V's coordinates is not a step in A's. lr = 3e-4 is ours. With
    it the paper's setting gives 1.055 / .0173, and its start under plain Adam 1.040 / .0663. Without a floor (s_min = 0), at
    λ = 30, zero_start (see 5) and lr = 3e-3 it is 1.040 / .0060: the preset `tuned` of train_math.py,
    which was searched for on these very solutions and texts. On others (untouched 1.306), with three other seeds, it has .983 / .0058,
    the paper's setting .996 / .0174 at 3e-4 and .984 / .0377 at its best learning rate, 6e-4 (assets/fresh.json). There, with
    λ = 1, it learns as much as LoRA at its best: .972 / .0213 against .973 / .134. It is more than a frozen A: tuned with A frozen has
    1.062 / .0052 at 3e-3 and 1.054 / .0271 at 1e-2 (assets/smollm2.json, seed 0).
 4. κ = 1 unless `alpha` is given.
 5. The residual W_res is stored in the dtype of the base, and in bfloat16 the rounding of W_res, A0 and B0 alone moves the model:
    a KL of .0024 before the first step (.0020 if merged at once; seed 0).
    `zero_start=True` keeps W0 and starts with B = 0 from the same A0: exact at step 0 in every dtype, at the same cost. It is
    not the paper's start, so it is off by default. It matters more than by that rounding: tuned (see 3) ends at 1.041 / .0061
    with it and at 1.040 / .0141 from the paper's start, and the paper's gate has 1.021 / .0199 at
    lr = 3e-3 with it. From the paper's start it learns no more above lr = 6e-4: 1.036 / .0375, and 1.042 / .0693 at 1e-3 (seed 0).
 6. C_task is taken over whole examples, prompts and responses: adapters act on both.
 7. Precision. H is factorised and applied in float64 (a few triangular solves), the eigenproblem is solved in float32. Products
    in float32 must be float32: leave torch.set_float32_matmul_precision at its default, "highest". A and B are float32 masters.
    On a bfloat16 base the basis is bfloat16, and so are the products with it (Eq. 19, 24): half the memory, a quarter of the time on
    the CPU of assets/bench.json. Rounding V leaks dV into what must not move: tr(dVᵀ H dV) is at most 1.1e-5 of tr(Vᵀ H V) over
    the layers of SmolLM2-135M. Products in float32 end at 0.9851 / .0057, in bfloat16 at 0.9855 / .0058 (tuned, seed 3 of
    assets/fresh.json's measure).
 8. Text is generated in the dtype of the model that is passed, where the paper uses float16; sampling gives up, rather than go
    on for ever, on a model whose text never passes.

Left out: other methods' hard projections, dense-weight SAdam with a truncated basis (Appendix D), weight decay and dropout (the
paper uses neither), quantised base weights, convolutions, one process's model spread over several devices, encoder-decoders with
their two masks, and code that reads .weight of a wrapped layer.
"""
import functools
import hashlib
import math
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")       # Appendix B: all seven
OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()       # torch 2.8 on CUDA: 16-bit operands, float32 sums and float32 result
BLOCK = 256                # rows of a covariance that are summed at a time


# ---------------------------------------------------------------------------------------------------------------------
# 3.1  What must not move and what must be learned: one covariance of each kind per distinct input
# ---------------------------------------------------------------------------------------------------------------------

def find_targets(model, target_modules=TARGET_MODULES, rank=1):
    """The nn.Linear modules that adapters of `rank` go to, {full name: module}, in the model's own order.

    A target matches as a whole name or as its last part: "q_proj" matches "layers.0.attn.q_proj". ValueError if one matches
    nothing (it lists what there is), if a weight is used elsewhere too (a tied embedding: to adapt one is to move both) or is
    quantised, or if the rank is above an input width.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: m for name, m in linears.items() if any(f".{name}".endswith(f".{t}") for t in target_modules)}
    missing = [t for t in target_modules if not any(f".{name}".endswith(f".{t}") for name in found)]
    if missing or not found:
        has = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"no nn.Linear is called {', '.join(missing) or '(no target given)'}; this model has: {', '.join(has) or 'none'}")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in found.items():
        if uses[id(module.weight)] > 1:
            raise ValueError(f"{name} shares its weight with another module (tied): leave it out of target_modules, or give it a copy")
        if module.weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"{name} is quantised ({module.weight.dtype}): load the model in bfloat16, float16 or float32")
        if not 0 < rank <= module.in_features:
            raise ValueError(f"rank must be between 1 and the input width of {name}, {module.in_features}, not {rank}")
    return found


def processes():
    """(rank, world size) in torch.distributed; (0, 1) where it does not run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def _evaluating(model):
    """model.eval(), undone module by module at the end, also after an error."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Gram:
    """Σ x xᵀ and the token count of one distinct input, and which tensor was added last."""

    def __init__(self, x):
        self.sum = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
        self.tokens, self.last = torch.zeros((), dtype=torch.int64, device=x.device), None

    def is_last(self, x):
        # An `id` may be reused once its tensor is gone, and a tensor may be overwritten in place between two layers that read
        # it: a weak reference catches the first, autograd's version counter the second.
        return self.last is not None and self.last[0]() is x and self.last[1] == x._version

    def add(self, x, rows):
        """C += X Xᵀ with X = rowsᵀ: (d_in, tokens) @ (tokens, d_in). In float32: bf16 sums would lose everything past 256 terms.

        C is symmetric: only blocks on and below the diagonal are summed, for little more than half of the operations.
        """
        exact = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and OUT_DTYPE
        rows = rows if exact else rows.float()
        for i, j in ((i, i + BLOCK) for i in range(0, rows.shape[1], BLOCK)):
            left, right, C = rows[:, i:j].mT, rows[:, :j], self.sum[i:j, :j]                  # (b, tokens) @ (tokens, j) -> (b, j)
            C += torch.mm(left, right, out_dtype=torch.float32) if exact else left @ right    # products of bf16 are exact in float32
        self.tokens += len(rows)
        self.last = weakref.ref(x), x._version

    def mean(self):
        """C / tokens, in place, with the blocks above the diagonal filled in."""
        for i in range(BLOCK, len(self.sum), BLOCK):
            self.sum[:i, i:i + BLOCK] = self.sum[i:i + BLOCK, :i].mT
        return self.sum.div_(self.tokens)


def _real_tokens(name, x, mask):
    """x (..., d_in) without its padding: (tokens, d_in)."""
    rows = x.reshape(-1, x.shape[-1])                      # (batch * length, d_in)
    if mask is None:
        return rows
    if x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise ValueError(f"{name} received {tuple(x.shape[:-1])} rows where attention_mask is {tuple(mask.shape)}: pass batches without padding")
    return rows[mask.reshape(-1).to(rows.device)]


@torch.no_grad()
def collect_covariances(model, batches, target_modules=TARGET_MODULES):
    """Input covariances of the target layers: C_pre or C_task of Eq. 5-7, depending on the text.

    batches         an iterable of dicts, each moved to the model's device and passed as model(**batch); positions whose
                    "attention_mask" is 0 do not count
    returns         {module name: (d_in, d_in) float32}, the *mean* of x xᵀ over all T tokens, (1/T) X Xᵀ: it depends neither
                    on how tokens are cut into batches nor, in scale, on how many there are. Modules that read the same input
                    tensor (q, k, v; gate, up) share one accumulation and get one and the same tensor. Under torch.distributed
                    each process gives its share of the text, and all get the mean over the whole.
    ValueError      no target, no batch, a layer that no token reached, inputs that are not finite

    Nothing here reads logits or loss: for a language model leave out "labels" and add "logits_to_keep": 1. Wrap `batches` for a bar.
    """
    targets = find_targets(model, target_modules)
    grams, seen, mask = {}, Counter(), None

    def hook(module, args, name):
        x = args[0]
        gram = grams.get(name) or next((g for g in set(grams.values()) if g.is_last(x)), None)
        gram = grams[name] = gram or _Gram(x)
        rows = _real_tokens(name, x, mask)
        seen[name] += len(rows)
        if not gram.is_last(x):
            gram.add(x, rows)

    device = next(model.parameters()).device
    handles = [m.register_forward_pre_hook(functools.partial(hook, name=name)) for name, m in targets.items()]
    try:
        with _evaluating(model):
            for batch in batches:
                batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
                mask = batch.get("attention_mask")
                mask = None if mask is None or mask.bool().all() else mask.bool()
                for gram in grams.values():
                    gram.last = None                       # this batch may be the very tensor of the last
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    distinct = dict.fromkeys(_checked(name, seen[name], grams.get(name)) for name in targets)            # in one order everywhere
    for total in (total for gram in distinct for total in (gram.sum, gram.tokens) if processes()[1] > 1):
        dist.all_reduce(total)
    means = {gram: gram.mean() for gram in distinct}
    return {name: means[grams[name]] for name in targets}


def _checked(name, tokens, gram):
    """The gram; ValueError unless the layer saw tokens, the same ones as its gram, and finite ones."""
    if not tokens:
        raise ValueError(f"no token reached {name}: give at least one batch, and text that uses every target layer")
    if tokens != gram.tokens:                              # grouped on the first call, apart (or called again) later
        raise ValueError(f"{name} shared its input with another layer in some calls but not in all, or read it twice: leave it out")
    if not torch.isfinite(gram.sum).all():
        raise ValueError(f"the inputs of {name} are not finite: overflow in float16? Load the model in bfloat16 or float32")
    return gram


# ---------------------------------------------------------------------------------------------------------------------
# 3.2  The generalized eigenbasis of (C_task, H): directions by utility per unit of forgetting
# ---------------------------------------------------------------------------------------------------------------------

def _cholesky(C_pre, tau):
    """L (..., d, d) in float64 with L Lᵀ = H = C_pre + τ I. Where that is not positive definite τ grows tenfold, with a warning."""
    C = C_pre.double()
    if not torch.isfinite(C).all():
        raise ValueError("C_pre has entries that are not finite: look for overflow in the model's activations (float16?)")
    mean = C.diagonal(dim1=-2, dim2=-1).mean(-1)                                     # (...): the mean eigenvalue
    ridge, least = torch.full_like(mean, tau), (1e-9 * mean.abs()).clamp(min=1e-30)
    for attempt in range(10):
        H = C.clone()
        H.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])                          # Eq. 6: H = C_pre + τ I
        L, info = torch.linalg.cholesky_ex(H)
        if not info.any():
            if attempt:
                warnings.warn(f"C_pre + tau I was not positive definite at tau = {tau:g}; tau was raised to {ridge.max().item():.3g}")
            return L
        tried, ridge = ridge, torch.where(info > 0, torch.maximum(10 * ridge, least), ridge)
    raise ValueError(f"C_pre is not a covariance: even with tau = {tried.max().item():.3g} it is not positive definite")


def generalized_eigenbasis(C_task, C_pre, tau):
    """Solve C_task v = γ H v with H = C_pre + τ I (Eq. 11-17), for one layer or for a stack of equal shapes.

    C_task, C_pre   (..., d, d), symmetric, positive semidefinite; any rank
    tau             absolute: in the units of C_pre's eigenvalues
    returns         gamma (..., d) ≥ 0, descending, the quotients ρ(v) of Eq. 10; V (..., d, d), its columns the eigenvectors: Vᵀ H V = I, Vᵀ C_task V = Γ
    ValueError      entries that are not finite. If H is not positive definite τ is raised tenfold until it is, with a warning.

    The paper writes V = H^(-1/2) R with the symmetric root (Eq. 17). Any L with L Lᵀ = H gives the same V up to signs, and up
    to rotations inside a repeated γ; Cholesky's triangular L is the cheap one. Adam does not notice a sign that stays.
    """
    if not torch.isfinite(C_task).all():
        raise ValueError("C_task has entries that are not finite: look for overflow in the model's activations (float16?)")
    L = _cholesky(C_pre, tau)
    half = torch.linalg.solve_triangular(L, C_task.double(), upper=False)            # L⁻¹ C_task
    M = torch.linalg.solve_triangular(L, half.mT, upper=False)                       # L⁻¹ C_task L⁻ᵀ, (..., d, d)
    # Eq. 16: M = R Γ Rᵀ, R orthogonal (L's R, not the symmetric root's). Only this step is in float32: with H applied exactly it costs
    # γ 1e-7 of the largest one, while a float32 L would be off by cond(H) · 1e-7, all of it in the directions of least penalty.
    gamma, R = torch.linalg.eigh(M.to(C_pre.dtype))                                  # ascending; it reads the lower triangle
    V = torch.linalg.solve_triangular(L.mT, R.flip(-1).double(), upper=True)         # Eq. 17: V = L⁻ᵀ R
    return gamma.flip(-1).clamp(min=0), V.to(C_pre.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 3.3  Adam in that basis, each coordinate's step scaled by its gate
# ---------------------------------------------------------------------------------------------------------------------

def spectral_gate(gamma, lam, s_min):
    """The gate (..., d), between s_min and 1, of gamma (..., d). `lam` > 0 is the γ whose gate is one half; s_min in [0, 1]."""
    if not lam > 0 or not 0 <= s_min <= 1:
        raise ValueError(f"lam must be > 0 and s_min in [0, 1], not lam = {lam}, s_min = {s_min}")
    s = gamma / (gamma + lam)                              # Eq. 22: s_i = γ_i / (γ_i + λ)
    return s.clamp(min=s_min)                              #         s̃_i = max(s_i, s_min)


def _mm(a, V):
    """a @ V, a (rows, d) in V's precision for it, returned in its own. The result is rounded to V's dtype too, but not on CUDA from torch 2.8."""
    if V.is_cuda and V.dtype == torch.bfloat16 and OUT_DTYPE:
        return torch.mm(a.to(V.dtype), V, out_dtype=torch.float32).to(a.dtype)
    return (a.to(V.dtype) @ V).to(a.dtype)


class SAdam(torch.optim.Optimizer):
    """Spectral-gated Adam (3.3) and plain Adam in one optimiser, so that one scheduler and one state_dict serve both.

    params          parameters or groups, as for torch.optim.Adam. A group with "basis" (V: d_in, d_in) and "gate" (s̃: d_in) is
                    spectral: its parameters are A's, (rank, d_in). Those that read one input belong in one group and share V.
                    A group without them gets plain Adam: torch.optim.Adam's numbers, no weight decay.
    lr, betas, eps  as in Adam; each may be set in a group

    `p.grad` is only read. A basis on another device stays there, and is sent to its parameters for each step: so it may be kept on the
    host. It is part of state_dict: a resumed run needs the very same one, signs included. Each row of A is transformed, scaled and moved alone: a shard of rows, with V beside it, moves as it
    does in the whole, so FSDP2, which shards by rows, needs nothing else (make the optimiser anew on the sharded parameters).
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        if not lr >= 0 or not all(0 <= b < 1 for b in betas) or not eps >= 0:
            raise ValueError(f"lr and eps must be >= 0 and betas in [0, 1), not lr = {lr}, betas = {betas}, eps = {eps}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, basis=None, gate=None))

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        V, gate = self.param_groups[-1]["basis"], self.param_groups[-1]["gate"]
        if (V is None) != (gate is None):
            raise ValueError("a spectral group needs both a basis and a gate")
        for p in self.param_groups[-1]["params"] if V is not None else ():
            if V.shape != (p.shape[-1],) * 2 or gate.shape != p.shape[-1:]:
                raise ValueError(f"a parameter {tuple(p.shape)} does not fit basis {tuple(V.shape)} and gate {tuple(gate.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient. Returns closure()'s loss, if a closure is given."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params, group):
        """All parameters of a group at once: torch._foreach_* is one kernel launch for the list, and V is read once for q, k and v."""
        V, gate = (None if t is None else t.to(params[0].device, non_blocking=True) for t in (group["basis"], group["gate"]))
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p] = self.state[p] or {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] += 1
        local = lambda tensors: [t.to_local() if hasattr(t, "to_local") else t for t in tensors]              # FSDP2: this process's rows
        t, m, sq = ([self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq"))
        m, sq, G_bar, params = local(m), local(sq), local(p.grad for p in params), local(params)
        if V is not None:
            rows = [len(p) for p in params]
            G_bar = _mm(torch.cat(G_bar), V).split(rows)                      # Eq. 18-19: Ḡ = G V, (r of each, d) @ (d, d)
        torch._foreach_lerp_(m, G_bar, 1 - beta1)                             # Eq. 20: m ← β₁ m + (1 - β₁) Ḡ, kept in V's coordinates
        torch._foreach_mul_(sq, beta2)                                        #         v ← β₂ v + (1 - β₂) Ḡ²
        torch._foreach_addcmul_(sq, G_bar, G_bar, 1 - beta2)
        m_hat = torch._foreach_div(m, [1 - beta1 ** k for k in t])            # Eq. 21: m̂ = m / (1 - β₁ᵗ)
        root = torch._foreach_div(torch._foreach_sqrt(sq), [math.sqrt(1 - beta2 ** k) for k in t])            # √v̂ = √(v / (1 - β₂ᵗ))
        delta = torch._foreach_div(m_hat, torch._foreach_add(root, group["eps"]))                             # m̂ / (√v̂ + ε), Adam's step
        if V is not None:
            # Eq. 23: ΔĀ = Adam's step · diag(s̃); Eq. 24: ΔA = ΔĀ Vᵀ. The gate scales the step and not the gradient: a factor of
            # the gradient that stays the same is divided out again by √v̂.
            delta = _mm(torch.cat(delta) * gate, V.mT).split(rows)            # (r of each, d) @ (d, d)
        torch._foreach_add_(params, delta, alpha=-group["lr"])


# ---------------------------------------------------------------------------------------------------------------------
# 3.4, B.4  Pretraining text from the pretrained model itself
# ---------------------------------------------------------------------------------------------------------------------

DECODING = ((0.7, dict(temperature=1.0, top_p=1.0, top_k=0)),              # B.4: share of the samples, how they are drawn
            (0.2, dict(temperature=1.0, top_p=0.95, top_k=0)),
            (0.1, dict(temperature=1.2, top_p=0.98, top_k=50)))
GIVE_UP = 64                                                               # so many rejects and not one pass (ours)


def reject_reason(tokens):
    """B.4's degeneracy screen for one list of generated token ids: why it is rejected, or None if it passes."""
    n, run = len(tokens), 1
    if n < 32:
        return "fewer than 32 tokens"
    for left, right in zip(tokens, tokens[1:]):
        run = run + 1 if left == right else 1
        if run >= 20:
            return "a run of 20 equal tokens"
    if n >= 128 and len(set(tokens)) / n < 0.12:
        return "too few distinct tokens"
    if n >= 256 and len(set(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))) / (n - 3) < 0.25:
        return "too few distinct 4-grams"
    return None


def _candidates(model, count, bos, eos, batch_size, **lengths):
    """Yield `count` token lists drawn from a single BOS, each cut before its end of sequence; BOS itself is not in them."""
    drawn = torch.multinomial(torch.tensor([share for share, _ in DECODING]), count, replacement=True)
    for k, n in sorted(Counter(drawn.tolist()).items()):   # each sample draws its decoding; a batch has one
        for size in (min(batch_size, n - done) for done in range(0, n, batch_size)):
            start = torch.full((size, 1), bos, device=next(model.parameters()).device)
            rows = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, eos_token_id=eos, pad_token_id=eos[0],
                                  **DECODING[k][1], **lengths)
            for row in rows[:, 1:].tolist():
                yield row[:next((i for i, token in enumerate(row) if token in eos), len(row))]


@contextmanager
def _plain_generation(model):
    """A model's generation_config may bring penalties, beams or a min_p of its own, as chat models' do: no part of B.4, so it is put aside."""
    config = getattr(model, "generation_config", None)
    model.generation_config = config and type(config)()
    try:
        yield
    finally:
        model.generation_config = config


@torch.no_grad()
def sample_calibration(model, tokenizer, num_samples, min_new_tokens=128, max_new_tokens=512, batch_size=64, seed=0, progress=None):
    """Sample D_pre of Eq. 27 by B.4's protocol: ancestral, from BOS, decoding drawn from a mixture, degenerate text screened out.

    model           any causal language model with Hugging Face's `generate`; it stays in its dtype and on its device
    tokenizer       needs bos_token_id, eos_token_id and decode; without a BOS (Qwen) the model's generation_config names one, else EOS
    min_new_tokens  no end of sequence before that many tokens
    progress        called with 1 for each sample that passes, such as `tqdm(total=num_samples).update`
    returns         num_samples 1-D LongTensors on the CPU, BOS first, in random order; the same ones for the same seed, batch_size,
                    dtype and device
    RuntimeError    the first GIVE_UP samples are all rejected, or later max(GIVE_UP, num_samples) in a row; it counts the reasons
    """
    if not 0 < min_new_tokens <= max_new_tokens:
        raise ValueError(f"need 0 < min_new_tokens <= max_new_tokens, not {min_new_tokens} and {max_new_tokens}")
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)            # a chat model may have several
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = list(eos) if isinstance(eos, (list, tuple)) else [eos]
    bos = next(b for b in (tokenizer.bos_token_id, getattr(config, "bos_token_id", None), eos[0]) if b is not None)
    kept, texts, rejected, in_a_row = [], set(), Counter(), 0

    def screen(tokens):
        nonlocal in_a_row
        digest = hashlib.sha1(tokenizer.decode(tokens).encode()).digest()
        reason = "exact duplicate" if digest in texts else reject_reason(tokens)
        texts.add(digest)
        if reason is None:
            kept.append(torch.tensor([bos] + tokens))
            in_a_row = 0
            return progress and progress(1)
        rejected[reason] += 1
        in_a_row += 1
        if in_a_row >= max(num_samples if kept else 0, GIVE_UP):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in rejected.most_common())
            raise RuntimeError(f"the model only produces text that the screen rejects ({reasons}); {len(kept)} of {num_samples} passed")

    with _evaluating(model), _plain_generation(model), torch.random.fork_rng([p.device for p in model.parameters() if p.is_cuda][:1]):
        torch.manual_seed(seed)
        while len(kept) < num_samples:
            for tokens in _candidates(model, num_samples - len(kept), bos, eos, batch_size, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens):
                screen(tokens)
        return [kept[i] for i in torch.randperm(num_samples)]        # drawn by decoding: unshuffled, a slice would not be a sample


# ---------------------------------------------------------------------------------------------------------------------
# B.3  The adapter and its start
# ---------------------------------------------------------------------------------------------------------------------

def null_space(C, rank):
    """B.3's U_perpᵀ (..., rank, d_in): orthonormal rows, the `rank` eigenvectors of C (..., d_in, d_in) of least energy.

    With A0 = U_perpᵀ the first of Eq. 3's two terms, dB A0 X_pre, is as small as it can be: no orthonormal rows have less energy
    ‖A0 X‖²_F than the sum of the `rank` smallest eigenvalues. In float32 it is right to about 1e-7 of the largest eigenvalue,
    which is how well C itself is known. ValueError if rank > d_in.

    Inverse iteration for r directions is no cheaper. At rank 32 of SmolLM2, in blocks of 2 r, 8 steps on H's factor leave up to 1.6
    times the energy (τ hides what is below it), and on a factor of C itself 1.02 times it, in the time of a whole eigh at rank 64.
    """
    if not 0 < rank <= C.shape[-1]:
        raise ValueError(f"rank must be between 1 and the input width {C.shape[-1]}, not {rank}")
    return torch.linalg.eigh(C).eigenvectors[..., :rank].mT.contiguous()             # eigh: ascending


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus a trainable low-rank term: y = W x + κ B (A x), κ = alpha / rank (alpha=None: κ = 1).

    A0, B0          neither: LoRA's start, A Kaiming-uniform, B = 0. A0 alone (rank, d_in): B.3's, B0 = κ⁻¹ W0 A0ᵀ. Both: as given.
    Whatever the start, W_res = W0 - κ B0 A0 takes W0's place, so that the layer computes what it did before, up to rounding in
    W0's dtype (in float32, if W0 is float64). A and B are float32 in every case, and cast to the input's dtype where they are applied.
    """

    def __init__(self, base_layer, rank, alpha=None, A0=None, B0=None):
        super().__init__()
        if not (alpha is None or alpha > 0):
            raise ValueError(f"alpha must be > 0 (or None: scaling 1), not {alpha}")
        d_out, d_in = base_layer.weight.shape
        W0 = base_layer.weight.detach().float()
        if not 0 < rank <= d_in or A0 is not None and A0.shape != (rank, d_in):
            raise ValueError(f"rank must be between 1 and the input width {d_in}, not {rank}, and A0 (rank, {d_in})")
        self.base_layer, self.scaling = base_layer.requires_grad_(False), 1.0 if alpha is None else alpha / rank
        if A0 is None:
            A0, B0 = nn.init.kaiming_uniform_(W0.new_empty(rank, d_in), a=math.sqrt(5)), W0.new_zeros(d_out, rank)
        elif B0 is None:
            B0 = W0 @ A0.to(W0).mT / self.scaling                         # κ⁻¹ W0 U_perp: (d_out, d_in) @ (d_in, r)
        self.lora_A, self.lora_B = (nn.Parameter(factor.to(W0).clone()) for factor in (A0, B0))
        if B0.any():                                                      # a new Parameter: the old one may be in use elsewhere
            W_res = W0 - self.scaling * self.lora_B.detach() @ self.lora_A.detach()
            base_layer.weight = nn.Parameter(W_res.to(base_layer.weight.dtype), requires_grad=False)

    def forward(self, x):
        low = F.linear(x, self.lora_A.to(x.dtype))                        # A x: (..., d_in) -> (..., r)
        return self.base_layer(x) + self.scaling * F.linear(low, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def merged(self):
        """The plain nn.Linear with W = W_res + κ B A, added in float32, then rounded to W's dtype. In place: call it once."""
        W = self.base_layer.weight.float() + self.scaling * self.lora_B @ self.lora_A
        self.base_layer.weight = nn.Parameter(W.to(self.base_layer.weight.dtype), requires_grad=False)
        return self.base_layer


# ---------------------------------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------------------------------

STACK = 2 ** 22            # matrix entries that are decomposed at a time: small layers in stacks, large ones alone


def _take(C, stack):
    """The covariances of a stack, (sites, d, d), each divided by its mean eigenvalue, trace / d; taken out of C, so that their memory is free."""
    taken = torch.stack([[C.pop(name) for name in names][0] for names in stack])
    return taken.div_(taken.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30))


def decompose(C_pre, C_task, rank, tau=0.01, progress=None):
    """Solve every eigenproblem of the recipe, one per distinct input. Nothing in it depends on λ, s_min, lr or alpha.

    C_pre, C_task   as collect_covariances returns them: names whose tensors are the same *objects* are solved once. Each is first
                    divided by its mean eigenvalue, trace / d_in. Both are emptied on the way, the bases take their place in memory:
                    pass dict(C) to keep one
    rank, tau       of A0; of H, relative to that mean eigenvalue
    returns         [{"modules": names that share the input, "A0": (rank, d_in), "gamma": (d_in,), "V": (d_in, d_in)}]: tensors
                    and strings, so torch.save keeps it and many runs can share it
    progress        called with the number of inputs that were just finished
    """
    if not C_pre:
        raise ValueError("C_pre is empty: decompose empties what it is given; pass dict(C) to keep one")
    shared, by_width, solved, sites = {}, {}, {}, []
    for name in C_pre:
        shared.setdefault((id(C_pre[name]), id(C_task[name])), []).append(name)
    for names in shared.values():
        by_width.setdefault(C_pre[names[0]].shape[-1], []).append(names)
    size = {width: max(1, STACK // width ** 2) for width in by_width}
    stacks = [groups[i:i + size[width]] for width, groups in by_width.items() for i in range(0, len(groups), size[width])]
    process, world = processes()
    for i, stack in enumerate(stacks):
        pre, task = (_take(C, stack) for C in (C_pre, C_task))                       # (sites, d_in, d_in)
        if i % world == process:
            solved[i] = null_space(pre, rank), *generalized_eigenbasis(task, pre, tau)
        if progress:
            progress(len(stack))
    for i, stack in enumerate(stacks):
        solution = [solved.pop(i, None)]
        if world > 1:                                      # to all: two eigensolvers may return two bases where γ repeats
            solution = [tuple(tensor.cpu() for tensor in solution[0] or ())]         # an object arrives on the device it was sent from
            dist.broadcast_object_list(solution, i % world)
        sites += [{"modules": names, "A0": a.clone(), "gamma": g.clone(), "V": v.clone()} for names, a, g, v in zip(stack, *solution[0])]
    return sites


def split_layers(names, passes):
    """[names] in at most `passes` runs of neighbours, so that layers with the same input stay together, but for those at a cut."""
    names, size = list(names), -(-len(names) // max(1, passes))
    return [names[i:i + size] for i in range(0, len(names), size)]


def attach(model, sites, lr, lr_a=None, alpha=None, lam=1.0, s_min=0.3, zero_start=False, offload_bases=False):
    """Freeze the model, put an adapter on every module of `sites` (from decompose), and return the SAdam that trains them.

    The options are those of `prepare`.
    """
    gates = [spectral_gate(site["gamma"], lam, s_min) for site in sites]     # raises before anything is replaced
    model.requires_grad_(False)
    spectral, Bs = [], []
    for site, gate in zip(sites, gates):
        adapters = []
        for name in site["modules"]:
            base = model.get_submodule(name)
            A0 = site["A0"].to(base.weight.device)
            B0 = A0.new_zeros(base.out_features, len(A0)) if zero_start else None
            adapters.append(LoRALinear(base, len(A0), alpha, A0, B0))
            model.set_submodule(name, adapters[-1])
        dtype = torch.bfloat16 if base.weight.dtype == torch.bfloat16 else torch.float32     # float16 would lose small gradients
        basis = site["V"].to("cpu" if offload_bases else A0.device, dtype)
        basis = basis.pin_memory() if A0.is_cuda and offload_bases else basis                # page-locked: it travels twice as fast
        spectral.append({"params": [a.lora_A for a in adapters], "lr": lr if lr_a is None else lr_a, "basis": basis, "gate": gate.to(A0.device)})
        Bs += [a.lora_B for a in adapters]
    return SAdam(spectral + [{"params": Bs}], lr)          # B: plain Adam, in its own coordinates


def prepare(model, pretrain_batches, task_batches, lr, rank=128, alpha=None, tau=0.01, lam=1.0, s_min=0.3,
            target_modules=TARGET_MODULES, lr_a=None, zero_start=False, passes=1, offload_bases=False):
    """FoLoRA in one call: adapt `model` in place, freeze the rest of it, and return the optimiser to train it with.

    pretrain_batches   batches (dicts, passed as model(**batch)) of text that must not move: see sample_calibration
    task_batches       batches of the target task; 256 examples in the paper
    passes             read both that often (give lists), each time for a share of the layers: less memory for covariances
    lr, lr_a           learning rates of B and of A (None: the same)
    rank, alpha        of the adapters; κ = alpha / rank, None: 1
    tau                ridge τ, relative to the mean eigenvalue of C_pre
    lam, s_min         the gate's sharpness and floor, Eq. 22
    zero_start         start from B = 0 and an untouched W0, where the paper starts from B0 = W0 A0ᵀ and the residual
    offload_bases      keep the bases on the host: no GPU memory for them, at the price of sending them at every step
    ValueError         before any forward pass: an unknown target, a tied weight, a rank above an input width, a value out of range

    Memory beside the model, with S = Σ d_in² over distinct inputs (5.5e9 for LLaMA-2-7B): the bases, 2 S bytes (4 S if the model is not in
    bfloat16), for as long as one trains. While it runs, first both covariances, 8 S / passes, whose place the bases in float32 take, 4 S,
    and half a dozen float64 matrices of the widest layer; at last 4 S and the 2 S.
    """
    targets = find_targets(model, target_modules, rank)
    if not tau >= 0 or not lr >= 0 or not (lr_a is None or lr_a >= 0) or not (alpha is None or alpha > 0):
        raise ValueError(f"tau, lr and lr_a must be >= 0 and alpha > 0, not tau = {tau}, lr = {lr}, lr_a = {lr_a}, alpha = {alpha}")
    spectral_gate(torch.ones(1), lam, s_min)               # raises if out of range
    sites = []
    for names in split_layers(targets, passes):
        C_pre, C_task = (collect_covariances(model, batches, names) for batches in (pretrain_batches, task_batches))
        for name in C_pre.keys() - names:                  # "f" has matched "sub.f" as well
            del C_pre[name]
        sites += decompose(C_pre, C_task, rank, tau)
    return attach(model, sites, lr, lr_a=lr_a, alpha=alpha, lam=lam, s_min=s_min, zero_start=zero_start, offload_bases=offload_bases)


def merge(model):
    """Fold every adapter into its base layer, in place, and return the plain model (its parameters stay frozen)."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    return model
