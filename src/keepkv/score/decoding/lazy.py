"""How long a slot has not been attended to, by how long that was before it was again."""

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

LAST, LONGEST = "last_use", "longest_wait"  # per slot: position of the last query that used it; largest time between


@register_score("lazy-eviction")
@dataclass(frozen=True)
class LazyEviction(Score):
    """LazyEviction (arXiv 2506.15969): 2σ(−1 − (t − TS)/MRI) + 2σ(1 − MRI), σ the logistic function, t now.

    TS is the last query that gave the slot ``threshold`` of its attention, in any query head of the KV head; MRI the
    longest time between two such queries. Where it is 0 the slot was never used again: its score is 0. A token has used
    itself when it comes, and all slots are used when a prompt has been read. The formula is that of the released code;
    the paper gives the terms as 2σ(−(t − TS)/MRI) and 2σ(−1/MRI), and the second then grows with MRI instead.
    """

    threshold: Share = 1e-4

    stats: ClassVar[dict[str, Stat]] = {LAST: Stat(-1.0, "max"), LONGEST: Stat(0.0, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        last, longest = view.slots.stats[LAST], view.slots.stats[LONGEST]
        now = view.query_positions.amax(-1)[:, None, None].to(last.dtype)  # (B,1,1), EMPTY where all is padding
        if view.query_positions.shape[1] != 1:
            last.copy_(torch.where(view.slots.valid, last.maximum(now), last))
            return
        last.copy_(last.maximum(view.slots.positions.to(last.dtype) - 1))  # of a token that is new: the step before
        attn = received(view, view.queries, view.query_positions).amax(2)
        used = (attn >= self.threshold) & view.slots.valid & (now >= 0)
        longest.copy_(torch.where(used, longest.maximum(now - last), longest))
        last.copy_(torch.where(used, now, last))

    def __call__(self, view: LayerView) -> Tensor:
        last, longest = view.slots.stats[LAST], view.slots.stats[LONGEST]
        waited = (view.seen[:, None, None] - 1).to(last.dtype) - last
        score = 2 * (-1 - waited / longest.clamp(min=1)).sigmoid() + 2 * (1 - longest).sigmoid()
        return score.masked_fill(longest == 0, 0.0)
