"""Budgets per layer from the scores, with as many slots in each head of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, Known, register_allocate


@register_allocate("composite")
@dataclass(frozen=True)
class Composite(Allocate):
    """KVCompose (arXiv 2509.05165): layers share one budget by composite tokens.

    The r-th composite token of a layer is the r-th best slot of each of its heads, whichever token that is in each, and
    its score is their mean. The budget goes to the best composite tokens of all layers, so that every head of a layer
    keeps as many slots, its own best ones. Protected slots come first.

    kvpress gives the first layer as many as the largest, which its caches count tokens by; here layers need not.
    """

    ragged: ClassVar[bool] = True  # heads do not differ, but rows do
    joint: ClassVar[bool] = True

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        longest, heads = max(x.shape[2] for x in scores), torch.tensor([x.shape[1] for x in scores])
        ranked = torch.stack([_ranked(x, y, longest) for x, y in zip(scores, tiers, strict=True)], dim=1)  # (B,L,S)
        order = ranked.flatten(1).sort(dim=-1, descending=True, stable=True).indices
        heads = heads.to(order.device)
        spent = heads.repeat_interleave(longest)[order].cumsum(-1)
        total = (torch.stack(budgets, dim=1) * heads).sum(-1, keepdim=True)
        within = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, spent <= total)
        counts = within.view(ranked.shape).sum(-1).unbind(1)
        return [
            count[:, None].maximum((tier == 2).sum(-1)).minimum((tier > 0).sum(-1))
            for count, tier in zip(counts, tiers, strict=True)
        ]


def _ranked(score: Tensor, tier: Tensor, size: int) -> Tensor:
    """Scores (B,size) of the composite tokens of a layer, best first, −inf where no head has one."""
    low = float("-inf")
    score = score.float().nan_to_num(nan=low, posinf=float("inf"), neginf=low).masked_fill(tier == 0, low)
    best = score.masked_fill(tier == 2, float("inf")).sort(dim=-1, descending=True).values.mean(1)
    best = best.nan_to_num(nan=low, posinf=float("inf"), neginf=low)  # of a head that has more than another
    return torch.nn.functional.pad(best, (0, size - best.shape[1]), value=low)
