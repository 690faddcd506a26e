"""How much of a direction of its head's keys is a key's alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.options import Positive, Queries
from keepkv.core.slots import LayerView
from keepkv.observe.sketched_leverage import sketched_leverage
from keepkv.score.base import Score, register_score


@register_score("leverage-score")
@dataclass(frozen=True)
class LeverageScore(Score):
    """Leverage of a key before RoPE in a Gaussian sketch: Compactor's (arXiv 2507.08143) without its attention.

    ``observe.sketched_leverage`` has the formula. sketch: columns; 0: the keys as they are. Not as in kvpress: the
    scores stay as they are, comparable between heads and rows, where kvpress brings those of a whole batch to mean 0
    and variance 1.
    """

    sketch: Queries = 48
    ridge: Positive = 1e-2

    needs_rope: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        return sketched_leverage(view, view.slots.valid, self.sketch, self.ridge).float()
