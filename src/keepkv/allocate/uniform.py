"""The same number of slots for every layer and head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keepkv.allocate.base import Allocate, register_allocate
from keepkv.core.slots import LayerView


@register_allocate("uniform")
@dataclass(frozen=True)
class Uniform(Allocate):
    """Every head of a row keeps the row's budget."""

    def __call__(self, scores: Tensor, view: LayerView, budget: Tensor) -> Tensor:
        wanted = budget[:, None].expand(scores.shape[:2])
        if view.protected is not None:
            wanted = wanted.maximum(view.protected.sum(-1))
        return wanted.minimum(view.slots.lengths)
