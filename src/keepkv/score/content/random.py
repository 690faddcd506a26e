"""A score that knows nothing: the null that every other score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.draw import uniform
from keepkv.score.base import Score, register_score


@register_score("random")
@dataclass(frozen=True)
class Random(Score):
    """A hash of (seed, layer, head, position): the same for a row alone and in a batch, and at every compression.

    fresh: other numbers at every compression, of which a slot must win each to stay (arXiv 2609.03430).
    """

    fresh: bool = False

    scores_within_spans: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        return uniform(view, fresh=self.fresh)
