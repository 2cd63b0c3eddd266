"""FoLoRA: LoRA fine-tuning that forgets little (arXiv 2606.00132). One file, torch >= 2.6 alone.
Not included: Appendix D, weight decay, fused experts, offloading, FSDP, DeepSpeed, MPS, GradScaler.

LoRA adds a trainable product B A to a frozen linear layer W0. FoLoRA lets A move mainly along input
directions that the task uses much and the model's pretraining text uses little. With the layer's
uncentred input covariances C_pre and C_task on these texts, and H = C_pre + τ I, an update ΔA has

    forgetting   R(ΔA) = tr(ΔA H ΔAᵀ)         how much it moves A's output on pretraining text
    utility      U(ΔA) = tr(ΔA C_task ΔAᵀ)    how much it moves A's output on the task
    step         ΔA = -lr · Adam(G V) · diag(s) · Vᵀ          where G is the loss's gradient for A

A column v of V solves C_task v = γ H v, so γ = U/R is the utility of v per unit of forgetting. The
gate s = γ / (γ + λ) is near 1 for useful directions and near 0 for the others. The pretraining
text is sampled from the model itself. A starts in the directions where that text has least energy.

    texts = folora.sample_calibration(model, tokenizer, 128)        # what must not be forgotten
    pretrain = [{"input_ids": text[None]} for text in texts]        # batches for model(**batch)
    optimizer = folora.prepare(model, pretrain, task_batches, lr=3e-3, rank=32)
    folora.save_adapter(model, "adapter")       # after training; PEFT can load it. Or merge(model)

    paper             shape                   in code           meaning
    W0 or W_res       (d_out, d_in)           weight            frozen; W_res = W0 - κ B0 A0
    A, B, κ           (r, d_in), (d_out, r)   lora_A, lora_B    W = W_res + κ B A; κ is `scaling`
    C_pre, C_task     (d_in, d_in)            C_pre, C_task     means of x xᵀ, scaled by decompose
    τ, H = L Lᵀ       scalar, (d_in, d_in)    tau, H, L         the ridge; H = C_pre + τ I
    V, γ              (d_in, k), (k,)         V, gamma          Vᵀ H V = I, Vᵀ C_task V = Γ
    s, λ, s_min       (k,), scalars           gate, lam, s_min  gate, the γ of gate 1/2, floor
"""
import ctypes
import itertools
import json
import math
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _adapters(layer):
    """[(A, B, κ)] of a LoRALinear or of PEFT's active adapters in a layer. Needs no peft."""
    if isinstance(layer, LoRALinear):
        return [(layer.lora_A, layer.lora_B, layer.scaling)]
    A = getattr(layer, "lora_A", None)
    names = layer.active_adapters if isinstance(A, nn.ModuleDict) else ()
    return [(A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names if n in A]


def find_targets(model, target_modules=TARGET_MODULES, rank=1):
    """The layers to adapt, {full name: module}: PEFT's if it has wrapped the model, else each
    nn.Linear whose name ends in one of target_modules (Appendix B: a block's seven projections).
    "all-linear" is all but the output head. ValueError: one cannot be adapted with this rank."""
    wrapped = {name: m for name, m in model.named_modules() if _adapters(m)}
    for name, module in wrapped.items():
        (A, B, _), *more = _adapters(module)
        odd = more or A.ndim != 2 or len(A) > A.shape[1] or hasattr(module, "parameter_name")
        if odd or B.any() or not A.requires_grad or not hasattr(model, "peft_config"):
            raise ValueError(f"{name} needs one linear, trainable adapter, B = 0, rank <= width: "
                             "set PEFT's init_lora_weights=True, or merge a trained adapter")
    if wrapped:
        return wrapped
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head, found = getattr(model, "get_output_embeddings", lambda: None)(), {}
    for end in [target_modules] if isinstance(target_modules, str) else target_modules:
        some = {name: m for name, m in linears.items() if f".{name}".endswith(f".{end}")
                or end == "all-linear" and m is not head}
        if not some:
            raise ValueError(f"no nn.Linear {end}: {sorted({n.split('.')[-1] for n in linears})}")
        found |= some
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, m in found.items():
        if (type(m), type(m.weight)) != (nn.Linear, nn.Parameter) or uses[id(m.weight)] > 1:
            raise ValueError(f"{name} is quantised (use get_peft_model) or shares its weight")
        if not 0 < rank <= m.in_features:
            raise ValueError(f"rank {rank} is not from 1 to {m.in_features}, {name}'s width")
    return {name: m for name, m in linears.items() if name in found}       # in the model's order


@contextmanager
def plain_mode(model):
    """Evaluation mode, and a default generation_config in place of a chat model's penalties and
    beams, which are no part of B.4. Both are put back at the end."""
    names = {"training", "generation_config"}
    before = [(m, {key: vars(m)[key] for key in names & {*vars(m)}}) for m in model.modules()]
    try:
        for module, kept in before:
            vars(module).update({key: type(value)() for key, value in kept.items()})
            # Else bitsandbytes 0.50 on a CPU repacks NF4 weights, whose input then has no gradient.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                    raise ValueError("bitsandbytes has repacked its weights: call prepare earlier")
                module.support_avx512bf16_for_cpu = False
        yield
    finally:
        for module, kept in before:
            vars(module).update(kept)


# ---- 3.1  First-order preservation: covariances for forgetting (Eq. 5-6) and utility (Eq. 7) -----
@torch.inference_mode(False)
@torch.no_grad()
def collect_covariances(model, batches, target_modules=TARGET_MODULES):
    """C_pre or C_task, depending on the text: {module name: (d_in, d_in) float32 on the CPU}, the
    mean of x xᵀ (the paper has the sum) over all tokens that a module reads. Modules that read one
    tensor (q, k, v; gate, up) get one covariance. `batches` are dicts for model(**batch). Tokens
    whose attention_mask is 0 do not count. Do not pad if the mask does not fit (experts)."""
    targets, device = find_targets(model, target_modules), next(model.parameters()).device
    sums, tokens, first_reader = defaultdict(float), Counter(), {}
    last_input = last_module = mask = None
    def hook(module, args, kwargs):
        nonlocal last_input, last_module
        x = args[0] if args else next(iter(kwargs.values()))
        if x is not last_input:                                 # `module` is the first to read x
            last_input, last_module = x, module
            rows = x.reshape(-1, x.shape[-1]).float()           # (batch * length, d_in)
            if mask is not None and mask.numel() == len(rows):  # a pooler reads one row a text
                rows = rows[mask.flatten().bool().to(rows.device)]           # (tokens, d_in)
            sums[module] += rows.mT @ rows                      # C += X Xᵀ, where X = rowsᵀ
            tokens[module] += len(rows)
        first_reader[module] = last_module
    with plain_mode(model), torch.autocast(device.type, enabled=False), ExitStack() as hooks:
        for module in targets.values():
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            mask, last_input = batch.get("attention_mask"), None
            model(**batch)
    means = {module: total.div_(tokens[module]).cpu() for module, total in sums.items()}
    for name, module in targets.items():
        if not tokens[first_reader.get(module)] or not means[first_reader[module]].isfinite().all():
            raise ValueError(f"{name} has read no token (leave it out?), or numbers not finite")
    return {name: means[first_reader[module]] for name, module in targets.items()}


# ---- 3.2  The generalized eigenbasis: input directions by utility per unit of forgetting ---------
# Eq. 4      |(B0 + ΔB) ΔA X_pre| <= |B0 + ΔB| |ΔA X_pre|, so ΔA X_pre is what has to stay small
# Eq. 5-7    R(ΔA) = tr(ΔA H ΔAᵀ) with H = C_pre + τ I, and U(ΔA) = tr(ΔA C_task ΔAᵀ)
# Eq. 8-10   for a rank-one ΔA = u vᵀ:  U / R = ρ(v) = vᵀ C_task v / vᵀ H v
# Eq. 11-15  ρ is stationary where  C_task v = γ H v,  and there  ρ(v) = γ
# Eq. 16-17  H^(-1/2) C_task H^(-1/2) = R Γ Rᵀ,  V = H^(-1/2) R:  Vᵀ H V = I and Vᵀ C_task V = Γ
# Since Vᵀ H V = I, forgetting is the squared length of the step in V's coordinates. Adam moves
# every coordinate by about lr, so without the gate every direction would cost the same forgetting,
# whatever its use. All functions here take one matrix or a stack of them, (..., d, d).
def _eigh(M):
    """torch.linalg.eigh, on the CPU if a GPU's solver fails, as it may where the rank is low."""
    try:
        return torch.linalg.eigh(M)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(M.cpu())
        return values.to(M.device), vectors.to(M.device)


def generalized_eigenbasis(C_task, C_pre, tau, k=None):
    """Solve C_task v = γ H v with H = C_pre + τ I, for symmetric semidefinite (..., d, d): the k
    largest gamma (..., k; None: all), falling, and V (..., d, k) with Vᵀ H V = I and
    Vᵀ C_task V = Γ. The paper has H's symmetric root. Any L with L Lᵀ = H gives the
    same V up to signs, which do not change SAdam's step, and to rotations inside a repeated γ."""
    # float64: float32 errs by cond(H) · 1e-7, and one massive activation makes cond(H) 1e5.
    H = C_pre.to(torch.float64, copy=True)
    H.diagonal(dim1=-2, dim2=-1).add_(tau)                      # Eq. 6: H = C_pre + τ I
    L = torch.linalg.cholesky(H)                                # L Lᵀ = H
    # Eq. 16 with L⁻¹ for H^(-1/2): M = L⁻¹ C_task L⁻ᵀ = R Γ Rᵀ.
    X = torch.linalg.solve_triangular(L, C_task.double(), upper=False)       # L⁻¹ C_task
    M = torch.linalg.solve_triangular(L, X.mT, upper=False)     # L⁻¹ C_task L⁻ᵀ
    gamma, R = _eigh(M)                                         # γ rises
    gamma, R = gamma.flip(-1)[..., :k], R.flip(-1)[..., :k]     # the k largest, falling
    V = torch.linalg.solve_triangular(L.mT, R, upper=True)      # Eq. 17: V = L⁻ᵀ R
    return gamma.clamp(min=0).to(C_pre), V.to(C_pre)


# ---- 3.3  SAdam: Adam in the coordinates of V, its step gated along each direction ---------------
def spectral_gate(gamma, lam, s_min):
    """The gate (..., k) of gamma (..., k). lam > 0 is the γ with gate one half; s_min in [0, 1]."""
    return (gamma / (gamma + lam)).clamp(min=s_min)             # Eq. 22: max(γ / (γ + λ), s_min)


class SAdam(torch.optim.Optimizer):
    """Adam with a spectral gate for A, and plain Adam for all else. The matrices A (r, d_in) of a
    group with a "basis" (d_in, k) and a "gate" (k,) move in the basis' span only, with moments
    (r, k). Other groups get torch.optim.Adam's numbers, times the group's "scale". state_dict holds
    bases and gates, since bases that are computed again may differ in signs."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, scale=1, basis=None, gate=None))

    def load_state_dict(self, state_dict):
        shape = lambda group: getattr(group.get("basis"), "shape", None)
        if [*map(shape, self.param_groups)] != [*map(shape, state_dict["param_groups"])]:
            raise ValueError("the saved optimiser has other bases: prepare with the same arguments")
        super().load_state_dict(state_dict)
        for group in filter(shape, self.param_groups):          # torch moves moments, not bases
            group |= {k: group[k].to(group["params"][0].device) for k in ("basis", "gate")}

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], **group)
        return loss

    def _update(self, p, G, state, lr, betas, eps, scale, basis, gate, **_):
        V, (beta1, beta2) = basis, betas
        if V is not None:
            if p.element_size() < 4:                            # its steps would be rounded away
                raise ValueError(f"cast to {p.dtype}, as TRL does: p.data = p.data.float() for all")
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
        p.sub_(lr * scale * step)


@register_optimizer_step_pre_hook
def _refuse_others(optimizer, *_):
    """Refuse to let AdamW train the adapters, as a Trainer without `optimizers` would."""
    plain = (p for group in optimizer.param_groups if "basis" not in group for p in group["params"])
    if any(hasattr(p, "needs_sadam") for p in plain):
        raise ValueError("give the Trainer the optimiser of prepare: optimizers=(optimizer, None)")


# ---- B.3  The start: A0 spans the input directions with the least energy on pretraining text -----
def null_space(C, rank):
    """A0 = U_perpᵀ (..., rank, d): the eigenvectors of C (..., d, d) of smallest eigenvalue. With
    it the first term of Eq. 3, ΔB A0 X_pre, is nearly zero."""
    _, U = _eigh(C.double())                                    # eigenvalues rise
    return U[..., :rank].mT.to(C.dtype).contiguous()


class LoRALinear(nn.Linear):
    """A frozen nn.Linear plus a trainable term, y = W_res x + κ B A x, from A0 (r, d_in) and B0
    (d_out, r; None: B.3's κ⁻¹ W0 A0ᵀ). κ is alpha / r, or 1 without alpha. It starts as W0, up to
    rounding. A and B are float32. from_pretrained would ignore them: use save_adapter or merge."""

    def __init__(self, linear, A0, B0=None, alpha=None):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.bias, self.scaling = linear.bias, alpha / len(A0) if alpha else 1.0
        W0, A0 = linear.weight.detach().float(), A0.to(linear.weight.device, torch.float32)
        B0 = W0 @ A0.mT / self.scaling if B0 is None else B0.to(W0)          # κ⁻¹ W0 U_perp
        self.lora_A, self.lora_B = nn.Parameter(A0.clone()), nn.Parameter(B0.clone())
        self.start = (A0, B0) if B0.any() else None
        self.weight = nn.Parameter((W0 - self.scaling * B0 @ A0).to(linear.weight.dtype), False)

    def forward(self, input):
        Ax = input @ self.lora_A.to(input.dtype).mT             # (..., d_in) -> (..., r)
        return self.scaling * (Ax @ self.lora_B.to(input.dtype).mT) + super().forward(input)


# ---- The recipe: covariances, bases, adapters and their optimiser; after training, merge ---------
STACK_BYTES = 2 ** 26              # of the float64 matrices that one call of eigh gets, at most


def decompose(C_pre, C_task, rank, tau=0.01, basis_rank=None, progress=None, device="cpu"):
    """[{"modules": layers with one input, "A0": (rank, d_in), "gamma": (k,), "V": (d_in, k)} on the
    CPU]. Each covariance is divided by its mean eigenvalue, so that γ compares shares of energy
    and one τ and one λ serve all layers. `progress` is called with the number of inputs solved."""
    readers, solved, stacks = {}, {}, []
    for name in C_pre:
        readers.setdefault((id(C_pre[name]), id(C_task[name])), []).append(name)
    first = [names[0] for names in readers.values()]
    for d in sorted({len(C_pre[name]) for name in first}):
        names = [name for name in first if len(C_pre[name]) == d]
        size = max(1, STACK_BYTES // (8 * d * d))
        stacks += [names[i:i + size] for i in range(0, len(names), size)]
    for names in stacks:
        pre, task = (torch.stack([C[name] for name in names]).to(device) for C in (C_pre, C_task))
        for C in (pre, task):
            C /= C.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[:, None, None]
        gamma, V = generalized_eigenbasis(task, pre, tau, basis_rank or None)
        A0 = null_space(pre, rank)
        for i, name in enumerate(names):
            some = {"A0": A0[i], "gamma": gamma[i], "V": V[i]}
            solved[name] = {key: t.cpu().clone().contiguous() for key, t in some.items()}
        progress and progress(len(names))
    return [{"modules": names, **solved[names[0]]} for names in readers.values()]


def _row_length(layer):
    """The root mean square length of the rows of W0, or 1 if that is 0. W0 is read as the layer's
    output for the identity, without the bias: a layer that PEFT has wrapped may be quantised."""
    base, weight = getattr(layer, "base_layer", layer), layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    inputs = torch.eye(layer.in_features, dtype=dtype, device=weight.device, requires_grad=True)
    no_bias = {} if base.bias is None else {"bias": torch.zeros_like(base.bias)}
    W0 = torch.func.functional_call(base, no_bias, (inputs,))   # (d_in, d_out)
    return W0.float().norm().item() / math.sqrt(layer.out_features) or 1.0


@torch.inference_mode(False)
@torch.no_grad()
def attach(model, bases, lr, alpha=None, lam=1.0, s_min=0.0, zero_start=True):
    """Put an adapter on every layer of `bases`, freeze all else, and return SAdam. PEFT's adapters
    start anew, and what else is trainable in its model gets plain Adam at a tenth of lr."""
    is_peft, spectral, plain = hasattr(model, "peft_config"), [], []
    is_peft or model.requires_grad_(False)
    for basis in bases:
        A0, As = basis["A0"], []
        for name in basis["modules"]:
            layer = model.get_submodule(name)
            if not is_peft:
                B0 = A0.new_zeros(layer.out_features, len(A0)) if zero_start else None
                layer = LoRALinear(layer, A0, B0, alpha)
                model.set_submodule(name, layer)
            (A, B, kappa), = _adapters(layer)
            if is_peft:                                         # each layer may have its own rank
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
        gate = spectral_gate(basis["gamma"], lam, s_min).to(A.device)
        spectral.append({"params": As, "basis": basis["V"].to(A.device, dtype), "gate": gate})
    others = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "needs_sadam")]
    plain += [{"params": others, "scale": 0.1}] if others else []
    return SAdam(spectral + plain, lr)


def prepare(model, pretrain_batches, task_batches, lr, rank=128, alpha=None, tau=0.01, lam=1.0,
            s_min=0.0, target_modules=TARGET_MODULES, zero_start=True, basis_rank=96):
    """FoLoRA in one call: adapt `model`, cast and moved before, in place, freeze the rest, return
    its optimiser. PEFT's models keep their own rank, alpha, targets and trainable parameters.

    pretrain_batches   dicts for model(**batch), of text that must not be forgotten
    task_batches       the same of the target task; 256 examples in the paper
    lr, tau            A's rate (B's is scaled to W0); the ridge, in mean eigenvalues of C_pre
    rank, alpha        of the adapters; κ = alpha / rank (None: 1)
    lam, s_min         the γ at which the gate is one half, and the gate's floor (paper: 0.3)
    zero_start         start from B = 0 on the untouched W0; False: from the paper's κ⁻¹ W0 A0ᵀ
    basis_rank         k, the directions for A (None: all); a larger k learns and forgets more"""
    if not all(x > 0 for x in (lr, tau, lam, alpha or 1, basis_rank or 1)) or not 0 <= s_min <= 1:
        raise ValueError(f"out of range: {lr=} {tau=} {lam=} {s_min=} {alpha=} {basis_rank=}")
    targets = find_targets(model, target_modules, rank)         # refuses what cannot be adapted
    if hasattr(model, "peft_config"):
        rank = max(len(A) for layer in targets.values() for A, _, _ in _adapters(layer))
        if not zero_start:
            raise ValueError("PEFT's adapters need zero_start=True: the paper's start changes W0")
    C_pre, C_task = (collect_covariances(model, batches, target_modules)
                     for batches in (pretrain_batches, task_batches))
    bases = decompose(C_pre, C_task, rank, tau, basis_rank, None, next(model.parameters()).device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(bases)          # two solvers may differ in signs
    return attach(model, bases, lr, alpha, lam, s_min, zero_start)


@torch.no_grad()
def merge(model):
    """Put an nn.Linear, W = W_res + κ B A, in place of each LoRALinear. PEFT: merge_and_unload."""
    for name, layer in [item for item in model.named_modules() if isinstance(item[1], LoRALinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        W = layer.weight.float() + layer.scaling * layer.lora_B @ layer.lora_A
        linear.weight, linear.bias = nn.Parameter(W.to(layer.weight.dtype), False), layer.bias
        model.set_submodule(name, linear)
    return model


def save_adapter(model, directory):
    """Write the adapters in PEFT's format, to be loaded on the untouched base model. From B = 0
    they have rank r. The paper's start needs W - W0 = κ (B A - B0 A0), of rank 2 r."""
    model = getattr(model, "module", model)                     # inside DistributedDataParallel
    layers = {name.replace("_orig_mod.", ""): m                 # torch.compile's
              for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("no LoRALinear is here: PEFT's own models have save_pretrained")
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, layer in layers.items():
        A, B = layer.lora_A.float().cpu(), layer.lora_B.float().cpu()
        A0, B0 = (t.cpu() for t in layer.start or (A[:0], B[:, :0]))
        for factor, t in ("lora_A", torch.cat([A, A0])), ("lora_B", torch.cat([B, -B0], dim=1)):
            values, begin = t.contiguous(), len(data)
            data += ctypes.string_at(values.data_ptr(), values.nbytes)       # needs no numpy
            header[f"base_model.model.{name}.{factor}.weight"] = {
                "dtype": "F32", "shape": list(t.shape), "data_offsets": [begin, len(data)]}
    rank, out, text = len(A) + len(A0), Path(directory), json.dumps(header).encode()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
              "r": rank, "lora_alpha": layer.scaling * rank, "target_modules": list(layers),
              "base_model_name_or_path": getattr(model, "name_or_path", None)}
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


def sample_calibration(model, tokenizer, num_samples, min_new_tokens=128, max_new_tokens=512,
                       batch_size=64, seed=0, progress=None):
    """Sample pretraining text from the model (Eq. 27) by B.4's protocol: ancestral sampling from
    BOS, a decoding drawn from a mixture, degenerate text and duplicates rejected. The LongTensors
    begin with BOS (the tokenizer's, else the configuration's, else EOS) and depend on the seed,
    batch_size, device and dtype. `progress` is called with 1 for each."""
    config, device = model.generation_config, model.device
    eos = torch.tensor(config.eos_token_id or tokenizer.eos_token_id).flatten().tolist()
    bos = next(t for t in (tokenizer.bos_token_id, config.bos_token_id, *eos) if t is not None)
    how = dict(do_sample=True, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens,
               eos_token_id=eos, pad_token_id=eos[0])
    shares = torch.tensor([share for share, _ in DECODING])
    kept, seen, rejected, todo = [], set(), 0, []
    with plain_mode(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while (missing := num_samples - len(kept)) > 0:
            todo = todo or sorted(torch.multinomial(shares, missing, replacement=True).tolist())
            start = torch.full((min(batch_size, todo.count(todo[0])), 1), bos, device=device)
            rows = model.generate(start, attention_mask=torch.ones_like(start),
                                  **DECODING[todo[0]][1], **how)[:, 1:].tolist()
            todo = todo[len(rows):]
            for row in rows:
                ids = list(itertools.takewhile(lambda token: token not in eos, row))
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
