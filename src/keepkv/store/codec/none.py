"""No codec: slots are held as the model made them."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from keepkv.store.codec.base import Codec, Fields, register_codec


@register_codec("none")
class Plain(Codec):
    """Keys and values in the model's dtype."""

    exact: ClassVar[int | None] = None

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        return {"keys": keys, "values": values}

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        return fields["keys"], fields["values"]
