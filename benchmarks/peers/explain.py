"""Scores that repeat what kvpress does differently: where they give its kept sets, the cause is proven."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv import LayerView
from keepkv.score import ExpectedAttention, SnapKV
from keepkv.score.window import remember, window


@dataclass(frozen=True)
class OnePosition(SnapKV):
    """SnapKV as kvpress runs it while decoding: the newest token's position embedding turns every buffered query."""

    needs_rope: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        assert view.rope is not None
        newest = positions.amax(-1, keepdim=True).expand_as(positions)
        turned = view.rope.rotate(view.rope.unrotate(queries, positions[:, None]), newest[:, None])
        return super().__call__(replace(view, state={**view.state, "window": turned}))


@dataclass(frozen=True)
class FromBuffer(ExpectedAttention):
    """Expected attention as kvpress runs it while decoding: statistics of the last ``buffer`` queries, its first
    ``n_sink`` left out, and the next position taken to be the length of the buffer."""

    buffer: int = 16

    def observe(self, view: LayerView) -> None:
        remember(view, self.buffer)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.buffer)
        short = torch.full_like(view.seen, self.buffer)
        queries, positions = queries[:, :, self.n_sink :], positions[:, self.n_sink :]
        return super().__call__(replace(view, queries=queries, query_positions=positions, seen=short, state={}))
