"""Which slots of each head are kept, given how many: the one place where ties are broken."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import LayerView


def ranks(scores: Tensor, tier: Tensor) -> Tensor:
    """Rank of each entry along the last dim, 0 = kept first: (…,S) int64.

    Higher ``tier`` (…,S) int8 first, then higher score, then the earlier entry. NaN ranks last within its tier.
    """
    clean = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    order = clean.sort(dim=-1, descending=True, stable=True).indices
    del clean  # what is sorted is some per cent of a layer: as little at a time as can be
    order = order.gather(-1, tier.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def at_rank(x: Tensor, rank: Tensor) -> Tensor:
    """(…,1): the ``rank``-th largest of x (…,S), rank (…,1) int64 from 1 on; the nearest that there is."""
    rank = rank.clamp(1, x.shape[-1])
    least, most = torch.stack(rank.aminmax()).tolist()
    if least == most:
        return x.topk(most, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return x.topk(most, dim=-1).values.gather(-1, rank - 1)


def tiers(view: LayerView) -> Tensor:
    """(B,H,S) int8: 2 for protected slots, 1 for other valid ones, 0 for empty ones."""
    valid = view.slots.valid
    tier = valid.to(torch.int8)
    return tier if view.protected is None else tier.add_(view.protected & valid)


def protected_counts(view: LayerView) -> Tensor:
    """(B,H) int64: valid slots that must be kept."""
    return (tiers(view) == 2).sum(-1)


def keep_mask(scores: Tensor, counts: Tensor, view: LayerView) -> Tensor:
    """(B,H,S) bool: the ``counts`` (B,H) slots of each head to keep, given scores (B,H,S).

    Empty slots never, protected slots always (also where ``counts`` is smaller), then the highest scores; equal
    scores go to the earlier position. Exactly ``counts`` slots wherever protected ≤ counts ≤ valid.
    """
    tier, least = tiers(view), torch.finfo(torch.float32).min
    must, free = tier == 2, tier == 1
    wanted = (counts - must.sum(-1)).clamp(min=0)[..., None]  # beside the protected ones
    value = scores.float().nan_to_num(nan=least, posinf=-least, neginf=least).masked_fill_(~free, float("-inf"))
    last = at_rank(value, wanted)
    above, equal = value > last, value == last
    left = wanted - above.sum(-1, keepdim=True)
    return must | (free & (above | (equal & (equal.cumsum(-1) <= left))))
