"""Attention of a sample of the context's own queries, as Attention Matching chooses its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Window, one_of
from keepkv.core.slots import LayerView
from keepkv.observe.attention import tiles
from keepkv.observe.sample import remember_sample, sample
from keepkv.score.base import Score, register_score


@register_score("matching")
@dataclass(frozen=True)
class Matching(Score):
    """Root mean square, or largest, attention that a slot receives from reference queries (arXiv 2602.16284).

    queries: that many of the row's own, spread evenly over it, at their own positions. pool: "rms", sqrt(mean a²), or
    "max". Over the queries that see the slot and the query heads of the KV head; 0 for a slot that none of them sees.
    """

    queries: Window = 64
    pool: Annotated[str, one_of("rms", "max")] = "rms"

    observes: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"sample": self.queries}

    def observe(self, view: LayerView) -> None:
        remember_sample(view, self.queries)

    def __call__(self, view: LayerView) -> Tensor:
        return pooled(view, *sample(view, self.queries), self.pool)


def pooled(view: LayerView, queries: Tensor, positions: Tensor, pool: str) -> Tensor:
    """(B,H,S): ``pool``, "rms" or "max", over queries (B,H*G,T,D) at positions (B,T), of the attention that a slot
    receives from those that see it."""
    (b, h, s), g, rows = view.slots.shape, view.query_groups, queries.shape[2]
    dtype = torch.promote_types(view.slots.keys.dtype, torch.float32)
    total = torch.zeros(b, h, s, dtype=dtype, device=queries.device)
    for heads, _, end, attn in tiles(view, queries, positions):
        a, held = attn.flatten(2, 3), total[:, heads, :end]
        if pool == "max":
            held.copy_(held.maximum(a.amax(2)))
        else:
            held.add_(a.square_().sum(2))
    if pool == "max":
        return total
    # Padding first: queries at a slot's own position and behind it see it.
    at = view.slots.positions.flatten(1).to(positions.dtype)
    seen = rows - torch.searchsorted(positions.sort(1).values, at).view(b, h, s)
    return (total / (seen.clamp(min=1) * g)).sqrt()
