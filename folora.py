"""FoLoRA: LoRA fine-tuning that forgets little (arXiv 2606.00132). One file, torch >= 2.6 alone.

LoRA adds a trainable product B A to a frozen linear layer W0. FoLoRA lets A move only along input
directions that the task uses much and the model's pretraining text uses little. With the layer's
input covariances C_pre and C_task on these two texts, and H = C_pre + τ I, an update ΔA has

    forgetting   R(ΔA) = tr(ΔA H ΔAᵀ)         how much it moves A's output on pretraining text
    utility      U(ΔA) = tr(ΔA C_task ΔAᵀ)    how much it moves A's output on the task
    step         ΔA = -lr · Adam(G V) · diag(s) · Vᵀ          where G is the gradient of A

A column v of V solves C_task v = γ H v, so γ = U/R is the utility of v per unit of forgetting. The
gate s = γ / (γ + λ) is near 1 for useful directions and near 0 for harmful ones. The pretraining
text is sampled from the model itself. A starts in the directions where that text has least energy.

    texts = folora.sample_calibration(model, tokenizer, 128)        # what must not be forgotten
    pretrain = [{"input_ids": text[None]} for text in texts]        # batches for model(**batch)
    optimizer = folora.prepare(model, pretrain, task_batches, lr=3e-3, rank=32)
    ...                                                             # any training loop
    folora.save_adapter(model, "adapter")                           # for PEFT, or merge(model)

    paper             shape                   in code           meaning
    W0 or W_res       (d_out, d_in)           weight            frozen; W_res = W0 - κ B0 A0
    A, B, κ           (r, d_in), (d_out, r)   lora_A, lora_B    W = W_res + κ B A; κ is `scaling`
    C_pre, C_task     (d_in, d_in)            C_pre, C_task     means of x xᵀ, mean eigenvalue 1
    τ, H = L Lᵀ       scalar, (d_in, d_in)    tau, H, L         the ridge; H = C_pre + τ I
    V, γ              (d_in, k), (k,)         V, gamma          Vᵀ H V = I, Vᵀ C_task V = Γ
    s, λ, s_min       (k,), scalars           gate, lam, s_min  gate, the γ of gate 1/2, floor

Not included: dense weights (Appendix D), weight decay, fused experts, offloading, FSDP, MPS.
float16 needs a GradScaler. Keep torch.set_float32_matmul_precision at its default, "highest".
"""
import ctypes
import itertools
import json
import math
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- The layers to adapt, in a plain model or in one that PEFT has wrapped -----------------------

def _factors(layer):
    """(A, B, κ) of a LoRALinear or of a layer that PEFT has wrapped, else None. Needs no peft."""
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
    """The layers to adapt, {full name: module}. Where PEFT has wrapped the model, they are PEFT's.

    target_modules   the names of nn.Linear modules, or the ends of their names (Appendix B: all
                     seven projections of a block), or "all-linear": all but the output head
    ValueError       the layers cannot be adapted, or not with this rank
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):  # would not average new gradients
        raise ValueError("the model is in DistributedDataParallel: call prepare before that")
    modules = dict(model.named_modules())
    if hasattr(model, "peft_config"):
        found = {name: module for name, module in modules.items() if _factors(module)}
        starts = lambda A, B, _: A.ndim == 2 and A.requires_grad and not B.any()
        wrong = [name for name, module in found.items()
                 if hasattr(module, "parameter_name") or not starts(*_factors(module))]
        if wrong or not found:
            raise ValueError(f"{wrong[0] if wrong else 'the model'}: PEFT must have wrapped linear "
                             "layers, with trainable LoRA and init_lora_weights=True")
        return found
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    ends = tuple(f".{target}" for target in targets)
    found = {name: module for name, module in linears.items() if f".{name}".endswith(ends)}
    missing = [end[1:] for end in ends if not any(f".{name}".endswith(end) for name in found)]
    if targets == ["all-linear"]:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found, missing = {n: module for n, module in linears.items() if module is not head}, []
    if missing or not found:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ValueError(f"no nn.Linear is called {', '.join(missing or targets)}, only {there}")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in found.items():
        if uses[id(module.weight)] > 1:                         # a merged copy would not be tied
            raise ValueError(f"{name} shares its weight with another module: leave it out")
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
            raise ValueError(f"{name} is adapted (merge first) or quantised (use get_peft_model)")
        if not isinstance(rank, int) or not 0 < rank <= module.in_features:
            raise ValueError(f"rank {rank} is not from 1 to {module.in_features}, {name}'s width")
    return found


@contextmanager
def plain_mode(model):
    """Evaluation mode and a default generation_config: a chat model's penalties and beams are no
    part of B.4. Both are put back at the end, but not the setting of bitsandbytes."""
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


# ---- 3.1  First-order preservation: covariances for forgetting (Eq. 5-6) and utility (Eq. 7) -----

@torch.inference_mode(False)
@torch.no_grad()
def collect_covariances(model, batches, target_modules=TARGET_MODULES):
    """C_pre or C_task, depending on the text: {module name: (d_in, d_in) float32 on the CPU}, the
    mean of x xᵀ over all tokens that a module reads, where the paper has the sum. Modules that read
    one tensor (q, k, v; gate, up) get one covariance.

    batches      dicts for model(**batch), the same ones in every process. Tokens whose
                 "attention_mask" is 0 do not count. Do not pad for experts or encoder-decoders.
    ValueError   a layer that no token reached
    """
    targets, device = find_targets(model, target_modules), next(model.parameters()).device
    sums, tokens, first_reader = {}, Counter(), {}
    last_input = last_module = mask = None

    def hook(module, args, kwargs):
        nonlocal last_input, last_module
        x = args[0] if args else next(iter(kwargs.values()))
        if x is not last_input:                                 # `module` is the first to read x
            last_input, last_module = x, module
            rows = x.reshape(-1, x.shape[-1]).float()           # (batch * length, d_in)
            if mask is not None and mask.numel() == len(rows):  # a pooler reads one row a text
                rows = rows[mask.flatten().bool().to(rows.device)]           # (tokens, d_in)
            if module not in sums:
                sums[module] = rows.new_zeros(rows.shape[1], rows.shape[1])
            sums[module].addmm_(rows.mT, rows)                  # C += X Xᵀ, where X = rowsᵀ
            tokens[module] += len(rows)
        if first_reader.setdefault(module, last_module) is not last_module:
            raise ValueError("a layer shares its input in some calls only: leave it out")

    with plain_mode(model), ExitStack() as hooks:
        for module in targets.values():
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            ids = batch.get("input_ids") if hasattr(batch, "items") else 0
            if ids is not None and getattr(ids, "ndim", 0) != 2:
                raise ValueError("a batch is a dict with input_ids (batch, length), not a list")
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            mask, last_input = batch.get("attention_mask"), None
            model(**batch)
    unread = [name for name, module in targets.items() if not tokens[first_reader.get(module)]]
    if unread:
        raise ValueError(f"no token reached {unread[0]}: are the batches empty? If not, omit it")
    means = {module: (total / tokens[module]).cpu() for module, total in sums.items()}
    return {name: means[first_reader[module]] for name, module in targets.items()}


# ---- 3.2  The generalized eigenbasis: input directions by utility per unit of forgetting ---------
#
# Eq. 4      |(B0 + ΔB) ΔA X_pre| <= |B0 + ΔB| |ΔA X_pre|, so ΔA X_pre is what has to stay small
# Eq. 5-7    R(ΔA) = tr(ΔA H ΔAᵀ) with H = C_pre + τ I, and U(ΔA) = tr(ΔA C_task ΔAᵀ)
# Eq. 8-10   for a rank-one ΔA = u vᵀ:  U / R = ρ(v) = vᵀ C_task v / vᵀ H v
# Eq. 11-15  ρ is stationary where  C_task v = γ H v,  and there  ρ(v) = γ
# Eq. 16-17  H^(-1/2) C_task H^(-1/2) = R Γ Rᵀ (R a rotation),  V = H^(-1/2) R:
#            Vᵀ H V = I and Vᵀ C_task V = Γ
#
# Since Vᵀ H V = I, forgetting is the squared length of the step in V's coordinates. Adam moves
# every coordinate by about lr, so without the gate every direction would cost the same forgetting,
# whatever its use. All functions here take one matrix or a stack of them, (..., d, d).

def _unit(C):
    """C divided by its mean eigenvalue, trace / d, so that one τ and one λ serve all layers."""
    return C / C.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[..., None, None]


def _cholesky(C, *ridges):
    """L (..., d, d) in float64 with L Lᵀ = C + ridge · I, for the first ridge that allows it."""
    for ridge in ridges:
        H = C.to(torch.float64, copy=True)
        H.diagonal(dim1=-2, dim2=-1).add_(ridge)
        L, info = torch.linalg.cholesky_ex(H)
        if not info.any() and L.isfinite().all():
            return L
    raise ValueError(f"a covariance + {ridge:g} I is not positive definite, or not finite")


def _eigh(M):
    """torch.linalg.eigh. In float32 it may fail on a large low-rank matrix, above all on a GPU:
    then float64 is tried, and at last the CPU."""
    for convert in (lambda M: M, torch.Tensor.double, lambda M: M.double().cpu()):
        with suppress(torch.linalg.LinAlgError):
            values, vectors = torch.linalg.eigh(convert(M))
            if values.isfinite().all() and vectors.isfinite().all():
                return values.to(M), vectors.to(M)
    raise ValueError("the eigenproblem of a layer has no finite solution")


def _top_eigenvectors(apply, like, k, steps=8, extra=32):
    """The k largest eigenvalues (..., k), descending, and eigenvectors (..., d, k) of a symmetric M
    (..., d, d) like `like`, where apply(Q) = M Q. Block iteration: k + extra random columns are
    multiplied by M and made orthonormal, `steps` times."""
    n, generator = min(k + extra, like.shape[-1]), torch.Generator().manual_seed(0)
    Q = torch.randn(*like.shape[:-1], n, generator=generator, device="cpu").to(like)
    for _ in range(steps):
        Q = torch.linalg.qr(apply(Q)).Q                         # (..., d, n)
    values, E = _eigh(Q.mT @ apply(Q))                          # (..., n, n): exact inside the span
    return values.flip(-1)[..., :k], (Q @ E).flip(-1)[..., :k]


def generalized_eigenbasis(C_task, C_pre, tau, k=None):
    """Solve C_task v = γ H v with H = C_pre + τ I, for one layer or for a stack of equal shapes.

    C_task, C_pre   (..., d, d), symmetric, positive semidefinite, of any rank; τ in C_pre's units
    k               the k directions of largest γ, each to a few per cent (None: all d)
    returns         gamma (..., k), descending; V (..., d, k) with Vᵀ H V = I and Vᵀ C_task V = Γ
    ValueError      C_pre + τ I is not positive definite or not finite

    The paper's V = H^(-1/2) R has the symmetric root. Any L with L Lᵀ = H gives the same V up to
    signs, which Adam ignores, and to rotations inside a repeated γ.
    """
    L, C, solve = _cholesky(C_pre, tau), C_task.double(), torch.linalg.solve_triangular
    # Eq. 16 with L⁻¹ for H^(-1/2): M = L⁻¹ C_task L⁻ᵀ = R Γ Rᵀ. M is formed in float64: float32
    # would be off by cond(H) · 1e-7.
    M_times = lambda Q: solve(L, C @ solve(L.mT, Q, upper=True), upper=False)
    if k is None or k >= C.shape[-1]:
        M = M_times(torch.eye(C.shape[-1]).to(C).expand_as(C))
        gamma, R = (t.flip(-1) for t in _eigh(M.float()))
    else:
        gamma, R = _top_eigenvectors(M_times, C, k)
    V = solve(L.mT, R.double(), upper=True)                     # Eq. 17: V = L⁻ᵀ R
    return gamma.clamp(min=0).to(C_pre), V.to(C_pre)


# ---- 3.3  SAdam: Adam in the coordinates of V, its step gated along each direction ---------------

def spectral_gate(gamma, lam, s_min):
    """The gate (..., k) of gamma (..., k). lam > 0 is the γ with gate one half; s_min in [0, 1]."""
    if not 0 < lam < math.inf or not 0 <= s_min <= 1:
        raise ValueError(f"lam must be > 0, s_min in [0, 1], not lam = {lam}, s_min = {s_min}")
    return (gamma / (gamma + lam)).clamp(min=s_min)             # Eq. 22: max(γ / (γ + λ), s_min)


class SAdam(torch.optim.Optimizer):
    """Spectral-gated Adam for A and plain Adam for all else, in one optimiser.

    params          as for torch.optim.Adam. A group with a "basis" (d_in, k) and a "gate" (k,) is
                    spectral: its matrices A (rank, d_in) move in the basis' span only, and their
                    moments are (rank, k). Any other group gets torch.optim.Adam's numbers.
    lr, betas, eps  as in Adam; each may be set in a group, and so may "scale", a factor of its step
    state_dict      holds bases and gates: bases that are computed again may differ in signs
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be >= 0 and finite, not {lr}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, scale=1, basis=None, gate=None))

    def load_state_dict(self, state_dict):
        shape = lambda group: None if group.get("basis") is None else group["basis"].shape
        if [*map(shape, self.param_groups)] != [*map(shape, state_dict["param_groups"])]:
            raise ValueError("the saved optimiser has bases of other shapes than this one")
        super().load_state_dict(state_dict)
        for group in self.param_groups:                         # torch moves moments, not bases
            for key in ("basis", "gate") if group["basis"] is not None else ():
                group[key] = group[key].to(group["params"][0].device)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient. Returns closure()'s loss, if given."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)
        return loss

    def _update(self, p, G, state, group):
        V, gate, eps, (beta1, beta2) = (group[key] for key in ("basis", "gate", "eps", "betas"))
        if V is not None:
            if p.element_size() < 4:                            # its steps would be rounded away
                raise ValueError(f"A was cast to {p.dtype}, as TRL does: cast back, p.data.float()")
            G = (G.to(V.dtype) @ V).to(p.dtype)                 # Eq. 18-19: Ḡ = G V, (r, k)
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
            step = ((step * gate).to(V.dtype) @ V.mT).to(p.dtype)                # Eq. 23-24: (r, d)
        p.sub_(group["lr"] * group["scale"] * step)


def _refuse_others(optimizer, args, kwargs):
    """Refuse to let AdamW train the adapters, as a Trainer without `optimizers` would."""
    plain = (p for group in optimizer.param_groups if "basis" not in group for p in group["params"])
    if any(hasattr(p, "needs_sadam") for p in plain):
        raise ValueError("AdamW or another optimiser trains FoLoRA's adapters: give the Trainer "
                         "the one that prepare has returned, optimizers=(optimizer, None)")


register_optimizer_step_pre_hook(_refuse_others)


# ---- B.3  The start: A0 spans the input directions with the least energy on pretraining text -----

def null_space(C, rank):
    """A0 = U_perpᵀ (..., rank, d), the eigenvectors of C (..., d, d) with the smallest eigenvalues.
    With it the first term of Eq. 3, ΔB A0 X_pre, is nearly zero: a few per cent above the least.
    Inverse iteration needs float64 where one input direction has nearly all the energy."""
    # Rounding in C can make it slightly indefinite. Then the next larger ridge is tried.
    L = _cholesky(_unit(C.double()), 1e-8, 1e-6, 1e-4, 1e-2)
    _, E = _top_eigenvectors(lambda Q: torch.cholesky_solve(Q, L), L, rank)      # of C⁻¹
    return E.mT.to(C.dtype).contiguous()


class LoRALinear(nn.Linear):
    """A frozen nn.Linear plus a trainable low-rank term: y = W x + κ B A x, κ = alpha / rank, or 1
    if alpha is None. It starts from A0 (rank, d_in) and B0 (d_out, rank). Without B0, B0 is B.3's
    κ⁻¹ W0 A0ᵀ. Without both, the start is LoRA's: A Kaiming-uniform, B = 0.

    W_res = W0 - κ B0 A0 takes W0's place, so the layer starts as W0, up to rounding. A and B are
    float32. from_pretrained ignores them: save_adapter or merge first. state_dict lacks A0 and B0.
    """

    def __init__(self, linear, rank, alpha=None, A0=None, B0=None):
        d_out, d_in = linear.weight.shape
        super().__init__(d_in, d_out, bias=False, device="meta")
        self.weight, self.bias = linear.requires_grad_(False).weight, linear.bias
        self.scaling = 1.0 if alpha is None else alpha / rank
        W0 = linear.weight.detach().float()
        if A0 is None:
            A0 = nn.init.kaiming_uniform_(W0.new_empty(rank, d_in), a=math.sqrt(5))
            B0 = W0.new_zeros(d_out, rank)
        A0 = A0.to(W0)
        B0 = W0 @ A0.mT / self.scaling if B0 is None else B0.to(W0)          # κ⁻¹ W0 U_perp
        self.lora_A, self.lora_B = nn.Parameter(A0.clone()), nn.Parameter(B0.clone())
        self.start = (A0, B0) if B0.any() else None
        if self.start:
            W_res = W0 - self.scaling * B0 @ A0
            self.weight = nn.Parameter(W_res.to(self.weight.dtype), requires_grad=False)

    def forward(self, input):
        A, B = self.lora_A.to(input.dtype), self.lora_B.to(input.dtype)
        # κ B A x: (..., d_in) -> (..., r) -> (..., d_out)
        return self.scaling * (input @ A.mT @ B.mT) + super().forward(input)

    @torch.no_grad()
    def merged(self):
        """A plain nn.Linear, still frozen: W = W_res + κ B A, rounded to the layer's dtype."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        W = self.weight.float() + self.scaling * self.lora_B @ self.lora_A
        linear.weight = nn.Parameter(W.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


# ---- The recipe: covariances, bases, adapters and their optimiser; after training, merge ---------

def decompose(C_pre, C_task, rank, tau=0.01, basis_rank=None, progress=None, device="cpu"):
    """Solve for a basis and an A0 per distinct input. Nothing here depends on λ, s_min, lr, alpha.

    C_pre, C_task     the tensors of collect_covariances: layers that share one share a basis. Each
                      is divided by its mean eigenvalue, so that γ compares shares of energy.
    rank, tau         the rank of A0; the ridge of H, relative to the mean eigenvalue of C_pre
    basis_rank        k, the number of directions in which A may move (None: all, the paper's)
    progress, device  called with 1 for each input that was solved; where to solve
    returns           [{"modules": names of the layers that read this input, "A0": (rank, d_in),
                      "gamma": (k,), "V": (d_in, k)}] on the CPU, which torch.save keeps
    """
    readers, bases = {}, []
    for name in C_pre:
        readers.setdefault((id(C_pre[name]), id(C_task[name])), []).append(name)
    for names in readers.values():
        pre, task = (_unit(C[names[0]].to(device)) for C in (C_pre, C_task))
        gamma, V = generalized_eigenbasis(task, pre, tau, basis_rank)
        solved = {"A0": null_space(pre, min(rank, len(pre))), "gamma": gamma, "V": V.contiguous()}
        bases.append({"modules": names, **{key: t.cpu() for key, t in solved.items()}})
        progress and progress(1)
    return bases


def _row_length(layer):
    """The root mean square length of the rows of W0, or 1 if that is 0. W0 is read as the layer's
    output for the identity, without the bias: a layer that PEFT has wrapped may be quantised."""
    base, weight = getattr(layer, "base_layer", layer), layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # Without requires_grad, bitsandbytes may repack its weights: see plain_mode.
    inputs = torch.eye(layer.in_features, dtype=dtype, device=weight.device, requires_grad=True)
    no_bias = {} if base.bias is None else {"bias": torch.zeros_like(base.bias)}
    W0 = torch.func.functional_call(base, no_bias, (inputs,))   # (d_in, d_out)
    return W0.float().norm().item() / math.sqrt(layer.out_features) or 1.0


@torch.inference_mode(False)
@torch.no_grad()
def attach(model, bases, lr, alpha=None, lam=1.0, s_min=0.0, zero_start=True):
    """Put an adapter on every layer of `bases` (from decompose), freeze all else, and return the
    SAdam that trains the adapters. If PEFT has wrapped the model, its own adapters start anew, and
    what else is trainable in it gets plain Adam at a tenth of lr, in the last group."""
    wrapped = hasattr(model, "peft_config")
    gates = [spectral_gate(basis["gamma"], lam, s_min) for basis in bases]
    for basis in bases:                                         # checked before anything changes
        for layer in map(model.get_submodule, basis["modules"]):
            if isinstance(layer, LoRALinear) or layer.in_features != len(basis["V"]):
                raise ValueError("the model has adapters already, or the bases are another model's")
            if wrapped and len(_factors(layer)[0]) > len(basis["A0"]):
                raise ValueError(f"PEFT's rank {len(_factors(layer)[0])} is above the bases' rank "
                                 f"or the layer's width, {len(basis['A0'])}")
    if not wrapped:
        model.requires_grad_(False)
    spectral, plain = [], []
    for basis, gate in zip(bases, gates):
        A0, As = basis["A0"], []
        for name in basis["modules"]:
            layer = model.get_submodule(name)
            if not wrapped:
                B0 = A0.new_zeros(layer.out_features, len(A0)) if zero_start else None
                layer = LoRALinear(layer, len(A0), alpha, A0, B0)
                model.set_submodule(name, layer)
            A, B, kappa = _factors(layer)
            if wrapped:                                         # each layer may have its own rank
                A.data = A0[:len(A)].to(A.device, copy=True)
                B.data = torch.zeros_like(B, dtype=A0.dtype)
            # B's first step from 0 makes κ B's rows about lr times as long as W0's, so that one lr
            # serves layers and models of every scale. The paper's start gets plain Adam for B.
            scale = _row_length(layer) / (math.sqrt(len(A)) * kappa) if zero_start else 1.0
            plain.append({"params": [B], "scale": scale})
            A.needs_sadam = B.needs_sadam = True
            As.append(A)
        # A bfloat16 basis takes half the memory. float16 would lose small gradients.
        dtype = torch.bfloat16 if layer.weight.dtype == torch.bfloat16 else torch.float32
        V = basis["V"].to(A.device, dtype)
        spectral.append({"params": As, "basis": V, "gate": gate.to(A.device)})
    others = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "needs_sadam")]
    plain += [{"params": others, "scale": 0.1}] if others else []
    return SAdam(spectral + plain, lr)


def prepare(model, pretrain_batches, task_batches, lr, rank=128, alpha=None, tau=0.01, lam=1.0,
            s_min=0.0, target_modules=TARGET_MODULES, zero_start=True, basis_rank=128):
    """FoLoRA in one call: adapt `model` in place, freeze the rest, return the optimiser for it. A
    model from PEFT's get_peft_model keeps its own rank, alpha, targets and trainable parameters.

    pretrain_batches   batches (dicts for model(**batch)) of text that must not be forgotten
    task_batches       batches of the target task; 256 examples in the paper
    rank, alpha        of the adapters; κ is alpha / rank, or 1 if alpha is None
    tau, basis_rank    as in decompose. With more directions the adapter learns and forgets more.
    lam, s_min         the γ at which the gate is one half, and the gate's floor, Eq. 22
    zero_start         start from B = 0 on the untouched W0; False: from the paper's κ⁻¹ W0 A0ᵀ

    The paper's gate, start and basis are s_min=0.3, zero_start=False, basis_rank=None. Move and
    cast the model first. Per distinct input, covariances take 4 d_in² bytes where the model is
    while they are summed, and 8 d_in² bytes of host memory (12 with all directions).
    """
    targets = find_targets(model, target_modules, rank)         # refuses what cannot be adapted
    if hasattr(model, "peft_config"):
        rank = max(len(_factors(layer)[0]) for layer in targets.values())
        if not zero_start:
            raise ValueError("PEFT's adapters need zero_start=True: the paper's start changes W0")
    optional = [x for x in (alpha, basis_rank) if x is not None]
    if not all(0 < x < math.inf for x in (lr, tau, *optional)):
        raise ValueError(f"must be > 0: {lr = }, {tau = }, {alpha = }, {basis_rank = }")
    spectral_gate(torch.ones(1), lam, s_min)                    # raises if out of range
    C_pre, C_task = (collect_covariances(model, batches, target_modules)
                     for batches in (pretrain_batches, task_batches))
    bases = decompose(C_pre, C_task, rank, tau, basis_rank, None, next(model.parameters()).device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(bases)          # two solvers may differ in signs
    return attach(model, bases, lr, alpha, lam, s_min, zero_start)


def merge(model):
    """Put a plain nn.Linear in place of every LoRALinear, and return the model."""
    if hasattr(model, "peft_config"):
        raise ValueError("PEFT has wrapped this model: use its merge_and_unload")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    return model


@torch.no_grad()
def save_adapter(model, directory):
    """Write the adapters in PEFT's format, to be loaded on the untouched base model. From B = 0
    they have rank r. The paper's start needs W - W0 = κ (B A - B0 A0), which has rank 2 r."""
    model = getattr(model, "module", model)                     # inside DistributedDataParallel
    layers = {name.replace("_orig_mod.", ""): m                 # torch.compile's
              for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("no LoRALinear is here: PEFT's own models have save_pretrained")
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, layer in layers.items():
        A, B = layer.lora_A.float(), layer.lora_B.float()
        A0, B0 = (t.to(A) for t in layer.start or (A[:0], B[:, :0]))
        for factor, t in ("lora_A", torch.cat([A, A0])), ("lora_B", torch.cat([B, -B0], dim=1)):
            values, begin = t.cpu().contiguous(), len(data)
            data += ctypes.string_at(values.data_ptr(), values.nbytes)       # needs no numpy
            header[f"base_model.model.{name}.{factor}.weight"] = {
                "dtype": "F32", "shape": list(t.shape), "data_offsets": [begin, len(data)]}
    rank = len(A) + len(A0)                                     # the same in every layer
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
              "r": rank, "lora_alpha": layer.scaling * rank, "target_modules": list(layers),
              "base_model_name_or_path": getattr(model, "name_or_path", None)}
    out, text = Path(directory), json.dumps(header).encode()
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))
    # The safetensors format: the header's length in 8 bytes, the header in JSON, the numbers.
    text += b" " * (-len(text) % 8)                             # the numbers begin at 8 n bytes
    (out / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


# ---- 3.4, B.4  Pretraining text from the model itself (this part needs a Hugging Face model) -----

DECODING = ((0.7, dict(temperature=1.0, top_p=1.0, top_k=0)),   # share of the samples, how drawn
            (0.2, dict(temperature=1.0, top_p=0.95, top_k=0)),
            (0.1, dict(temperature=1.2, top_p=0.98, top_k=50)))


def is_degenerate(tokens):
    """B.4's screen of one text, a list of token ids."""
    n, fours = len(tokens), set(zip(tokens, tokens[1:], tokens[2:], tokens[3:]))
    runs = [len(list(run)) for _, run in itertools.groupby(tokens)]
    return (n < 32 or max(runs) >= 20 or n >= 128 and len(set(tokens)) / n < 0.12
            or n >= 256 and len(fours) / (n - 3) < 0.25)


def _candidates(model, missing, bos, batch_size, how):
    """Yield token lists drawn from a single BOS, each cut before its end of sequence, until none is
    missing(). A batch has one decoding."""
    shares = torch.tensor([share for share, _ in DECODING])
    while missing():
        drawn = Counter(torch.multinomial(shares, missing(), replacement=True).tolist())
        for decoding, n in sorted(drawn.items()):
            start = torch.full((n, 1), bos, device=next(model.parameters()).device)
            for some in start.split(batch_size):
                rows = model.generate(some, attention_mask=torch.ones_like(some),
                                      **DECODING[decoding][1], **how)[:, 1:].tolist()
                real = lambda token: token not in how["eos_token_id"]
                yield from (list(itertools.takewhile(real, row)) for row in rows)


@torch.no_grad()
def sample_calibration(model, tokenizer, num_samples, min_new_tokens=128, max_new_tokens=512,
                       batch_size=64, seed=0, progress=None):
    """Sample pretraining text from the model (Eq. 27) by B.4's protocol: ancestral sampling from
    BOS, a decoding drawn from a mixture, degenerate text and duplicates rejected.

    model, tokenizer   Hugging Face's. Where the tokenizer has no BOS (Qwen), generation_config's is
                       taken, else EOS. EOS ends a text after min_new_tokens only.
    progress           called with 1 for each accepted sample, such as a tqdm bar's update
    returns            num_samples LongTensors on the CPU, BOS first, in random order; the same for
                       the same seed, batch_size, device and dtype (the model's; B.4: float16)
    RuntimeError       once more than 64 + 10 · accepted samples have been rejected, as are all of
                       fewer than 32 tokens
    """
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None) or tokenizer.eos_token_id
    if eos is None:
        raise ValueError("neither the tokenizer nor generation_config has an eos_token_id")
    eos = eos if isinstance(eos, list) else [eos]               # a chat model may have several
    starts = tokenizer.bos_token_id, getattr(config, "bos_token_id", None), eos[0]
    bos = next(token for token in starts if token is not None)
    how = dict(do_sample=True, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens,
               eos_token_id=eos, pad_token_id=eos[0])
    kept, seen, rejected = [], set(), 0
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with plain_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for ids in _candidates(model, lambda: num_samples - len(kept), bos, batch_size, how):
            text = tokenizer.decode(ids)
            if text in seen or is_degenerate(ids):
                rejected += 1
            else:
                kept.append(torch.tensor([bos, *ids]))
                progress and progress(1)
            seen.add(text)
            if rejected > 64 + 10 * len(kept):
                raise RuntimeError(f"{rejected} texts rejected, {len(kept)} accepted: degenerate")
        return [kept[i] for i in torch.randperm(num_samples)]   # kept is sorted by decoding
