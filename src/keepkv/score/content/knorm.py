"""Key norm: keys of small norm receive much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.lengths import lengths
from keepkv.score.base import Score, register_score


@register_score("knorm")
@dataclass(frozen=True)
class KNorm(Score):
    """``−‖k‖₂`` (arXiv 2406.11430), in float32."""

    signed: ClassVar[bool] = True

    scores_within_spans: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        return -lengths(view.slots.keys).float()
