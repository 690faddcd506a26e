"""When a slot was last attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Share
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import received
from keepkv.score.base import Score, register_score

STAT = "last_use"  # per slot: position of the last query that used it, at first its own


@register_score("raas")
@dataclass(frozen=True)
class RaaS(Score):
    """RaaS (arXiv 2502.11147): the position of the last query that used the slot; the oldest goes first.

    A decoded token uses the slots that get more than ``threshold`` of its attention, mean over the query heads of the
    KV head; None: the half that gets most, by the median over the head's slots. A token uses itself; while a prompt is
    read nothing else counts.
    """

    threshold: Share | None = None

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(-1.0, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        last, positions = view.slots.stats[STAT], view.slots.positions
        last.copy_(last.maximum(positions.to(last.dtype)))
        if view.prompt or view.query_positions.shape[1] != 1:
            return
        attn = received(view, view.queries, view.query_positions).mean(2)  # zeros for padding
        if self.threshold is None:
            bound = attn.masked_fill(positions < 0, float("nan")).nanmedian(-1, keepdim=True).values.nan_to_num(nan=1.0)
        else:
            bound = torch.full_like(attn[..., :1], self.threshold)
        last.copy_(torch.where(attn > bound, view.query_positions[:, None].to(last.dtype), last))

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats[STAT].maximum(view.slots.positions.to(view.slots.stats[STAT].dtype))
