"""InfiniPot-V: what is new in time, and what values are large, each with its part of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.select import ranks
from keepkv.core.options import Share
from keepkv.core.slots import LayerView
from keepkv.observe.vision import ranked, sight
from keepkv.score.base import Score, register_score
from keepkv.score.vision.tar import Alignment, Space, redundancy
from keepkv.score.vision.van import Pool, value_norms


@register_score("infinipot-v")
@dataclass(frozen=True)
class InfiniPotV(Score):
    """Algorithm 2 of InfiniPot-V (arXiv 2506.15745) as one score: the recent steps, the most distinctive, the largest.

    Of the C vision slots that the budget leaves, ``alpha``·C go to the recent steps, whole, and to the past slots of
    the highest TaR (``score.vision.tar``); the others to those of the largest VaN (``score.vision.van``). So exactly C
    survive in each head: 2 + …, 1 + … and the rank of VaN below 1. The paper's algorithm 1 is a union of sets that may
    overlap; its printed algorithm 2 ties these sets with the largest VaN; the authors' code adds 1 to the maximum,
    which is what is meant. recent, alignment, space: of TaR; pool, thresholds: of VaN.
    """

    alpha: Share = 0.5
    recent: Share = 1 / 6
    alignment: Alignment = "cell"
    space: Space = "unrotated"
    pool: Pool = "depth"
    thresholds: tuple[float, ...] = ()

    needs_rope: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        seen = sight(view)
        new = seen.recent(self.recent)
        past = seen.vision & ~new
        norms = value_norms(view, seen, self.pool, self.thresholds) if self.alpha < 1 else seen.cells.float()
        score = ranked(norms, seen.vision) + 2.0 * new
        if self.alpha == 0:
            return score
        distinct = redundancy(view, seen, self.recent, self.alignment, self.space)
        share = seen.room - ((1 - self.alpha) * seen.room).round()
        wanted = (share - new.sum(-1, keepdim=True)).clamp(min=0)
        order = ranks(distinct, past.to(torch.int8))
        return score + (past & (order < wanted) & distinct.isfinite())
