"""A score that knows nothing: the null that every other score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.score.base import Score, register_score


@register_score("random")
@dataclass(frozen=True)
class Random(Score):
    """A hash of (seed, layer, head, position): the same for a row alone and in a batch, and at every compression."""

    scores_within_spans: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        positions = view.slots.positions.long()
        heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
        x = positions + (heads << 32) + (view.layer << 44) + view.seed * 0x9E3779B97F4A7C15 % (1 << 62)
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB), (31, 1)):  # splitmix64
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return (x & 0xFFFFFF).float()
