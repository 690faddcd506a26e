"""Recency: the newest slots matter most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.score.base import Score, register_score


@register_score("streaming")
@dataclass(frozen=True)
class Streaming(Score):
    """Original position of the token (StreamingLLM, arXiv 2309.17453); the sinks are kept by ``Method.sinks``."""

    scores_within_spans: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.positions.float()
