"""Sums over groups of slots: many leaving slots merge into one kept slot, all at once.

Such sums do not depend on the order in which slots are merged, unlike the sequential pair merges of the published
algorithms. ``group`` (B,H,S) int64 names, for each slot, the group it enters: 0 … size−1, or ``size`` for none. Nothing
here uses float atomics, so results are the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 2**21  # elements of a temporary, which then stays in a processor's cache


def _rows(group: Tensor, size: int) -> Tensor:
    """Index (B*H*S,) into rows of a flat (B*H*(size+1)) output."""
    b, h, _ = group.shape
    first = torch.arange(b * h, device=group.device).view(b, h, 1) * (size + 1)
    return (group + first).reshape(-1)


def _add(out: Tensor, rows: Tensor, x: Tensor) -> None:
    """out[rows] += x over the first dimension."""
    if x.is_cuda:  # sorts the indices; scatter_add_ would use atomics, whose order changes from run to run
        out.index_put_((rows,), x, accumulate=True)
    elif x.dim() == 1:
        out.scatter_add_(0, rows, x)
    else:
        out.scatter_add_(0, rows[:, None].expand_as(x), x)


def group_sum(x: Tensor, group: Tensor, size: int) -> Tensor:
    """Sum of ``x`` (B,H,S) over each group: (B,H,size), same dtype."""
    b, h, _ = group.shape
    out = x.new_zeros(b * h * (size + 1))
    _add(out, _rows(group, size), x.reshape(-1))
    return out.view(b, h, size + 1)[..., :size]


def group_mean(x: Tensor, weights: Tensor, group: Tensor, size: int) -> Tensor:
    """Σ weights·x over each group: x (B,H,S,D) of any dtype, weights (B,H,S), result (B,H,size,D) as ``weights``.

    It is computed in tiles of slots, so that the products never exist all at once.
    """
    b, h, s, d = x.shape
    out = weights.new_zeros(b * h * (size + 1), d)
    tile = max(1, _TILE // max(1, b * h * d))
    for start in range(0, s, tile):
        part = slice(start, start + tile)
        products = (x[:, :, part].to(weights.dtype) * weights[:, :, part, None]).reshape(-1, d)
        _add(out, _rows(group[:, :, part], size), products)
    return out.view(b, h, size + 1, d)[:, :, :size]


def group_logsumexp(x: Tensor, group: Tensor, size: int) -> Tensor:
    """ln Σ e^x over each group: (B,H,S) to (B,H,size); −inf for an empty group. No e^x of a raw logit can overflow."""
    b, h, _ = group.shape
    top = x.new_full((b, h, size + 1), float("-inf")).scatter_reduce_(2, group, x, "amax")
    top = top.masked_fill(top.isneginf(), 0.0)
    total = group_sum((x - top.gather(2, group)).exp(), group, size)
    return total.log() + top[..., :size]


def expand_groups(x: Tensor, group: Tensor, fill: float = 0.0) -> Tensor:
    """What belongs to a group given to each of its slots: x (B,H,size) to (B,H,S); ``fill`` for slots in no group."""
    padded = torch.cat((x, x.new_full((*x.shape[:2], 1), fill)), dim=-1)
    return padded.gather(2, group)
