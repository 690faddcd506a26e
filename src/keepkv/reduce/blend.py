"""What reductions share that blend what leaves into kept slots."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.kernels.groups import group_mean, group_sum
from keepkv.reduce.base import Reduced


def targets(view: LayerView, keep: Tensor) -> Tensor:
    """(B,H,S) bool: slots of ``keep`` that something may enter, those that are not protected."""
    keep = keep & view.slots.valid
    return keep if view.protected is None else keep & ~view.protected


def following(free: Tensor) -> Tensor:
    """(B,H,S) int64: the first slot of ``free`` (B,H,S) bool that stands where each slot does or behind it, S for
    none."""
    size = free.shape[-1]
    column = torch.arange(size, device=free.device).expand_as(free)
    return column.where(free, size).flip(-1).cummin(-1).values.flip(-1)


def blended(x: Tensor, group: Tensor, shares: Tensor, own: Tensor) -> Tensor:
    """own_c·x_c + Σ_e shares_e·x_e in the slots c that others enter; ``x`` (B,H,S,D) elsewhere, in its dtype.

    group (B,H,S) int64: the slot that each slot e enters, S for none. shares (B,H,S) of e, own (B,H,S) of c.
    """
    size = x.shape[2]
    takes = group_sum((group < size).to(torch.int32), group, size) > 0
    new = group_mean(x, shares, group, size) + x.to(shares.dtype) * own[..., None]
    return torch.where(takes[..., None], new.to(x.dtype), x)


def outcome(changed: Slots, keep: Tensor, group: Tensor) -> Reduced:
    """The slots of ``keep`` (B,H,S) bool among the ``changed`` ones; the others entered one as ``group`` says, or are
    lost."""
    leaving = changed.valid & ~keep
    merged = leaving & (group < group.shape[-1])
    lost = leaving & ~merged
    return Reduced(changed.select(keep), merged.sum(-1), lost.sum(-1), lost)
