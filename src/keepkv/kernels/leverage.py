"""Ridge leverage of keys before RoPE, without a copy of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.rope import Rope

_TILE = 2**20  # elements of the keys that are held as they were before RoPE
_SLOTS = 1024  # of them that are looked at together, and stay in a processor's nearest cache


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
    """The same in plain torch, some heads at a time, and of these some slots: whatever is read twice is in a cache."""
    (b, h, s, d), valid, keys = keys.shape, positions >= 0, keys.detach()
    dtype = torch.promote_types(keys.dtype, torch.float32)
    out = torch.empty(b, h, s, dtype=dtype, device=keys.device)
    if not out.numel():
        return out
    # As of a prompt that nothing left yet: all count alike, and the angles of one head serve all.
    even = bool(valid.all()) and (log_votes is None or not bool(log_votes.any()))
    share = None if even else shares(valid, log_votes).to(dtype)[..., None]
    root = s**-0.5 if even else 1.0  # what is held is times this, so that the squares of huge keys stay in range
    alike = bool((positions == positions[:, :1]).all())
    phases = None if rope is None else rope.phases(positions[:, : 1 if alike else h].clamp(min=0), 1 / rope.scaling)
    step = max(1, min(h, _TILE // max(1, b * s * d)))
    held = torch.empty(b, step, s, d, dtype=dtype, device=keys.device)
    parts = [slice(start, start + _SLOTS) for start in range(0, s, _SLOTS)]
    for first in range(0, h, step):
        some = slice(first, min(first + step, h))
        x = held[:, : some.stop - first]
        turn = None if phases is None else tuple(p if alike else p[:, some] for p in phases)
        newest = torch.empty_like(x[:, :, -1:])
        _contents(keys[:, some, -1:], rope, turn, slice(-1, None), newest)
        mean, sigma = torch.zeros_like(newest), x.new_zeros(*x.shape[:2], d, d)
        for part in parts:
            y = x[:, :, part]
            _contents(keys[:, some, part], rope, turn, part, y)
            # Near the mean, so that the covariance does not drown in it.
            torch.add(newest * -root, y, alpha=root, out=y)
            weighed = y if share is None else y * share[:, some, part]
            mean += weighed.sum(2, keepdim=True)
            sigma += weighed.mT @ y
        mean *= root
        sigma -= mean.mT @ mean
        white, scale = whitening(sigma, ridge)
        centre = (mean * root) @ white.mT
        for part in parts:
            out[:, some, part] = torch.linalg.vector_norm((x[:, :, part] @ white.mT).sub_(centre), dim=-1)
        out[:, some].square_().div_(scale[..., None] * root**2)
    return out.masked_fill_(~valid, 0.0)


def _contents(keys: Tensor, rope: Rope | None, phases: tuple[Tensor, ...] | None, part: slice, out: Tensor) -> None:
    """Writes ``keys`` (B,H,n,D) as they were before RoPE to ``out``; ``phases`` are those of all slots."""
    if rope is None or phases is None:
        out.copy_(keys)
    else:
        rope.back(keys.to(out.dtype), phases[0][:, :, part], phases[1][:, :, part], out)


def shares(valid: Tensor, log_votes: Tensor | None) -> Tensor:
    """Share of each slot in the votes of its head, float32: 0 where it is empty, as all are where none is valid."""
    votes = torch.zeros((), device=valid.device) if log_votes is None else log_votes
    return torch.where(valid, votes, float("-inf")).softmax(-1).nan_to_num(0.0)


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
