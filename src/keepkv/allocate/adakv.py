"""Budgets per head from the scores themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, register_allocate
from keepkv.allocate.select import ranks, tiers
from keepkv.errors import KeepKVError
from keepkv.slots import LayerView


@register_allocate("adakv")
@dataclass(frozen=True)
class AdaKV(Allocate):
    """AdaKV (arXiv 2407.11550): heads of a layer share one budget of H * budget slots.

    Each head first keeps its own top ``⌊alpha · budget⌋`` (the safeguard; protected slots are its first entries),
    the rest of the budget goes to the highest scores over all heads of the row. Works with any score whose values
    can be compared between heads, such as attention weights.
    """

    alpha: float = 0.2
    ragged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise KeepKVError(f"AdaKV(alpha={self.alpha}): a share of the budget between 0 and 1")

    def __call__(self, scores: Tensor, view: LayerView, budget: Tensor) -> Tensor:
        return self.across([scores], [tiers(view)], [budget])[0]

    def across(self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor]) -> list[Tensor]:
        pooled, shapes, total, safe_slots = [], [], budgets[0] * 0, budgets[0] * 0
        for score, tier, budget in zip(scores, tiers, budgets, strict=True):
            own = (self.alpha * budget.double() + 1e-9).floor().long()  # 0.29 * 100 is 28.999…
            safe = own[:, None].maximum((tier == 2).sum(-1)).minimum((tier > 0).sum(-1))  # (B,H)
            forced = ranks(score, tier) < safe[..., None]
            pooled.append((score.flatten(1), torch.where(forced, 2, tier.clamp(max=1)).to(torch.int8).flatten(1)))
            shapes.append(score.shape)
            total, safe_slots = total + budget * score.shape[1], safe_slots + safe.sum(-1)
        # The safe slots are a prefix of each head's ranking, and so is what one sort over all heads takes of it:
        # `keep_mask` with these counts keeps exactly the slots chosen here.
        every, tier = (torch.cat(parts, dim=1) for parts in zip(*pooled, strict=True))
        kept = ranks(every, tier) < total.maximum(safe_slots).minimum((tier > 0).sum(-1))[:, None]
        parts = kept.split([h * s for _, h, s in shapes], dim=1)
        return [part.view(shape).sum(-1) for part, shape in zip(parts, shapes, strict=True)]


@register_allocate("pooled")
@dataclass(frozen=True)
class Pooled(AdaKV):
    """AdaKV over all layers: every head of the model first keeps its own top ``⌊alpha · budget⌋``, and the rest goes to
    the highest scores anywhere, as in KVzip's non-uniform budgets (arXiv 2505.23416).

    For scores that can be compared between layers, such as leverage, which does not depend on the scale of keys.
    No layer can be compressed before all have been scored, so a prompt stands in memory as a whole until its forward
    ends.
    """

    alpha: float = 0.5
    joint: ClassVar[bool] = True
