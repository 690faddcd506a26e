"""Selection by attention itself: by all that is stored of every key, or by the least that tells."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keepkv.errors import KeepKVError
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
        return asked.masses(asked.slots.logits(asked.query, asked.scaling, asked.softcap, glance=True))

    def check_codec(self, codec: Codec) -> None:
        if codec.exact is None:
            raise KeepKVError(
                "select='codes' chooses by the codes of keys, and codec='none' has none: give a codec such as 'int4', "
                "or select='exact'"
            )
