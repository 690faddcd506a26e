"""The largest attention that a slot gets while the text is read a second time, as all heads see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import tiles
from keepkv.score.base import Score, register_score
from keepkv.score.passes.kvzip import STAT


@register_score("kvcompose")
@dataclass(frozen=True)
class KVCompose(Score):
    """KVCompose (arXiv 2509.05165): s_h = the largest attention that a token of the second reading gives the slot, mean
    over the query heads of KV head h; score = s_h + mean over the KV heads of s, so that heads help each other.

    Statistic ``reread``, started anew by ``keepkv.reread``: s_h, the largest where slots merge. The paper takes the
    largest of each query head first, and the mean of these; in the other order one number per slot is enough, however
    the reading is cut into chunks. With one query head to a KV head both are the same. The queries are those of the
    text that is read again, as in kvpress; the paper takes those of its tasks.
    """

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(0.0, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True
    needs_second_reading: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        most = view.slots.stats[STAT]
        if view.weights is not None:
            most.copy_(most.maximum(view.weights.mean(2)).detach())
            return
        for heads, _, end, attn in tiles(view, view.queries, view.query_positions):
            held = most[:, heads, :end]
            held.copy_(held.maximum(attn.mean(2).amax(2)).detach())

    def __call__(self, view: LayerView) -> Tensor:
        own = view.slots.stats[STAT]
        return own + self._of_heads(view, own)

    def _of_heads(self, view: LayerView, own: Tensor) -> Tensor:
        """Mean over KV heads (B,H,S) of what each says of the token of a slot; of heads that still hold it."""
        positions = view.slots.positions
        if bool((positions == positions[:, :1]).all()):
            return own.mean(1, keepdim=True).expand_as(own)
        size = int(view.seen.max())
        at = positions.clamp(min=0).long().flatten(1)
        said, heads = own.new_zeros(len(own), size), own.new_zeros(len(own), size)
        said.scatter_add_(1, at, (own * view.slots.valid).flatten(1))
        heads.scatter_add_(1, at, view.slots.valid.to(own.dtype).flatten(1))
        return (said / heads.clamp(min=1)).gather(1, at).view_as(own)
