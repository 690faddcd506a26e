"""Which slots of each head are kept where spans share its budget."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.allocate.select import keep_mask, protected_counts, ranks
from keepkv.allocate.water_filling import share
from keepkv.core.slots import LayerView
from keepkv.spans.rows import RowSpans


def keep_by_span(scores: Tensor, counts: Tensor, view: LayerView, spans: RowSpans, own: Tensor) -> Tensor:
    """(B,H,S) bool: the ``counts`` (B,H) slots of each head to keep, as ``keep_mask`` with shares for the spans.

    Protected spans keep all that ``view.protected`` says. Every other token belongs to a group, and each group keeps
    its share by ``scores`` (B,H,S): its pinned slots (sinks, window) first, then the highest scores. A fair share is
    proportional to the tokens that the group has had, not to what earlier compressions left of it: rates stay even
    however often the row is compressed. ``own`` (B,H,S) are the method's own scores, which decide the counts that
    ``fair_lambda`` blends in.
    """
    policy, group = spans.policy, spans.group_of(view.slots.positions)
    valid, pinned = view.slots.valid, _pinned(view)
    counts = counts.maximum(protected_counts(view))
    always = pinned & spans.protects(view.slots.positions)
    free = valid & ~always
    tokens = spans.tokens(view.seen)
    size = tokens.shape[-1]
    low, high = count(pinned & free, group, size), count(free, group, size)
    mine = count(keep_mask(own, counts, view) & free, group, size) if policy.fair_lambda < 1 else None
    weights = (spans.groups.weights * tokens)[:, None].expand(high.shape)
    wanted = spans.groups.min_keep[:, None].minimum(high).maximum(low)
    quota = share(counts - always.sum(-1), weights, low, wanted, high, mine, policy.fair_lambda)
    # One ranking: protected spans, then group after group, each with its pinned slots first; empty slots last.
    tier = torch.where(always, 2 * size + 2, 2 * (size - group) + pinned.long()).masked_fill(~valid, 0)
    first = always.sum(-1, keepdim=True) + high.cumsum(-1) - high  # (B,H,K): where the ranking of each group begins
    within = ranks(scores, tier) - first.gather(-1, group)
    return valid & (always | (within < quota.gather(-1, group)))


def needed(view: LayerView, spans: RowSpans) -> Tensor:
    """(B,) int64: slots per head that pinned slots, protected spans and the ``min_keep`` of fair ones take."""
    group = spans.group_of(view.slots.positions)
    pinned = _pinned(view)
    always = pinned & spans.protects(view.slots.positions)
    free = view.slots.valid & ~always
    size = spans.groups.weights.shape[-1]
    least = spans.groups.min_keep[:, None].minimum(count(free, group, size)).maximum(count(pinned & free, group, size))
    return (always.sum(-1) + least.sum(-1)).amax(-1)


def trim(scores: Tensor, budget: Tensor, view: LayerView, pins: Tensor) -> Tensor:
    """``view.protected`` (B,H,S) with no more slots than ``budget`` (B,): the method's own ``pins`` (B,H,S), then the
    tokens of protected spans with the highest scores."""
    pinned = _pinned(view)
    rank = ranks(scores, pinned.to(torch.int8) + (pinned & pins))
    return pinned & (pins | (rank < budget[:, None, None]))


def count(mask: Tensor, group: Tensor, size: int) -> Tensor:
    """How many of ``mask`` (B,H,S) bool each of ``size`` groups has: (B,H,size) int64."""
    out = torch.zeros(*group.shape[:2], size, dtype=torch.int64, device=group.device)
    return out.scatter_add_(-1, group, mask.long())


def _pinned(view: LayerView) -> Tensor:
    """(B,H,S) bool: what must be kept."""
    return torch.zeros_like(view.slots.valid) if view.protected is None else view.protected & view.slots.valid
