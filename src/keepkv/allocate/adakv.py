"""Budgets per head from the scores themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, register_allocate
from keepkv.allocate.select import protected_counts, ranks, tiers
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
        b, h, s = scores.shape
        own = (self.alpha * budget.double() + 1e-9).floor().long()  # 0.29 * 100 is 28.999…
        safe = own[:, None].maximum(protected_counts(view)).minimum(view.slots.lengths)  # (B,H)
        tier = tiers(view)
        forced = ranks(scores, tier) < safe[..., None]
        # The safe slots are a prefix of each head's ranking, and so is what one sort over all heads takes of it:
        # `keep_mask` with these counts keeps exactly the slots chosen here.
        pooled = ranks(scores.flatten(1), torch.where(forced, 2, tier.clamp(max=1)).to(torch.int8).flatten(1))
        total = (budget * h).maximum(safe.sum(-1)).minimum(view.slots.lengths.sum(-1))
        return (pooled < total[:, None]).view(b, h, s).sum(-1)
