"""Attention of the question, each of whose tokens is weighed by how much it has to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Window
from keepkv.core.slots import LayerView
from keepkv.observe.attention import tiles
from keepkv.observe.window import remember, window
from keepkv.score.base import Score, register_score


@register_score("finch")
@dataclass(frozen=True)
class Finch(Score):
    """FINCH (arXiv 2408.00167): S_i = mean over the question's queries of t·a_i(q_t), t tokens that stand before q_t.

    The question is the last ``window`` tokens. The factor t is what ``normalize`` adds to SnapKV without pooling: later
    tokens of the question, which share their attention among more slots, have the same say. Mean over the query heads
    of the KV head.
    """

    window: Window = 32
    normalize: bool = True

    observes: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.window}

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        dtype = torch.promote_types(view.slots.keys.dtype, torch.float32)
        total = torch.zeros(view.slots.shape, dtype=dtype, device=queries.device)
        weight = positions.clamp(min=0).to(dtype) if self.normalize else torch.ones_like(positions, dtype=dtype)
        for heads, part, end, attn in tiles(view, queries, positions):
            total[:, heads, :end] += (attn * weight[:, None, None, part, None]).sum(3).mean(2)
        return total / (positions >= 0).sum(-1).clamp(min=1)[:, None, None]
