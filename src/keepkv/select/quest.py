"""Selection by pages, as Quest (arXiv 2406.10774, §3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from keepkv.core.options import Size
from keepkv.select.base import Asked, Select, register_select
from keepkv.store.codec.base import Codec


@register_select("quest")
@dataclass(frozen=True)
class Quest(Select):
    """Slots of the pages with the greatest bound Σ_d max(q_d·least_d, q_d·greatest_d) on q·k, least and greatest over
    the keys of a page; of the queries of a KV head the largest bound counts.

    page: tokens of a page, by position. A comparison: the bounds are made of the stored keys for every token, so its
    choice and its count of bytes are Quest's, and its time is not.
    """

    page: Size = 16

    def scores(self, asked: Asked) -> Tensor:
        positions, (b, h) = asked.slots.positions, asked.slots.positions.shape[:2]
        wide = torch.promote_types(asked.query.dtype, torch.float32)
        keys = torch.cat([cast(Tensor, x) for x in asked.slots.keys()], 2).to(wide)
        pages = int(asked.seen.max()) // self.page + 2
        # Empty slots belong to the last page, where nothing else is.
        of = torch.where(positions >= 0, positions.long() // self.page, pages - 1)
        at = of[..., None].expand_as(keys)
        least, most = (
            keys.new_full((b, h, pages, keys.shape[-1]), start).scatter_reduce(2, at, keys, how)
            for start, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
        )
        query = asked.query.to(wide).view(b, h, -1, keys.shape[-1])
        none = least.isinf()
        low, high = least.masked_fill(none, 0), most.masked_fill(none, 0)
        bound = query.clamp_min(0) @ high.mT + query.clamp_max(0) @ low.mT
        rank = bound.amax(2).argsort(-1).argsort(-1).gather(2, of)
        return (rank * self.page + positions.clamp_min(0) % self.page).double()  # of a page, the newest tokens first

    def glance_bytes(self, codec: Codec, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> float:
        return heads * 2 * key_dim * dtype.itemsize / self.page
