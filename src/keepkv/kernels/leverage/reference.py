"""Ridge leverage in plain torch: what the kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.rope import Rope

_SLOTS = 1024  # slots of a head that are looked at together, and stay in a processor's nearest cache


def key_leverage(
    keys: Tensor, positions: Tensor, log_votes: Tensor | None, ridge: float, rope: Rope | None, at: Tensor | None
) -> Tensor:
    """``kernels.key_leverage`` with its arguments checked and the sample ``at``, as ``evenly_spaced`` returns it.

    Works on some slots of one head at a time.
    """
    (b, h, s), keys = positions.shape, keys.detach()
    dtype = torch.promote_types(keys.dtype, torch.float32)
    out = torch.empty(b, h, s, dtype=dtype, device=keys.device)
    if not out.numel():
        return out
    drawn = positions if at is None else positions.gather(-1, at.clamp(min=0)).masked_fill_(at < 0, -1)
    share = shares(drawn >= 0, log_votes if at is None or log_votes is None else log_votes.gather(-1, at.clamp(min=0)))
    alike = bool((positions == positions[:, :1]).all())  # the angles of one head serve all
    usual = []
    for head in range(h):
        if head == 0 or not alike:
            turn = _turn(rope, drawn[:, head])
        x = _contents(_rows(keys[:, head], at, head), rope, turn, dtype)
        w = share[:, head, :, None].to(dtype)
        mean = w.mT @ x
        x -= mean
        usual.append((mean, whitening((x * w).mT @ x, ridge).mT))
    for start in range(0, s, _SLOTS):
        part = slice(start, start + _SLOTS)
        for head, (mean, white) in enumerate(usual):
            if head == 0 or not alike:
                turn = _turn(rope, positions[:, head, part])
            out[:, head, part] = _norms(_contents(keys[:, head, part], rope, turn, dtype).sub_(mean), white)
    return out.masked_fill_(positions < 0, 0.0)


def _rows(x: Tensor, at: Tensor | None, head: int) -> Tensor:
    """Rows ``at`` (B,H,m) of head ``head``, whose slots are ``x`` (B,S,D); all where ``at`` is None."""
    if at is None:
        return x
    return torch.stack([row.index_select(0, own.clamp(min=0)) for row, own in zip(x, at[:, head], strict=True)])


def _turn(rope: Rope | None, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin (B,n,R/2) that undo RoPE at ``positions`` (B,n)."""
    return None if rope is None else rope.phases(positions.clamp(min=0), 1 / rope.scaling)


def _contents(keys: Tensor, rope: Rope | None, turn: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """``keys`` (B,n,D) as they were before RoPE: a new tensor."""
    if rope is None or turn is None:
        return keys.to(dtype, copy=True)
    out = torch.empty(keys.shape, dtype=dtype, device=keys.device)
    rope.back(keys.to(dtype), *turn, out)
    return out


def _norms(z: Tensor, white: Tensor) -> Tensor:
    """‖z_i·white‖² (B,n) for z (B,n,D) and white (B,D,D) upper triangular, of which the zero quarter is left out."""
    half = z.shape[-1] // 2
    first: Tensor = torch.linalg.vector_norm(z[..., :half] @ white[:, :half, :half], dim=-1)
    second = torch.linalg.vector_norm(z @ white[..., half:], dim=-1)
    return first.square_().addcmul_(second, second)


def evenly_spaced(valid: Tensor, sample: int | None) -> Tensor | None:
    """Where ``sample`` = m of the valid slots of a head are, evenly spaced: (B,H,m) int64, −1 where a head has fewer.

    valid (B,H,S) bool. None: all slots, which are no more. The j-th of n is the ⌊j·n/m⌋-th valid one, wherever empty
    slots are: a padded row is sampled as it is alone.
    """
    if sample is None or valid.shape[-1] <= sample:
        return None
    rank = valid.cumsum(-1)
    count = rank[..., -1:]
    wanted = torch.arange(sample, device=valid.device) * count.clamp(min=sample) // sample
    return torch.where(wanted < count, torch.searchsorted(rank, wanted + 1), -1)


def shares(valid: Tensor, log_votes: Tensor | None) -> Tensor:
    """Share of each slot in the votes of its head, float32: 0 where it is empty, as all are where none is valid."""
    votes = torch.zeros((), device=valid.device) if log_votes is None else log_votes
    return torch.where(valid, votes, float("-inf")).softmax(-1).nan_to_num(0.0)


def whitening(sigma: Tensor, ridge: float) -> Tensor:
    """W (…,D,D) lower triangular with WᵀW = (Σ + ``ridge``·tr Σ/D·I)⁻¹ for covariances Σ, which are overwritten.

    Scaled to a mean of 1 on the diagonal first, so that neither tiny nor huge keys leave the range of float32.
    """
    scale = sigma.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(sigma.dtype).tiny)[..., None, None]
    sigma /= scale
    sigma.diagonal(dim1=-2, dim2=-1).add_(ridge)
    one = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device) * scale.rsqrt()
    # The ridge makes it positive definite, so nothing needs to be checked: that would make the GPU wait.
    white: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(sigma).L, one, upper=False)
    return white
