"""Selection by pages: slots of tokens that lie side by side are taken together, by what is known of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from keepkv.core.options import Size
from keepkv.select.base import Asked, Select, register_select
from keepkv.store.codec.base import Codec


class Pages:
    """The older slots by page: tokens whose positions p have the same ⌊p / size⌋. keys (B,H,S,D), float32 or wider."""

    def __init__(self, asked: Asked, size: int) -> None:
        positions, wide = asked.slots.positions, torch.promote_types(asked.query.dtype, torch.float32)
        self.keys = torch.cat([cast(Tensor, x) for x in asked.slots.keys()], 2).to(wide)
        self.query = asked.query.to(wide).view(*positions.shape[:2], -1, self.keys.shape[-1])
        self.count, self.size, self.positions = int(asked.seen.max()) // size + 2, size, positions
        # Empty slots belong to the last page, where nothing else is.
        self.together = asked.slots.content.codec.together
        self.of = torch.where(positions >= 0, positions.long() // size, self.count - 1)
        there = torch.zeros(*positions.shape[:2], self.count, dtype=torch.bool, device=positions.device)
        self.there = there.scatter(2, self.of, positions >= 0)  # (B,H,pages): which hold a slot

    def reduced(self, how: str) -> Tensor:
        """Keys of each page by "amin", "amax" or "mean", (B,H,pages,D); 0 where a page is empty."""
        shape, at = (*self.keys.shape[:2], self.count, self.keys.shape[-1]), self.of[..., None].expand_as(self.keys)
        return self.keys.new_zeros(shape).scatter_reduce(2, at, self.keys, how, include_self=False)

    def ranked(self, scores: Tensor) -> Tensor:
        """Scores (B,H,S) of slots by those of their pages (B,H,pages); of a page, the newest tokens come first."""
        if self.together:  # the mean of ranks would have ties
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        rank = scores.masked_fill(~self.there, -torch.inf).argsort(-1).argsort(-1).gather(2, self.of)
        return (rank * self.size + self.positions.clamp_min(0) % self.size).double()


@register_select("quest")
@dataclass(frozen=True)
class Quest(Select):
    """Slots of the pages with the greatest bound Σ_d max(q_d·least_d, q_d·greatest_d) on q·k, least and greatest over
    the keys of a page (arXiv 2406.10774, §3.2); of the queries of a KV head the largest bound counts.

    page: tokens of a page, by position. A comparison: the bounds are made of the stored keys for every token, so its
    choice and its count of bytes are Quest's, and its time is not.
    """

    page: Size = 16

    def scores(self, asked: Asked) -> Tensor:
        pages = Pages(asked, self.page)
        low, high = pages.reduced("amin"), pages.reduced("amax")
        bound = pages.query.clamp_min(0) @ high.mT + pages.query.clamp_max(0) @ low.mT
        return pages.ranked(bound.amax(2))

    def glance_bytes(self, codec: Codec, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> float:
        return heads * 2 * key_dim * dtype.itemsize / self.page


@register_select("landmarks")
@dataclass(frozen=True)
class Landmarks(Select):
    """Slots of the pages whose mean key has the greatest attention, as ShadowKV (arXiv 2410.21465, §4), which holds
    keys in low rank: codec 'sals'.

    page: tokens of a page, by position. A comparison, as 'quest': the means are made anew for every token.
    """

    page: Size = 8

    def scores(self, asked: Asked) -> Tensor:
        pages = Pages(asked, self.page)
        logits = pages.query @ pages.reduced("mean").mT * asked.scaling
        return pages.ranked(logits.masked_fill(~pages.there[:, :, None], -torch.inf).softmax(-1).sum(2))

    def glance_bytes(self, codec: Codec, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> float:
        return heads * key_dim * dtype.itemsize / self.page
