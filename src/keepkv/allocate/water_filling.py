"""How groups share a budget: water-filling between bounds, rounded so that sums are exact."""

from __future__ import annotations

import torch
from torch import Tensor


def water_fill(total: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Shares x_k = clamp(τ·w_k, low_k, high_k) that sum to ``total``: (…,K) float64.

    total (…), weights, low and high (…,K) with low ≤ high and Σ low ≤ total ≤ Σ high. A group of weight 0 gets its
    lower bound; where nothing else can take the rest, the sum stays below ``total``.
    """
    total, weights, low, high = (x.double() for x in (total, weights, low, high))

    def at(level: Tensor) -> Tensor:
        """Shares (…,L,K) at levels τ (…,L)."""
        return (level[..., None] * weights[..., None, :]).clamp(low[..., None, :], high[..., None, :])

    # Between two neighbouring levels at which a group meets a bound, the sum of the shares is linear in τ.
    bounds = [torch.where(weights > 0, bound / weights, 0.0) for bound in (low, high)]
    levels = torch.cat(bounds, dim=-1).sort(dim=-1).values
    sums = at(levels).sum(-1)
    last = levels.shape[-1] - 1
    left = ((sums <= total[..., None]).sum(-1, keepdim=True) - 1).clamp(0, last)
    right = (left + 1).clamp(max=last)
    gap = sums.gather(-1, right) - sums.gather(-1, left)
    part = torch.where(gap > 0, (total[..., None] - sums.gather(-1, left)) / torch.where(gap > 0, gap, 1.0), 0.0)
    level = levels.gather(-1, left) + part.clamp(0, 1) * (levels.gather(-1, right) - levels.gather(-1, left))
    return at(level)[..., 0, :]


def largest_remainder(shares: Tensor, total: Tensor, high: Tensor) -> Tensor:
    """Integers (…,K) int64 that sum to ``total`` (…), each ``shares`` (…,K) rounded down or up, none above ``high``.

    Equal remainders go to the earlier group. Needs Σ shares = total and shares ≤ high.
    """
    whole = (shares + 1e-9).floor().long()  # 2.9999999999 is 3
    remainder = (shares - whole).masked_fill(whole >= high, -1.0)
    order = remainder.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return whole + (rank < (total - whole.sum(-1))[..., None])


def share(
    total: Tensor, weights: Tensor, low: Tensor, wanted: Tensor, high: Tensor, own: Tensor | None, fair: float
) -> Tensor:
    """How many of ``total`` (…) slots each of K groups keeps: (…,K) int64 with the exact sum min(total, Σ high).

    weights (…,K): fair shares are proportional to them. low ≤ high (…,K): bounds that always hold, Σ low ≤ total;
    wanted ≥ low: what a group should have at least, scaled down where not all fits. own (…,K): counts of the method
    itself, blended in with weight 1 − ``fair``; may be None where ``fair`` is 1.
    """
    total = total.minimum(high.sum(-1))
    extra = wanted.minimum(high) - low
    room = (total - low.sum(-1)).minimum(extra.sum(-1))
    low = low + water_fill(room, extra, torch.zeros_like(extra), extra)
    shares = water_fill(total, weights, low, high)
    if own is not None and fair < 1:
        shares = water_fill(total, fair * shares + (1 - fair) * own, low, high)
    return largest_remainder(shares, total, high)


def above(floor: Tensor, weights: Tensor, total: Tensor, high: Tensor) -> Tensor:
    """Counts c_k (…,K) int64 with floor_k ≤ c_k ≤ high_k and the exact sum min(total, Σ high): what is left above the
    floors is shared in proportion to ``weights`` (…,K), what a group at its bound cannot take by the others.

    floor, high (…,K) int64, total (…) int64. A floor above ``high`` is lowered to it; Σ floor ≤ total is the caller's.
    Where only groups of weight 0 have room left they share it evenly.
    """
    floor = floor.minimum(high)
    room = high - floor
    rest = (total.minimum(high.sum(-1)) - floor.sum(-1)).clamp(min=0)
    none = torch.zeros_like(room)
    shares = water_fill(rest, weights, none, room)
    shares = shares + water_fill(rest - shares.sum(-1), torch.ones_like(shares), none, room - shares)
    return floor + largest_remainder(shares.minimum(room.double()), rest, room)
