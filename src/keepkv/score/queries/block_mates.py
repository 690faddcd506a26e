"""A score as it is, plus which tokens before it in its block each token attended to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import logits
from keepkv.score.base import Wrapped
from keepkv.score.queries.remembering import Remembering

BLOCK = 32  # tokens: block n holds positions 32n … 32n + 31
MATES = 4  # their distances, each below 32, are together a whole number that float32 holds
STAT = "block_mates"  # per slot: Σ_k d_k·32^k, d_k how far before it the k-th of its mates stands, 0 for none
_TILE = 4 * BLOCK  # queries at a time


@dataclass(frozen=True)
class BlockMates(Wrapped):
    """A score as it is, plus the ``MATES`` earlier tokens of its block of ``BLOCK`` that each token attended to most.

    By the attention of the token's own query when it was read, after a softmax over the earlier tokens of the block
    alone, mean over the query heads of the KV head. Of slots that merge, the anchor keeps its own.
    """

    passed_on: ClassVar[tuple[str, ...]] = Remembering.passed_on

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stats", {**self.score.stats, STAT: Stat(0.0, "anchor")})

    def observe(self, view: LayerView) -> None:
        super().observe(view)
        for part, columns in _near(view):
            positions = view.query_positions[:, part]
            slots = view.slots.map(itemgetter((slice(None), slice(None), columns)))
            u = logits(replace(view, slots=slots), view.queries[:, :, part], positions)
            own, code = _codes(slots.positions, positions, u)
            noted = (own * code[..., None]).sum(2).to(torch.float32)
            view.slots.stats[STAT][:, :, columns] = noted.where(own.any(2), slots.stats[STAT])

    def __call__(self, view: LayerView) -> Tensor:
        return self.score(view)

    def observe_spans(self, view: LayerView) -> None:
        self.score.observe_spans(view)

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        return self.score.span_scores(view, own)


def mates(stat: Tensor) -> list[Tensor]:
    """How far (B,H,S) before each slot its mates stand, the most attended first, 0 for none: what ``STAT`` says."""
    return [stat.round().long() // BLOCK**k % BLOCK for k in range(MATES)]


def _near(view: LayerView) -> Iterator[tuple[slice, Tensor | slice]]:
    """Some queries at a time, and the columns of slots that may be of their blocks."""
    if torch.compiler.is_compiling():
        yield slice(None), slice(None)
        return
    for start in range(0, view.query_positions.shape[1], _TILE):
        part = slice(start, start + _TILE)
        real = view.query_positions[:, part]
        real = real[real >= 0]
        if len(real):
            held = (view.slots.positions >= real.min() // BLOCK * BLOCK) & (view.slots.positions <= real.max())
            yield part, held.flatten(0, 1).any(0).nonzero()[:, 0]


def _codes(held: Tensor, positions: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Which slots, at positions ``held`` (B,H,n), are those of queries at ``positions`` (B,T), (B,H,T,n) bool; and what
    ``STAT`` says of these, (B,H,T) int64, by logits u (B,H,G,T,n)."""
    held, now = held[:, :, None].long(), positions[:, None, :, None].long()
    before = (held >= 0) & (held < now) & (held // BLOCK == now // BLOCK)
    attn = u.masked_fill(~before[:, :, None], float("-inf")).softmax(-1).mean(2)  # NaN where there is none
    top = attn.masked_fill(~before, -1.0).topk(min(MATES, attn.shape[-1]))
    far = (now - held).expand_as(before).gather(-1, top.indices) * (top.values >= 0)
    powers = BLOCK ** torch.arange(far.shape[-1], device=far.device)
    return (held == now) & (now >= 0), (far * powers).sum(-1)
