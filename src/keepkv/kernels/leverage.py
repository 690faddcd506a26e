"""Ridge leverage of keys before RoPE, without a copy of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.rope import Rope

_TILE = 2**20  # elements of a temporary, which then stays in a processor's cache


def leverage(
    keys: Tensor,
    positions: Tensor,
    log_votes: Tensor | None = None,
    *,
    ridge: float,
    rope: Rope | None = None,
    backend: str | None = None,
) -> Tensor:
    """ℓ_i = k̃_iᵀ(Σ + λI)⁻¹k̃_i of each slot among those of its row and head, as ``score.leverage`` wants it.

    keys (B,H,S,D) after ``rope`` at positions (B,H,S), below 0 where a slot is empty; None: not rotated. k̃ are the
    keys before it less their mean, Σ their covariance, λ = ``ridge``·tr Σ/D, a slot counting e^``log_votes`` (B,H,S)
    times. Returns float32 (B,H,S), float64 for float64; 0 at empty slots. Keys are read twice: for mean and covariance
    together, then for the norms of (Σ + λI)^(−½)k̃.
    """
    check(
        keys.dim() == 4 and positions.shape == keys.shape[:-1],
        f"keys {tuple(keys.shape)} with positions {tuple(positions.shape)}: give (B,H,S,D) and (B,H,S)",
    )
    check(log_votes is None or log_votes.shape == positions.shape, "log_votes and positions must have the same shape")
    if choose(backend, keys) == "reference":
        return reference(keys, positions, log_votes, ridge, rope)
    from keepkv.kernels.leverage_triton import leverage as kernel  # Triton is needed only here

    return kernel(keys, positions, log_votes, ridge, rope)


def reference(keys: Tensor, positions: Tensor, log_votes: Tensor | None, ridge: float, rope: Rope | None) -> Tensor:
    """The same in plain torch, some heads at a time."""
    (b, h, s, d), valid = keys.shape, positions >= 0
    dtype = torch.promote_types(keys.dtype, torch.float32)
    votes = torch.zeros((), device=keys.device) if log_votes is None else log_votes
    share = torch.where(valid, votes, float("-inf")).softmax(-1).nan_to_num(0.0).to(dtype)
    out = torch.empty(b, h, s, dtype=dtype, device=keys.device)
    alike = bool((positions == positions[:, :1]).all())  # as of an uncompressed prompt: one angle serves all heads
    step = max(1, min(h, _TILE // max(1, b * s * d)))
    for first in range(0, h, step):
        some = slice(first, first + step)
        x, w = keys[:, some].to(dtype, copy=True), share[:, some, :, None]
        if rope is not None:
            x = rope.unrotate(x, positions[:, slice(0, 1) if alike else some].clamp(min=0))
        x -= w.mT @ x
        white, scale = whitening((x * w).mT @ x, ridge)
        out[:, some] = (x @ white.mT).square_().sum(-1) / scale[..., None]
    return out.masked_fill_(~valid, 0.0)


def whitening(sigma: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W (…,D,D) lower triangular and t (…), with WᵀW/t = (Σ + ``ridge``·t·I)⁻¹ and t = tr Σ/D for covariances Σ, which
    are overwritten.

    Scaled to t = 1 first, so that neither tiny nor huge keys leave the range of float32.
    """
    scale = sigma.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(sigma.dtype).tiny)
    sigma /= scale[..., None, None]
    sigma.diagonal(dim1=-2, dim2=-1).add_(ridge)
    one = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    # The ridge makes it positive definite, so nothing needs to be checked: that would make the GPU wait.
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(sigma).L, one, upper=False), scale
