"""Plain eviction: what is not kept is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.score.base import Score


@register_reduce("drop")
@dataclass(frozen=True)
class Drop(Reduce):
    """Kept slots stay as they are; the others leave with their attention mass."""

    drops: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        lost = view.slots.valid & ~keep
        dropped = lost.sum(-1)
        return Reduced(view.slots.select(keep), dropped.new_zeros(dropped.shape), dropped, lost)
