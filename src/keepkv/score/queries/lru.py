"""When a slot was last attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Amount
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import tiles
from keepkv.score.base import Score, register_score

STAT = "last_touch"  # per slot: position of the last query that touched it
NEVER = -1.0


@register_score("lru")
@dataclass(frozen=True)
class LRU(Score):
    """Least recently used: S_i = the position of the last query that touched slot i, its own token at least.

    A query touches a slot where any query head of the KV head gives it at least ``factor`` times an even share of its
    attention, factor/(slots that the query sees). Of slots that merge, the last touch counts.

    Recency is all that counts: how strong the attention was, or how often, does not. With the ends of the text
    protected, attention scores hardly beat it (arXiv 2605.18053, where "used" is not defined further).
    """

    factor: Amount = 1.0

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(NEVER, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        stat, positions = view.slots.stats[STAT], view.query_positions
        # Slots behind a query are the newest of its row, and none of them has left yet.
        seen = view.slots.lengths[..., None] - (view.seen[:, None] - 1 - positions)[:, None]  # (B,H,T)
        even = self.factor / seen.clamp(min=1)
        if view.weights is not None:
            touched = view.weights.amax(2) >= even
            stat.copy_(stat.maximum(torch.where(touched, positions[:, None].to(stat.dtype), NEVER)))
            return
        for heads, part, end, attn in tiles(view, view.queries, positions):
            touched = (attn.amax(2) >= even[:, heads, part, None].to(attn.dtype)) & (attn.amax(2) > 0)
            last = torch.where(touched, positions[:, None, part, None].to(stat.dtype), NEVER).amax(2)
            held = stat[:, heads, :end]
            held.copy_(held.maximum(last))

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats[STAT].maximum(view.slots.positions.to(view.slots.stats[STAT].dtype))
