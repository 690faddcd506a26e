"""Selection by attention itself: by all that is stored of every key, or by the least that tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.kernels.packed import decode_packed
from keepkv.select.base import Asked, Select, register_select
from keepkv.store.codec.base import Codec


@register_select("exact")
@dataclass(frozen=True)
class Exact(Select):
    """The slots that attention over everything would weigh most, for each KV head: it reads every key as it is stored,
    and is what others are compared with."""

    def scores(self, asked: Asked) -> Tensor:
        return asked.masses(asked.slots.logits(asked.query, asked.scaling, asked.softcap))


@register_select("codes")
@dataclass(frozen=True)
class FromCodes(Select):
    """The slots of the greatest attention by the codes of their keys, with RoPE, for each KV head; with codec 'sals',
    by the leading coordinates of its latents, rebuilt and rotated. No value is read but of those that are attended."""

    def scores(self, asked: Asked) -> Tensor:
        codec, fields = asked.slots.content.codec, [zone.tile(0, zone.length) for zone in asked.slots.zones]
        packed = [codec.packed(x) for x in fields]
        capped = asked.softcap is not None and codec.shift(asked.slots.content.shared) is not None
        if capped or any(x is None for x in packed):
            return asked.masses(asked.slots.logits(asked.query, asked.scaling, asked.softcap, glance=True))
        # One pass over the codes, where they lie. Its output is of no use: the keys stand for values, too.
        found = [
            decode_packed(
                asked.query, x[0], x[0], held.get("log_votes"), held["positions"], scaling=asked.scaling,
                softcap=asked.softcap, weights=True,
            )
            for x, held in zip(packed, fields, strict=True) if x is not None
        ]  # fmt: skip
        shares = torch.stack([one.lse for one in found]).softmax(0).nan_to_num_(0.0)
        parts = [one.weights for one in found if one.weights is not None]
        return torch.cat([w.mul(p.view(*w.shape[:3], 1)).sum(2) for w, p in zip(parts, shares, strict=True)], -1)

    def check_codec(self, codec: Codec) -> None:
        if codec.exact is None:
            raise KeepKVError(
                "select='codes' chooses by the codes of keys, and codec='none' has none: give a codec such as 'int4', "
                "or select='exact'"
            )
