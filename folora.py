"""FoLoRA: LoRA fine-tuning that does not forget (arXiv 2606.00132). One file, torch alone.

LoRA adds a trainable product B A to a frozen linear layer W0. FoLoRA lets A move only along input
directions that the task uses much and the model's pretraining text uses little. With the layer's
input covariances C_pre and C_task on these two texts, and H = C_pre + τ I, an update ΔA has

    forgetting   R(ΔA) = tr(ΔA H ΔAᵀ)         how far it moves A's output on pretraining text
    utility      U(ΔA) = tr(ΔA C_task ΔAᵀ)    how far it moves A's output on the task
    step         ΔA = -lr · Adam(G V) · diag(s) · Vᵀ          where G is the gradient of A

A column v of V solves C_task v = γ H v, so γ = U/R is the utility of v per unit of forgetting. The
gate s = γ / (γ + λ) is near 1 for useful directions and near 0 for harmful ones. The pretraining
text is sampled from the model itself. A starts in the directions where that text has least energy.

    import folora
    texts = folora.sample_calibration(model, tokenizer, 256)        # what must not be forgotten
    pretrain = [{"input_ids": text[None]} for text in texts]        # batches for model(**batch)
    optimizer = folora.prepare(model, pretrain, task_batches, lr=3e-3, rank=32)
    for batch in task_batches:                                      # any loop, any scheduler
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folora.save_adapter(model, "adapter")                           # for PEFT, or merge(model)

On a model that PEFT has wrapped, also on a quantised base, prepare starts PEFT's own adapter.

    paper             shape                   in code               meaning
    W0                (d_out, d_in)           weight                pretrained weight of a layer
    A, B, κ           (r, d_in), (d_out, r)   lora_A, lora_B        W = W_res + κ B A; κ: `scaling`
    C_pre, C_task     (d_in, d_in)            C_pre, C_task         means of x xᵀ; mean eigenvalue 1
    τ, H = L Lᵀ       scalar, (d_in, d_in)    tau, H, L             the ridge; H = C_pre + τ I
    V, γ              (d_in, k), (k,)         V (a basis), gamma    Vᵀ H V = I, Vᵀ C_task V = Γ
    s, λ, s_min       (k,), scalars           gate, lam, s_min      gate, its sharpness and floor

Not included: dense weights (Appendix D), weight decay, convolutions, fused experts.
Keep torch.set_float32_matmul_precision at its default, "highest".
"""
import ctypes
import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# Appendix B adapts all seven projections of a block.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- 3.1  First-order preservation: covariances for forgetting (Eq. 5-6) and utility (Eq. 7) -----

def _factors(layer):
    """(A, B, κ) of the adapter of a LoRALinear or of a layer that PEFT has wrapped. Other layers
    have none: None. PEFT's layers are known by their attributes, so peft need not be imported."""
    if isinstance(layer, LoRALinear):
        return layer.lora_A, layer.lora_B, layer.scaling
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        raise ValueError(f"{len(active)} adapters are active: choose one with set_adapter")
    factors = [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in active]
    return factors[0] if factors else None


def find_targets(model, target_modules=TARGET_MODULES, rank=1):
    """The layers to adapt, {full name: module}, in the model's order: those with an active adapter
    of PEFT's, if there are any, else the nn.Linear modules that target_modules names.

    target_modules   a name or several; each matches a whole name or its end: "q_proj" matches
                     "layers.0.self_attn.q_proj"
    ValueError       the layers cannot be adapted, or not with this rank
    """
    modules = dict(model.named_modules())
    wrapped = {name: m for name, m in modules.items() if hasattr(m, "base_layer") and _factors(m)}
    for name, module in wrapped.items():
        A, B, _ = _factors(module)
        readable = hasattr(module.base_layer, "weight") and not hasattr(module, "parameter_name")
        if not readable or A.ndim != 2:
            raise ValueError(f"{name} is fused experts, a convolution or unreadable: leave it out")
        if B.any() or not A.requires_grad:
            raise ValueError(f"{name}: lora_B is not 0, or frozen. Use init_lora_weights=True")
    if wrapped:
        return wrapped
    if hasattr(model, "peft_config") or any(hasattr(m, "base_layer") for m in modules.values()):
        raise ValueError("PEFT has wrapped this model, but not a linear layer with LoRA")
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    matches = lambda name, target: f".{name}".endswith(f".{target}")
    found = {n: m for n, m in linears.items() if any(matches(n, t) for t in targets)}
    missing = [t for t in targets if not any(matches(n, t) for n in found)]
    if missing or not found:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ValueError(f"no nn.Linear is called {', '.join(missing) or '(nothing)'}, but {there}")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in found.items():
        if uses[id(module.weight)] > 1:
            raise ValueError(f"{name} shares its weight with another module (tied): leave it out")
        weight = module.weight
        if isinstance(module, LoRALinear):
            raise ValueError(f"{name} has adapters already: merge them first")
        if weight.element_size() < 2 or type(weight).__module__.startswith("torchao"):
            raise ValueError(f"{name} is quantised: wrap the model with PEFT's get_peft_model")
        if not 0 < rank <= module.in_features:
            raise ValueError(f"rank {rank} is not from 1 to {module.in_features}, {name}'s width")
    return found


@contextmanager
def plain_mode(model):
    """Evaluation mode and a default generation_config: a chat model's penalties and beams are no
    part of B.4. Both are put back at the end, also after an error."""
    modes = {module: module.training for module in model.modules()}
    configs = {m: m.generation_config for m in modes if "generation_config" in vars(m)}
    for module in modes:
        # In evaluation mode on a CPU with AVX512-BF16, bitsandbytes (0.50) repacks its 4-bit
        # weights. From then on the layer's input gets no gradient, without a message.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError("bitsandbytes has repacked its weights: call prepare earlier")
            module.support_avx512bf16_for_cpu = False
    try:
        model.eval()
        for module, config in configs.items():                  # PEFT's wrapper has one, too
            module.generation_config = config and type(config)()
        yield
    finally:
        for module, config in configs.items():
            module.generation_config = config
        for module, training in modes.items():
            module.training = training


def _on_device_of(model, batch):
    if not hasattr(batch, "items"):
        raise ValueError(f"a batch is a dict for model(**batch), not a {type(batch)}")
    device = next(model.parameters()).device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def _real_tokens(name, x, mask):
    """x (..., d_in) without its padding, in float32: (tokens, d_in)."""
    rows = x.reshape(-1, x.shape[-1]).float()                   # (batch * length, d_in)
    if mask is None:
        return rows
    if x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise ValueError(f"{name} received {tuple(x.shape[:-1])} rows where attention_mask is "
                         f"{tuple(mask.shape)}: pass batches without padding")
    return rows[mask.reshape(-1).bool().to(rows.device)]


def collect_covariances(model, batches, target_modules=TARGET_MODULES):
    """Input covariances of the target layers: C_pre or C_task, depending on the text.

    batches      dicts for model(**batch). Rows whose "attention_mask" is 0 do not count.
    returns      {module name: (d_in, d_in) float32}, the mean of x xᵀ over all tokens, where the
                 paper has the sum. Modules that read one input tensor (q, k, v; gate, up) get one
                 covariance. Under torch.distributed each process gives its share of the text.
    ValueError   a layer that no token reached, inputs that are not finite
    """
    targets = find_targets(model, target_modules)
    sums, tokens, readers = {}, Counter(), {name: [] for name in targets}
    last_input = last_name = mask = None

    def hook(module, args, kwargs, name):
        nonlocal last_input, last_name
        x = args[0] if args else kwargs["input"]
        if x is not last_input:                                 # `name` is the first to read x
            last_input, last_name, rows = x, name, _real_tokens(name, x, mask)
            if name not in sums:
                sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            sums[name].addmm_(rows.mT, rows)                    # C += X Xᵀ, where X = rowsᵀ
            tokens[name] += len(rows)
        readers[name].append(last_name)                         # who was first in each call

    handles = [m.register_forward_pre_hook(functools.partial(hook, name=name), with_kwargs=True)
               for name, m in targets.items()]
    try:
        with plain_mode(model), torch.inference_mode(False), torch.no_grad():
            for batch in batches:
                batch = _on_device_of(model, batch)
                mask, last_input = batch.get("attention_mask"), None
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, first in readers.items():
        if not first or not tokens[first[0]]:
            raise ValueError(f"no token reached {name}: give at least one batch, of text that does")
        if set(first) != {first[0]} or len(first) != len(readers[first[0]]):
            raise ValueError(f"{name} shares its input in some calls only: leave it out")
    C = {name: _mean_over_processes(name, sums[name], tokens[name])
         for name in targets if name in sums}                   # in one order in all processes
    return {name: C[first[0]] for name, first in readers.items()}


def _mean_over_processes(name, total, tokens):
    """total / tokens, both summed over the processes of torch.distributed."""
    count = torch.tensor(tokens, device=total.device)           # int64: exact beyond 2^24
    for summed in (total, count) if dist.is_available() and dist.is_initialized() else ():
        dist.all_reduce(summed)
    if not torch.isfinite(total).all():
        raise ValueError(f"the inputs of {name} are not finite: load the model in bfloat16")
    return total.div_(count)


# ---- 3.2  The generalized eigenbasis: input directions by utility per unit of forgetting ---------
#
# Eq. 5-7    R(ΔA) = tr(ΔA H ΔAᵀ) with H = C_pre + τ I, and U(ΔA) = tr(ΔA C_task ΔAᵀ)
# Eq. 8-10   for a rank-one ΔA = u vᵀ:  U / R = ρ(v) = vᵀ C_task v / vᵀ H v
# Eq. 11-15  ρ is stationary where  C_task v = γ H v,  and there  ρ(v) = γ
# Eq. 16-17  H^(-1/2) C_task H^(-1/2) = R Γ Rᵀ,  V = H^(-1/2) R:  Vᵀ H V = I and Vᵀ C_task V = Γ
#
# Since Vᵀ H V = I, forgetting is the squared length of the step in V's coordinates. Adam moves
# every coordinate by about lr, so without the gate every direction would cost the same forgetting,
# whatever its use.

def _cholesky(C, *ridges):
    """L (..., d, d) in float64, L Lᵀ = C + ridge · I, with the first ridge that allows it."""
    for ridge in ridges:
        H = C.to(torch.float64, copy=True)
        H.diagonal(dim1=-2, dim2=-1).add_(ridge)
        L, info = torch.linalg.cholesky_ex(H)
        if not info.any() and torch.isfinite(L).all():
            return L
    raise ValueError(f"a covariance + {ridge:g} I is not positive definite, or not finite")


def _eigh(M):
    """torch.linalg.eigh. In float32 it may fail on a large low-rank matrix, above all on a GPU:
    then float64 is tried, and at last the CPU."""
    for convert in (lambda M: M, torch.Tensor.double, lambda M: M.double().cpu()):
        with suppress(torch.linalg.LinAlgError):
            values, vectors = torch.linalg.eigh(convert(M))
            if torch.isfinite(values).all() and torch.isfinite(vectors).all():
                return values.to(M), vectors.to(M)
    raise ValueError("the eigenproblem of a layer has no finite solution")


def _top_eigenvectors(apply, like, k, steps=8, extra=32):
    """The k largest eigenvalues (..., k), descending, and eigenvectors (..., d, k) of the symmetric
    matrix M whose product with n columns is `apply`: (..., d, n) -> (..., d, n). Block subspace
    iteration: n = k + extra random columns are multiplied by M and made orthonormal, `steps` times.
    """
    n, generator = min(k + extra, like.shape[-1]), torch.Generator().manual_seed(0)
    Q = torch.randn(*like.shape[:-1], n, generator=generator).to(like)
    for _ in range(steps):
        Q = torch.linalg.qr(apply(Q)).Q                         # (..., d, n)
    values, E = _eigh(Q.mT @ apply(Q))                          # (..., n, n): exact inside the span
    return values.flip(-1)[..., :k], (Q @ E).flip(-1)[..., :k]


def generalized_eigenbasis(C_task, C_pre, tau, k=None):
    """Solve C_task v = γ H v with H = C_pre + τ I, for one layer or for a stack of equal shapes.

    C_task, C_pre   (..., d, d), symmetric, positive semidefinite, of any rank
    tau             τ > 0, in the units of C_pre's eigenvalues
    k               the k directions of largest γ, to about 2% (None: all d, the paper's)
    returns         gamma (..., k), descending; V (..., d, k) with Vᵀ H V = I and Vᵀ C_task V = Γ
    ValueError      C_pre + τ I is not positive definite or not finite

    The paper's H^(-1/2) is the symmetric root. Any L with L Lᵀ = H gives the same V up to signs and
    to rotations inside a repeated γ. Cholesky's L is the cheapest, and Adam ignores signs.
    """
    L, C = _cholesky(C_pre, tau), C_task.to(C_pre.dtype)
    solve = torch.linalg.solve_triangular
    if k is None or k >= C.shape[-1]:
        half = solve(L, C.double(), upper=False)                # L⁻¹ C_task
        M = solve(L, half.mT, upper=False).to(C.dtype)          # L⁻¹ C_task L⁻ᵀ
        gamma, R = (t.flip(-1) for t in _eigh(M))               # Eq. 16: M = R Γ Rᵀ
    else:
        L_32 = L.to(C.dtype)                                    # float32 is enough to find R
        M_times = lambda Q: solve(L_32, C @ solve(L_32.mT, Q, upper=True), upper=False)
        gamma, R = _top_eigenvectors(M_times, C, k)
    # Eq. 17: V = L⁻ᵀ R. In float32 it would be off by cond(H) · 1e-7, all of it where H is small.
    V = solve(L.mT, R.double(), upper=True)
    return gamma.clamp(min=0), V.to(C.dtype)


# ---- 3.3  SAdam: Adam in the coordinates of V, its step gated along each direction ---------------

def spectral_gate(gamma, lam, s_min):
    """The gate (..., k) of gamma (..., k). lam > 0 is the γ with gate one half; s_min in [0, 1]."""
    if not 0 < lam < math.inf or not 0 <= s_min <= 1:
        raise ValueError(f"lam must be > 0, s_min in [0, 1], not lam = {lam}, s_min = {s_min}")
    s = gamma / (gamma + lam)                                   # Eq. 22: s_i = γ_i / (γ_i + λ)
    return s.clamp(min=s_min)                                   #         s̃_i = max(s_i, s_min)


class SAdam(torch.optim.Optimizer):
    """Spectral-gated Adam for A and plain Adam for all else, in one optimiser.

    params          parameters or groups, as for torch.optim.Adam. A group with a "basis" (d_in, k)
                    and a "gate" (k,) is spectral: its parameters are matrices A (rank, d_in), which
                    move in the basis' span only. Any other group gets torch.optim.Adam's numbers.
    lr, betas, eps  as in Adam; each may be set in a group, and so may "scale", a factor of its step

    A's moments are (rank, k). The state_dict holds the bases: a basis that is computed again may
    differ in signs, and the moments belong to the saved columns. Gradients that are not finite
    spoil the parameters silently, as in Adam. Rows of A move alone, so FSDP2 may shard A by rows.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        if not 0 <= lr < math.inf or not all(0 <= b < 1 for b in betas) or not 0 <= eps < math.inf:
            raise ValueError(f"lr = {lr}, betas = {betas} or eps = {eps} is out of range")
        defaults = dict(lr=lr, betas=betas, eps=eps, scale=1.0, basis=None, gate=None)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self._check(self.param_groups[-1], self.param_groups[-1]["params"])

    def load_state_dict(self, state_dict):
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"]):
            if (ours["basis"] is None) != (theirs.get("basis") is None):
                raise ValueError("the saved optimiser has its bases in other groups than this one")
            self._check(theirs, ours["params"])
        super().load_state_dict(state_dict)
        for group in self.param_groups:                         # torch moves moments, not bases
            for key in ("basis", "gate") if group["basis"] is not None else ():
                group[key] = group[key].to(group["params"][0].device)

    @staticmethod
    def _check(group, params):
        V, gate = group.get("basis"), group.get("gate")
        if (V is None) != (gate is None):
            raise ValueError("a spectral group needs both a basis and a gate")
        fits = lambda p: V.ndim == 2 and len(V) == p.shape[-1] and gate.shape == V.shape[1:]
        if V is not None and not all(map(fits, params)):
            shapes = [tuple(t.shape) for t in (V, gate, *params)]
            raise ValueError(f"basis, gate and parameters do not fit: {shapes}")

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient. Returns closure()'s loss, if given."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:                          # to_local: this process's shard
                    local = (t.to_local() if hasattr(t, "to_local") else t for t in (p, p.grad))
                    self._update(*local, self.state[p], group)
        return loss

    @staticmethod
    def _update(A, G, state, group):
        V, gate, eps, (beta1, beta2) = (group[key] for key in ("basis", "gate", "eps", "betas"))
        if V is not None and A.element_size() < 4:              # its steps would be rounded away
            raise ValueError(f"the adapters have been cast to {A.dtype}, as TRL does on a quantised"
                             " base: cast them back with p.data = p.data.float() before training")
        if V is not None:
            G = (G.to(V.dtype) @ V).to(A.dtype)                 # Eq. 18-19: Ḡ = G V, (r, k)
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(G), exp_avg_sq=torch.zeros_like(G))
        state["step"] += 1
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
        m.lerp_(G, 1 - beta1)                                   # Eq. 20: m ← β₁ m + (1 - β₁) Ḡ
        v.mul_(beta2).addcmul_(G, G, value=1 - beta2)           #         v ← β₂ v + (1 - β₂) Ḡ²
        m_hat, v_hat = m / (1 - beta1 ** t), v / (1 - beta2 ** t)                # Eq. 21
        step = m_hat / (v_hat.sqrt() + eps)
        if V is not None:
            # The gate scales the step. A factor on the gradient would be divided out again by √v̂.
            step = ((step * gate).to(V.dtype) @ V.mT).to(A.dtype)                # Eq. 23-24: (r, d)
        A.sub_(group["lr"] * group["scale"] * step)


def _refuse_others(optimizer, args, kwargs):
    """A Trainer without `optimizers` would train the adapters with AdamW, without a word."""
    plain = (p for group in optimizer.param_groups if "basis" not in group for p in group["params"])
    if any(hasattr(p, "needs_sadam") for p in plain):
        raise ValueError("AdamW or another optimiser trains FoLoRA's adapters: give the Trainer "
                         "the one that prepare has returned, optimizers=(optimizer, None)")


register_optimizer_step_pre_hook(_refuse_others)


# ---- B.3  The start: A0 spans the input directions with the least energy on pretraining text -----

def null_space(C, rank):
    """A0 = U_perpᵀ (..., rank, d), the eigenvectors of C (..., d, d) with the smallest eigenvalues.

    With this A0 the first term of Eq. 3, ΔB A0 X_pre, is nearly zero. It is found by inverse
    iteration in float64: float32 fails where one input direction has nearly all the energy.
    """
    if not 0 < rank <= C.shape[-1]:
        raise ValueError(f"rank {rank} is not from 1 to {C.shape[-1]}, the input width")
    # Rounding in C can make it slightly indefinite. Then the next larger ridge is tried.
    L = _cholesky(_unit(C.double()), 1e-8, 1e-6, 1e-4, 1e-2)
    _, E = _top_eigenvectors(lambda Q: torch.cholesky_solve(Q, L), L, rank)      # of C⁻¹
    return E.mT.to(C.dtype).contiguous()


def _unit(C):
    """C (..., d, d) divided by its mean eigenvalue, trace / d."""
    return C / C.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[..., None, None]


class LoRALinear(nn.Linear):
    """A frozen nn.Linear plus a trainable low-rank term: y = W x + κ B A x, κ = alpha / rank.

    alpha    None: κ = 1
    A0, B0   neither: LoRA's start, A Kaiming-uniform and B = 0. A0 (rank, d_in) alone: the paper's,
             B0 = κ⁻¹ W0 A0ᵀ. Both: as given.

    W_res = W0 - κ B0 A0 takes W0's place, so the layer starts as W0, up to rounding in W0's dtype.
    A and B are float32 and are cast to the input's dtype where they are applied. Hugging Face's
    save_pretrained would lose them: save_adapter or merge first.
    """

    def __init__(self, linear, rank, alpha=None, A0=None, B0=None):
        d_out, d_in = linear.weight.shape
        if not 0 < rank <= d_in or A0 is not None and A0.shape != (rank, d_in):
            raise ValueError(f"rank {rank} is not from 1 to {d_in}, the input width, or not A0's")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be > 0 and finite (None: scaling 1), not {alpha}")
        super().__init__(d_in, d_out, bias=False, device="meta")
        self.weight, self.bias = linear.requires_grad_(False).weight, linear.bias
        self.scaling, self.start = 1.0 if alpha is None else alpha / rank, None
        W0 = linear.weight.detach().float()
        if A0 is None:
            A0 = nn.init.kaiming_uniform_(W0.new_empty(rank, d_in), a=math.sqrt(5))
            B0 = W0.new_zeros(d_out, rank)
        elif B0 is None:
            B0 = W0 @ A0.to(W0).mT / self.scaling               # κ⁻¹ W0 U_perp: (d_out, r)
        self.lora_A, self.lora_B = (nn.Parameter(t.to(W0).clone()) for t in (A0, B0))
        if B0.any():
            self.start = A0.to(W0).clone(), B0.to(W0).clone()
            self.weight = self._frozen(W0 - self.scaling * self.start[1] @ self.start[0])

    def _frozen(self, W):
        return nn.Parameter(W.to(self.weight.dtype), requires_grad=False)

    def forward(self, x):
        low = F.linear(x, self.lora_A.to(x.dtype))              # A x: (..., d_in) -> (..., r)
        return super().forward(x) + self.scaling * F.linear(low, self.lora_B.to(x.dtype))

    @torch.no_grad()
    def merged(self):
        """A plain nn.Linear with W = W_res + κ B A, rounded to the layer's dtype."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        W = self.weight.float() + self.scaling * self.lora_B @ self.lora_A
        linear.weight, linear.bias = self._frozen(W), self.bias
        return linear


# ---- The recipe: covariances, bases, adapters and their optimiser; after training, merge ---------

def decompose(C_pre, C_task, rank, tau=0.01, basis_rank=None, progress=None):
    """Solve one eigenproblem per distinct input. Nothing here depends on λ, s_min, lr or alpha.

    C_pre, C_task   from collect_covariances. Each is divided by its mean eigenvalue, so that γ
                    compares shares of energy. Both are emptied: pass dict(C) to keep one.
    rank, tau       the rank of A0; the ridge of H, relative to the mean eigenvalue of C_pre
    basis_rank      k, the number of directions in which A may move (None: all, the paper's)
    progress        called with 1 for each input that was solved
    returns         [{"modules": names of the layers that read this input, "A0": (rank, d_in),
                    "gamma": (k,), "V": (d_in, k)}], which torch.save keeps
    """
    if not C_pre or C_pre.keys() != C_task.keys():
        raise ValueError("C_pre and C_task need the same layers. Were they emptied? Pass dict(C)")
    readers, bases = {}, []
    for name in C_pre:
        readers.setdefault((id(C_pre[name]), id(C_task[name])), []).append(name)
    for names in readers.values():
        pre, task = (_unit([C.pop(name) for name in names][0]) for C in (C_pre, C_task))
        gamma, V = generalized_eigenbasis(task, pre, tau, basis_rank)
        basis = {"A0": null_space(pre, min(rank, len(pre))), "gamma": gamma, "V": V.contiguous()}
        for tensor in basis.values() if dist.is_available() and dist.is_initialized() else ():
            dist.broadcast(tensor, 0)                           # two solvers may differ
        bases.append({"modules": names, **basis})
        progress and progress(1)
    return bases


def _row_length(layer):
    """The root mean square length of the rows of W0. If PEFT has wrapped the layer, W0 may be
    quantised: then it is read as the layer's output for the identity, without the bias."""
    W0, base = layer.weight, getattr(layer, "base_layer", None)
    if base is not None:
        dtype = W0.dtype if W0.is_floating_point() else torch.float32
        # Without requires_grad, bitsandbytes may repack its weights: see plain_mode.
        inputs = torch.eye(layer.in_features, dtype=dtype, device=W0.device, requires_grad=True)
        no_bias = {} if base.bias is None else {"bias": torch.zeros_like(base.bias)}
        W0 = torch.func.functional_call(base, no_bias, (inputs,))            # (d_in, d_out)
    return W0.float().norm().item() / math.sqrt(layer.out_features)


@torch.inference_mode(False)
@torch.no_grad()
def attach(model, bases, lr, alpha=None, lam=1.0, s_min=0.0, zero_start=True):
    """Freeze the model, put an adapter on every layer of `bases` (from decompose), and return the
    SAdam that trains the adapters. If PEFT has wrapped the model, its own adapters start anew, and
    what else is trainable in it gets plain Adam at a tenth of lr, in the last group."""
    gates = [spectral_gate(basis["gamma"], lam, s_min) for basis in bases]       # checked first
    modules = dict(model.named_modules())
    if not bases or any(isinstance(module, LoRALinear) for module in modules.values()):
        raise ValueError("no bases, or the model has adapters already: merge them first")
    wrapped = any(map(_factors, modules.values()))
    for name, of_name in ((name, basis) for basis in bases for name in basis["modules"]):
        if getattr(modules.get(name), "in_features", None) != len(of_name["V"]):
            raise ValueError(f"the bases are another model's: {name} is not here or not as wide")
        if wrapped and (not zero_start or len(_factors(modules[name])[0]) > len(of_name["A0"])):
            raise ValueError("PEFT's adapters need zero_start=True and a basis of their rank")
    del modules                                                 # or the old layers would stay alive
    if not wrapped:
        model.requires_grad_(False)
    spectral, plain = [], []
    for basis, gate in zip(bases, gates):
        As = []
        for name in basis["modules"]:
            layer, A0 = model.get_submodule(name), basis["A0"]
            dtype, device = layer.weight.dtype, layer.weight.device
            if not wrapped:
                B0 = A0.new_zeros(layer.out_features, len(A0)) if zero_start else None
                layer = LoRALinear(layer, len(A0), alpha, A0.to(device), B0)
                model.set_submodule(name, layer)
            A, B, kappa = _factors(layer)
            if wrapped:                                         # each layer may have its own rank
                A.data = A0[:len(A)].to(device, copy=True)
                B.data = torch.zeros_like(B, dtype=A0.dtype)
            # One step from B = 0 makes the rows of κ B about lr times as long as W0's, so that one
            # lr serves layers and models of every scale. The paper's start gets plain Adam for B.
            scale = _row_length(layer) / (math.sqrt(len(A)) * kappa) if zero_start else 1.0
            plain.append({"params": [B], "scale": scale})
            A.needs_sadam = True
            As.append(A)
        # A bfloat16 basis takes half the memory. float16 would lose small gradients.
        V = basis["V"].to(device, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        spectral.append({"params": As, "basis": V, "gate": gate.to(device)})
    ours = {id(p) for group in spectral + plain for p in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    plain += [{"params": others, "scale": 0.1}] if others else []
    return SAdam(spectral + plain, lr)


def prepare(model, pretrain_batches, task_batches, lr, rank=128, alpha=None, tau=0.01, lam=1.0,
            s_min=0.0, target_modules=TARGET_MODULES, zero_start=True, basis_rank=128):
    """FoLoRA in one call: adapt `model` in place, freeze the rest, return the optimiser for it. A
    model from PEFT's get_peft_model keeps its own rank, alpha, targets and trainable parameters.

    pretrain_batches   batches (dicts for model(**batch)) of text that must not be forgotten
    task_batches       batches of the target task; 256 examples in the paper
    rank, alpha        of the adapters; κ = alpha / rank (None: 1)
    tau, basis_rank    as in decompose. With more directions the adapter learns and forgets more.
    lam, s_min         the gate's sharpness and floor, Eq. 22
    zero_start         start from B = 0 on the untouched W0; False: from the paper's κ⁻¹ W0 A0ᵀ
    ValueError         before any forward pass: a value out of range, an unknown target

    The paper's setting is s_min=0.3, zero_start=False, basis_rank=None. Move and cast the model
    first. Covariances take 8 d_in² bytes per distinct input.
    """
    factors = [_factors(layer) for layer in find_targets(model, target_modules, rank).values()]
    if any(factors):
        rank = max(len(A) for A, _, _ in factors)
    if any(factors) and not zero_start:
        raise ValueError("PEFT's adapters need zero_start=True: the paper's start changes W0")
    if not all(0 < x < math.inf for x in (tau, 1 if alpha is None else alpha)):
        raise ValueError(f"tau and alpha must be > 0 and finite, not {tau} and {alpha}")
    if not 0 <= lr < math.inf or not (basis_rank is None or basis_rank >= 1):
        raise ValueError(f"lr must be >= 0 and basis_rank >= 1, not {lr} and {basis_rank}")
    spectral_gate(torch.ones(1), lam, s_min)                    # raises if out of range
    C_pre, C_task = (collect_covariances(model, batches, target_modules)
                     for batches in (pretrain_batches, task_batches))
    bases = decompose(C_pre, C_task, rank, tau, basis_rank)
    return attach(model, bases, lr, alpha, lam, s_min, zero_start)


def merge(model):
    """Fold every LoRALinear's adapter into its layer, in place, and return the plain model, still
    frozen. PEFT's own models have merge_and_unload."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoRALinear) and _factors(module):
            raise ValueError("PEFT has wrapped this model: use its merge_and_unload")
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    return model


def save_adapter(model, directory):
    """Write the adapters in PEFT's format, to be loaded on the untouched base model. From B = 0
    they have rank r. The paper's start needs W - W0 = κ (B A - B0 A0), which has rank 2 r. A model
    that PEFT has wrapped has save_pretrained instead."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("no LoRALinear is here: PEFT's own models have save_pretrained")
    tensors = {}
    for name, layer in layers.items():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        if layer.start:
            A, B = torch.cat([A, layer.start[0]]), torch.cat([B, -layer.start[1]], dim=1)
        for factor, t in (("lora_A", A), ("lora_B", B)):        # (2 r, d_in), (d_out, 2 r), or r
            tensors[f"base_model.model.{name}.{factor}.weight"] = t
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": len(A),
              "lora_alpha": layer.scaling * len(A), "target_modules": list(layers),
              "base_model_name_or_path": getattr(model, "name_or_path", None)}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(tensors))


def _safetensors(tensors):
    """float32 tensors as a file of the safetensors format: the length of a header (8 bytes, little
    endian), the header (JSON: dtype, shape and place of each tensor), the numbers."""
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in tensors.items():
        values = tensor.float().cpu().contiguous()
        data += ctypes.string_at(values.data_ptr(), values.nbytes)           # needs no numpy
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(data) - values.nbytes, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                             # the numbers begin at 8 n bytes
    return len(text).to_bytes(8, "little") + text + data


# ---- 3.4, B.4  Pretraining text from the model itself (this part needs a Hugging Face model) -----

DECODING = ((0.7, dict(temperature=1.0, top_p=1.0, top_k=0)),   # share of the samples, how drawn
            (0.2, dict(temperature=1.0, top_p=0.95, top_k=0)),
            (0.1, dict(temperature=1.2, top_p=0.98, top_k=50)))


def reject_reason(tokens):
    """B.4's screen for degenerate text, a list of token ids: why it is rejected, or None."""
    n = len(tokens)
    if n < 32:
        return "fewer than 32 tokens"
    if max(len(list(run)) for _, run in itertools.groupby(tokens)) >= 20:
        return "a run of 20 equal tokens"
    if n >= 128 and len(set(tokens)) / n < 0.12:
        return "too few distinct tokens"
    fours = set(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))
    return "too few distinct 4-grams" if n >= 256 and len(fours) / (n - 3) < 0.25 else None


def _candidates(model, count, bos, eos, batch_size, lengths):
    """Yield `count` token lists drawn from a single BOS, each cut before its end of sequence."""
    shares = torch.tensor([share for share, _ in DECODING])
    drawn = Counter(torch.multinomial(shares, count, replacement=True).tolist())
    for decoding, n in sorted(drawn.items()):                   # a batch has one decoding
        for size in (min(batch_size, n - done) for done in range(0, n, batch_size)):
            start = torch.full((size, 1), bos, device=next(model.parameters()).device)
            how = dict(do_sample=True, **DECODING[decoding][1], **lengths,
                       eos_token_id=eos, pad_token_id=eos[0])
            rows = model.generate(start, attention_mask=start.new_ones(size, 1), **how)
            for row in rows[:, 1:].tolist():
                yield row[:next((i for i, token in enumerate(row) if token in eos), len(row))]


@torch.no_grad()
def sample_calibration(model, tokenizer, num_samples, min_new_tokens=128, max_new_tokens=512,
                       batch_size=64, seed=0, progress=None):
    """Sample pretraining text from the model (Eq. 27) by B.4's protocol: ancestral sampling from
    BOS, a decoding drawn from a mixture, degenerate text and duplicates rejected.

    model          a causal language model with Hugging Face's `generate`
    tokenizer      needs bos_token_id, eos_token_id and decode; for a BOS that is missing (Qwen) the
                   generation_config's is taken, else EOS
    progress       called with 1 for each accepted sample, such as tqdm(total=num_samples).update
    returns        num_samples LongTensors on the CPU, BOS first, in random order; the same ones for
                   the same seed, batch_size, dtype (the model's; B.4 has float16) and device
    RuntimeError   more than 64 samples, and ten for each accepted one, are rejected
    """
    if not 0 < min_new_tokens <= max_new_tokens:
        raise ValueError(f"{min_new_tokens} to {max_new_tokens} new tokens is no range of lengths")
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None) or tokenizer.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]               # a chat model may have several
    starts = tokenizer.bos_token_id, getattr(config, "bos_token_id", None), eos[0]
    bos = next(token for token in starts if token is not None)
    kept, seen, rejected = [], set(), 0
    lengths = dict(min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens)
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with plain_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        while len(kept) < num_samples:
            for ids in _candidates(model, num_samples - len(kept), bos, eos, batch_size, lengths):
                text = hashlib.sha1(tokenizer.decode(ids).encode()).digest()
                reason = "exact duplicate" if text in seen else reject_reason(ids)
                seen.add(text)
                if reason is None:
                    kept.append(torch.tensor([bos, *ids]))
                    progress and progress(1)
                rejected += reason is not None
                if rejected > 64 + 10 * len(kept):
                    raise RuntimeError(f"the screen rejects this model's text: {rejected} samples, "
                                       f"the last for {reason}, and {len(kept)} accepted")
        return [kept[i] for i in torch.randperm(num_samples)]   # kept is sorted by decoding
