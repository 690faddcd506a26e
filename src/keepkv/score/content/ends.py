"""The first tokens, and a share of recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Share
from keepkv.core.slots import LayerView
from keepkv.score.base import Score, register_score


@register_score("ends")
@dataclass(frozen=True)
class Ends(Score):
    """The newest max(1, ⌊``recent`` · budget⌋) tokens, then the earlier the better: StreamingLLM as EffiVLM-Bench
    (arXiv 2506.00479) runs it, where most of the budget goes to the first tokens instead of the last."""

    recent: Share = 0.1
    signed: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        budget = view.seen if view.budget is None else view.budget
        newest = (self.recent * budget + 1e-9).long().clamp(min=1)
        positions = view.slots.positions
        is_recent = positions >= (view.seen - newest)[:, None, None]
        return torch.where(is_recent, 1.0, -positions.float())
