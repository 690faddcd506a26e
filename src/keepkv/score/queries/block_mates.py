"""A score as it is, plus which tokens before it in its block each token attended to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import logits
from keepkv.score.base import Wrapped
from keepkv.score.queries.remembering import Remembering

BLOCK = 32  # tokens: block n holds positions 32n … 32n + 31
_EACH = 4  # distances in one statistic: each below 32, they are together a whole number that float32 holds
STATS = tuple(f"block_mates_{n}" for n in range(BLOCK // _EACH))
_TILE = 4 * BLOCK  # queries at a time


@dataclass(frozen=True)
class BlockMates(Wrapped):
    """A score as it is, plus the earlier tokens of its block of ``BLOCK`` in the order in which each token attended to
    them: its mates, the most attended first.

    By the attention of the token's own query when it was read, after a softmax over its mates alone, mean over the
    query heads of the KV head. In ``STATS``, as ``mates`` reads them; of slots that merge, the anchor keeps its own.
    """

    passed_on: ClassVar[tuple[str, ...]] = Remembering.passed_on

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stats", {**self.score.stats, **dict.fromkeys(STATS, Stat(0.0, "anchor"))})

    def observe(self, view: LayerView) -> None:
        super().observe(view)
        for part, columns in _near(view):
            slots, positions = view.slots.map(lambda x, at=columns: x[:, :, at]), view.query_positions[:, part]
            u = logits(replace(view, slots=slots), view.queries[:, :, part], positions)
            own, far = _mates(slots.positions, positions, u)
            for name, code in zip(STATS, _packed(far), strict=True):
                noted = torch.where(own.any(2), (own * code[..., None]).sum(2).to(torch.float32), slots.stats[name])
                view.slots.stats[name][:, :, columns] = noted

    def __call__(self, view: LayerView) -> Tensor:
        return self.score(view)

    def observe_spans(self, view: LayerView) -> None:
        self.score.observe_spans(view)

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        return self.score.span_scores(view, own)


def mates(stats: Mapping[str, Tensor]) -> list[Tensor]:
    """How far (B,H,S) before each slot its mates stand, the most attended first, 0 for none: what ``STATS`` say."""
    return [stats[name].round().long() // BLOCK**k % BLOCK for name in STATS for k in range(_EACH)]


def _packed(far: Tensor) -> list[Tensor]:
    """What ``STATS`` hold of distances ``far`` (…,BLOCK) int64: each (…)."""
    powers = BLOCK ** torch.arange(_EACH, device=far.device)
    return list((far.unflatten(-1, (-1, _EACH)) * powers).sum(-1).unbind(-1))


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


def _mates(held: Tensor, positions: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Which slots, at positions ``held`` (B,H,n), are those of queries at ``positions`` (B,T), (B,H,T,n) bool; and how
    far before each query its mates stand, (B,H,T,BLOCK) int64, by logits u (B,H,G,T,n)."""
    held, now = held[:, :, None].long(), positions[:, None, :, None].long()
    before = (held >= 0) & (held < now) & (held // BLOCK == now // BLOCK)
    attn = u.masked_fill(~before[:, :, None], float("-inf")).softmax(-1).mean(2)  # NaN where there is none
    top = attn.masked_fill(~before, -1.0).topk(min(BLOCK, attn.shape[-1]))
    far = (now - held).expand_as(before).gather(-1, top.indices) * (top.values >= 0)
    return (held == now) & (now >= 0), pad(far, (0, BLOCK - far.shape[-1]))
