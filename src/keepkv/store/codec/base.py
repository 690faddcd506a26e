"""The codec: how the content of a slot is written. Only codecs know a number format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from keepkv.core.layer_info import LayerInfo
from keepkv.core.registry import Registry

Fields = dict[str, Tensor]  # one entry per slot in each: (…,S,·), any leading dimensions


class Codec:
    """Writes keys and values as fields, and reads them back.

    A field has one entry per slot, so a layout can move, drop and repeat slots without reading them. A codec has no
    state; its options are attributes that ``__init__`` sets.
    """

    exact: ClassVar[int | None] = 32
    """Newest tokens that stay exact while tokens are appended, at least; they are encoded so many at a time. None:
    nothing is ever encoded."""

    needs_calibration: ClassVar[str | None] = None  # the kind of calibration that ``for_layer`` must be given

    def for_layer(self, layer: LayerInfo, calibration: Mapping[str, Tensor] | None) -> Codec:
        """The codec of one layer: this one, unless it depends on it or on its ``calibration``, tensors by name."""
        return self

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        """Fields of keys (…,S,D) and values (…,S,Dv), without "positions", "log_votes" and names of statistics."""
        raise TypeError(f"{type(self).__name__} must implement encode(keys, values) -> fields")

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Keys (…,S,D) and values (…,S,Dv) of what ``encode`` returned, in the dtype that was given there."""
        raise TypeError(f"{type(self).__name__} must implement decode(fields) -> keys, values")

    def slot_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the content of one slot of one head."""
        fields = self.encode(torch.zeros(1, key_dim, dtype=dtype), torch.zeros(1, value_dim, dtype=dtype))
        return sum(x.numel() * x.element_size() for x in fields.values())


CODECS: Registry[Codec] = Registry("codec")


def register_codec(name: str, *, replace: bool = False) -> Callable[[Any], Any]:
    """Register a ``Codec`` subclass under ``name``; its options are the keywords of its ``__init__``.
    ``replace`` takes the place of another one.

    >>> @register_codec("half")
    ... class Half(Codec):
    ...     def encode(self, keys, values):
    ...         return {"keys": keys.half(), "values": values.half(), "like": keys[..., :0]}
    ...     def decode(self, fields):
    ...         return fields["keys"].to(fields["like"].dtype), fields["values"].to(fields["like"].dtype)
    """
    return CODECS.register(name, replace=replace)
