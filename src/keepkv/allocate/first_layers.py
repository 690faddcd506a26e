"""The first layers keep everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import Allocate, Known, register_allocate
from keepkv.allocate.water_filling import above
from keepkv.core.options import Count
from keepkv.errors import BudgetError


@register_allocate("first-layers")
@dataclass(frozen=True)
class FirstLayers(Allocate):
    """The first ``whole`` layers keep all that they hold, the others share what is left of the budget alike.

    FastV (arXiv 2403.06764) as it is held in a cache. The budget is the mean over all layers: with N tokens, L layers
    and a budget of b slots each, the others keep (L·b − whole·N) / (L − whole). Raises ``BudgetError`` where that is
    less than what is protected.
    """

    whole: Count = 2
    joint: ClassVar[bool] = True

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        held = torch.stack([(t > 0).sum(-1).amax(-1) for t in tiers], -1)  # (B,L)
        pinned = torch.stack([(t == 2).sum(-1).amax(-1) for t in tiers], -1)
        total = torch.stack(budgets, -1).sum(-1)
        low = torch.cat((held[:, : self.whole], pinned[:, self.whole :]), -1)
        # A row that fits keeps all of its slots, and is no reason to refuse another.
        short = (low.sum(-1) > total.maximum(pinned.sum(-1))) & (held.sum(-1) > total)
        if bool(short.any()):
            row = int(short.int().argmax())
            need = -(-int(low[row].sum()) // low.shape[-1])
            raise BudgetError(
                f"row {row}: the first {self.whole} of {low.shape[-1]} layers keep all of their {int(held[row].max())} "
                f"tokens, and the budget is {int(total[row]) // low.shape[-1]} slots per head on average. Give "
                f"at least {need + 1}, or fewer layers that keep everything (whole=)."
            )
        room = torch.zeros_like(held)
        counts = above(low, room + 1, total.maximum(low.sum(-1)), held)
        lengths = [(t > 0).sum(-1) for t in tiers]
        return [n[:, None].expand_as(own).minimum(own) for n, own in zip(counts.unbind(-1), lengths, strict=True)]
