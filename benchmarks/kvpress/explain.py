"""Scores that repeat what kvpress does differently: where they give its kept sets, the cause is proven."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv import LayerView
from keepkv.observe.chunks import chunk_of
from keepkv.observe.window import remember, window
from keepkv.score import Chunk, Compactor, ExpectedAttention, SnapKV


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


@dataclass(frozen=True)
class FilledBlock(Compactor):
    """Compactor as kvpress runs it: the last block is filled up to ``chunk`` tokens. The filling is there as keys,
    with a logit of 0 in every softmax, and as queries, which attend to all of the block alike."""

    def _sum(self, u: Tensor, queries: int) -> Tensor:
        rest = self.chunk - queries
        z = u.logsumexp(-1, keepdim=True)
        if rest:
            z = torch.logaddexp(z, torch.full_like(z, math.log(rest)))
        return (u - z).exp().sum(1) + u.shape[1] / queries * rest / self.chunk


@dataclass(frozen=True)
class EachAlone(Chunk):
    """Chunks as kvpress scores them: each as if it were all there is. For scores of keys and values."""

    def scored(self, view: LayerView) -> Tensor:
        out, home = torch.zeros(view.slots.shape), chunk_of(view.slots, self.size)
        for number in range(int(home.max()) + 1):
            part = view.slots.select(home == number)
            out[home == number] = self.score(replace(view, slots=part)).flatten()
        return out
