"""Whole frames, chosen by when they came: what streams are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.vision import sight
from keepkv.score.base import Score, register_score

LEVELS = 24  # powers of two that are told apart


@register_score("newest-frames")
@dataclass(frozen=True)
class NewestFrames(Score):
    """The newest time steps, whole: a sliding window."""

    signed: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        return sight(view).steps.float()


@register_score("even-frames")
@dataclass(frozen=True)
class EvenFrames(Score):
    """Time steps that are evenly spaced, at every compression of a stream of any length: those whose number is divided
    by the larger power of two, the newer ones first among equals."""

    def __call__(self, view: LayerView) -> Tensor:
        steps = sight(view).steps.clamp(min=0)
        level = sum((steps % (1 << i) == 0).long() for i in range(1, LEVELS))
        return level + steps / (1 + steps.amax())
