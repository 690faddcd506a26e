"""The codec: how the content of a slot is written. Only codecs know a number format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from keepkv.core.layer_info import LayerInfo
from keepkv.core.registry import Registry
from keepkv.kernels.codes import Codes

Fields = dict[str, Tensor]  # one entry per slot in each: (…,S,·), any leading dimensions


class Codec:
    """Writes keys and values as fields, and reads them back.

    A field has one entry per slot, so a layout can move, drop and repeat slots without reading them. Most codecs
    implement ``encode`` and ``decode``. A codec has no state; its options are attributes that ``__init__`` sets.

    Where slots of a head have something in common, such as the mean of its keys, a codec implements ``write`` and
    ``read``: they are given ``shared``, tensors (B,H,N,·) by name, that belong to the rows and not to a slot.
    """

    exact: ClassVar[int | None] = 32
    """Newest tokens that stay exact while tokens are appended, at least; they are encoded so many at a time. None:
    nothing is ever encoded."""

    unrotated: bool = False  # keys are given, and returned, as they are before the rotary embedding
    together: ClassVar[bool] = False  # codes of one token belong together: every head must hold the same tokens
    selectable: ClassVar[bool] = True  # decoded tokens may attend to some of the slots only, where that is asked for
    meets_queries: ClassVar[bool] = False  # ``meet`` is shown the queries of a prompt before its slots are written
    grouped: ClassVar[int] = 0  # tokens in a row that share content which stays while one of them does; 0: none do
    needs_calibration: ClassVar[str | None] = None  # the kind of calibration that ``for_layer`` must be given

    def for_layer(self, layer: LayerInfo, calibration: Mapping[str, Tensor] | None) -> Codec:
        """The codec of one layer: this one, unless it depends on it or on its ``calibration``, tensors by name."""
        return self

    def for_heads(self, count: int) -> Codec:
        """A codec of one layer as it were for ``count`` KV heads: what it writes has the same sizes, other numbers."""
        return self

    # --- content -------------------------------------------------------------------------------------------------

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        """Fields of keys (…,S,D) and values (…,S,Dv), without "positions", "log_votes" and names of statistics."""
        raise TypeError(f"{type(self).__name__} must implement encode(keys, values) -> fields")

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """Keys (…,S,D) and values (…,S,Dv) of what ``encode`` returned, in the dtype that was given there."""
        raise TypeError(f"{type(self).__name__} must implement decode(fields) -> keys, values")

    def packed(self, fields: Fields) -> tuple[Codes, Codes] | None:
        """Keys and values of ``fields`` as codes that attention reads where they lie; None where it must ``read``."""
        return None

    def like(self, fields: Fields) -> Tensor:
        """An empty tensor in the dtype that ``packed`` keys and values stand for: a field of that name."""
        return fields["like"]

    def glance(self, fields: Fields, shared: Fields) -> Tensor | Codes:
        """Keys (B,H,S,D) as ``read`` returns them, or less exact and cheaper: what selection may rank slots by."""
        codes = self.packed(fields)
        return self.read(fields, shared)[0] if codes is None or self.shift(shared) is not None else codes[0]

    # --- content beside what slots share -------------------------------------------------------------------------

    def meet(self, queries: Tensor, positions: Tensor, shared: Fields) -> Fields:
        """What is ``shared`` from now on: called with the queries (B,H,G,T,D) of a forward of more than one token,
        where ``meets_queries``; positions (B,T), ``EMPTY`` for padding."""
        return shared

    def learn(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> Fields:
        """What is ``shared`` from now on: called before slots are written, with the newest of them: keys (B,H,S,D),
        values (B,H,S,Dv), ``valid`` (B,H,S) bool. What was written before must still be read alike."""
        return shared

    def write(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> tuple[Fields, Fields]:
        """Fields (B,H,S,·) of keys (B,H,S,D) and values (B,H,S,Dv), and what is shared then. What lies in slots that
        are not ``valid`` (B,H,S) does not matter."""
        return self.encode(keys, values), shared

    def read(self, fields: Fields, shared: Fields) -> tuple[Tensor, Tensor]:
        """Keys (B,H,S,D) and values (B,H,S,Dv) of what ``write`` returned."""
        return self.decode(fields)

    def shift(self, shared: Fields) -> Tensor | None:
        """(B,H,D) float32: what every key of ``packed`` is less than the key that it stands for; None: nothing."""
        return None

    def prune(self, fields: Fields, valid: Tensor, shared: Fields) -> tuple[Fields, Fields]:
        """``fields`` (B,H,S,·), all that a layer holds, and ``shared`` without what none of them needs."""
        return fields, shared

    def check(self, fields: Fields, shared: Fields) -> None:
        """Raise ``ValueError`` where ``fields`` point to what is not in ``shared``: they come from a file."""

    # --- bytes ---------------------------------------------------------------------------------------------------

    def slot_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the content of one slot of one head."""
        return self.token_bytes(1, key_dim, value_dim, dtype)

    def token_bytes(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the content of one slot of every one of ``heads`` KV heads."""
        return sum(self._sizes(heads, key_dim, value_dim, dtype)[0].values())

    def glance_bytes(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes that ``glance`` reads of one slot of every one of ``heads`` KV heads."""
        fields = self._sizes(heads, key_dim, value_dim, dtype)[0]
        return sum(size for name, size in fields.items() if not name.startswith("values"))

    def group_bytes(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of what a group of tokens shares, of every one of ``heads`` KV heads."""
        return self.row_bytes(heads, key_dim, value_dim, dtype) if self.grouped else 0

    def row_bytes(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of what the slots of a row share, of one group where tokens share by groups."""
        return sum(self._sizes(heads, key_dim, value_dim, dtype)[1].values())

    def _sizes(
        self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of what ``blank`` returns, by name; found once, since a budget asks for them again and again."""
        known = self.__dict__.setdefault("_known_sizes", {})
        asked = (heads, key_dim, value_dim, dtype)
        if asked not in known:
            known[asked] = tuple({n: x.nbytes for n, x in one.items()} for one in self.blank(*asked))
        found: tuple[dict[str, int], dict[str, int]] = known[asked]
        return found

    def blank(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Fields, Fields]:
        """What one slot of zeros of each head is written as: fields (1,heads,1,·) and what is shared."""
        keys, values = (torch.zeros(1, heads, 1, width, dtype=dtype) for width in (key_dim, value_dim))
        valid = torch.ones(1, heads, 1, dtype=torch.bool)
        return self.write(keys, values, valid, self.learn(keys, values, valid, {}))


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
