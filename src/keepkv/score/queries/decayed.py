"""Accumulated attention that is forgotten, a share of it with each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.options import Rate
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import received, tiles
from keepkv.score.base import Score, register_score


@register_score("decayed")
@dataclass(frozen=True)
class Decayed(Score):
    """Σ_j decay^(t−j)·a_j over all queries j so far, the newest being t, as ZeroMerge ranks (arXiv 2503.10714).

    a is the mean attention over the query heads of the KV head. Slots that merge have the largest of their sums, as in
    the released code. decay: 0.98 there; 1 is H2O.
    """

    decay: Rate = 0.98

    stats: ClassVar[dict[str, Stat]] = {"decayed": Stat(0.0, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        stat, positions = view.slots.stats["decayed"], view.query_positions
        stat.mul_(self.decay ** (positions >= 0).sum(-1)[:, None, None].to(stat.dtype))
        if positions.shape[1] == 1:
            stat.add_(received(view, view.queries, positions).mean(2))
            return
        rate = self.decay ** (view.seen[:, None] - 1 - positions).to(stat.dtype)
        for heads, part, end, attn in tiles(view, view.queries, positions):
            attn *= rate[:, None, None, part, None]
            stat[:, heads, :end] += attn.sum(3).mean(2).to(stat.dtype)

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats["decayed"]
