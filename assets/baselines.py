"""The baselines that the README compares with: MiLoRA, CorDA, LoRA-Null, OPLoRA and replay.

Each of them is a LoRALinear of folora.py under Adam, with a start of its own. A start is a pair of
factors A0 (r, d_in) and B0 (d_out, r). It is computed from the weight W (d_out, d_in), from the
input covariance C (d_in, d_in) on pretraining text, and from the scaling κ of the update κ B A.
"""
import functools

import torch
from torch.nn.utils import parametrize

import eval as ev
import folora


def balanced(U, S, Vh, kappa):
    """A0 = √(S/κ) Vᵀ and B0 = U √(S/κ), so that κ B0 A0 = U S Vᵀ."""
    root = (S / kappa).sqrt()
    return root[:, None] * Vh, U * root


def milora(W, C, rank, kappa):
    """MiLoRA: the r smallest singular values of W = U S Vᵀ. C is not used."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return balanced(U[:, -rank:], S[-rank:], Vh[-rank:], kappa)


def corda(W, C, rank, kappa, damping=0.01):
    """CorDA, knowledge-preserving: the r smallest singular values of W C̃ = U S Vᵀ, where
    C̃ = C + damping · mean(diag C) I. The right factor is A0 = √(S/κ) Vᵀ C̃⁻¹."""
    C = C + damping * C.diagonal().mean() * torch.eye(len(C), device=C.device)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    right = torch.linalg.solve(C, Vh[-rank:], left=False)       # Vᵀ C̃⁻¹
    return balanced(U[:, -rank:], S[-rank:], right, kappa)


def lora_null(W, C, rank, kappa):
    """LoRA-Null: W U0 U0ᵀ = U S Vᵀ. U0 (d_in, r) spans the directions of least energy in C."""
    U0 = null_space(C, rank).mT
    U, S, right = torch.linalg.svd(W @ U0, full_matrices=False)
    return balanced(U, S, right @ U0.mT, kappa)


null_space = functools.lru_cache(maxsize=1)(folora.null_space)     # q, k and v share one C


class Complement(torch.nn.Module):
    """OPLoRA: ΔW = (I - U_k U_kᵀ) B A (I - V_k V_kᵀ), with the k largest singular vectors of W.

    This is a parametrisation of one factor. Wherever the factor is read, the span of Q's
    orthonormal columns is taken out of the columns of B (dim 0) or out of the rows of A (dim 1).
    """

    def __init__(self, Q, dim):
        super().__init__()
        self.dim = dim
        self.register_buffer("Q", Q.clone())                    # Q is a view of all of U or V

    def forward(self, factor):
        if self.dim == 0:
            return factor - self.Q @ (self.Q.mT @ factor)
        return factor - (factor @ self.Q) @ self.Q.mT


def replay(model, texts):
    """The loss of old text, summed over its next tokens, which replay adds to the task's loss."""
    return ev.summed_nll(model, ev.collate(texts, model.device))


# OPLoRA has LoRA's start. LoRA-Null v2 is LoRA-Null with A frozen.
STARTS = {"milora": milora, "corda": corda, "lora-null": lora_null, "lora-null-v2": lora_null,
          "oplora": None}
NEEDS_C_PRE = ("corda", "lora-null", "lora-null-v2")


def add_adapters(method, model, options, C_pre=None, alpha=None):
    """Put the adapters of a baseline on the model, in place, and return their optimiser.

    method    a name in STARTS; NEEDS_C_PRE need C_pre from folora.collect_covariances
    options   an object with the attributes rank, lr and target_modules
    alpha     κ is alpha / rank, or 1 if alpha is None
    """
    model.requires_grad_(False)
    start, rank = STARTS[method], options.rank
    for name, base in folora.find_targets(model, options.target_modules.split(","), rank).items():
        W, kappa = base.weight.detach().float(), alpha / rank if alpha else 1.0
        C = C_pre[name].to(W) if method in NEEDS_C_PRE else None
        A0 = torch.nn.Linear(base.in_features, rank, bias=False).weight.detach()       # LoRA's
        factors = start(W, C, rank, kappa) if start else (A0, None)
        adapter = folora.LoRALinear(base, *factors, alpha)
        model.set_submodule(name, adapter)
        if method == "lora-null-v2":
            adapter.lora_A.requires_grad_(False)
        if method == "oplora":                                  # its paper has k = r = 128
            U, _, Vh = torch.linalg.svd(W, full_matrices=False)
            complements = Complement(Vh[:rank].mT, 1), Complement(U[:, :rank], 0)
            for factor, complement in zip(("lora_A", "lora_B"), complements):
                parametrize.register_parametrization(adapter, factor, complement)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=options.lr, weight_decay=0.0)
