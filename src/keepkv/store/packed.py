"""Packed store: int8 with one scale per slot for the bulk, full precision for the most recent tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.slots import Slots
from keepkv.store.base import STORES, Store, filled
from keepkv.store.dense import DenseStore

TILE_BYTES = 8 << 20  # dequantised at once for attention
RESIDUAL = 32  # most recent tokens kept in full precision, at least


@STORES.register("int8")
class Int8Store(Store):
    """Keys and values of older slots as int8 with a symmetric per-slot scale (absmax / 127).

    Attention dequantises tile by tile. Tokens are packed when a compression writes them, at the end of a
    multi-token forward, and in blocks of ``RESIDUAL`` while decoding; ``RESIDUAL`` to twice that stay exact.
    """

    lossy = True

    def __init__(self, stats: dict[str, float]) -> None:
        super().__init__(stats)
        self.body: dict[str, Tensor] = {}  # fields (B,H,S,…): keys, values int8; keys_scale, values_scale; …
        self.recent = DenseStore(stats)
        self._tail = 0

    @property
    def _packed(self) -> int:
        return self.body["positions"].shape[2] if self.body else 0

    @property
    def length(self) -> int:
        return self._packed + self.recent.length

    @property
    def tail(self) -> int:
        return min(self._tail, self.recent.length)

    @property
    def is_plain(self) -> bool:
        return not self.body

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.recent.append(keys, values, positions)
        self._tail += keys.shape[2]

    def settle(self) -> None:
        if self.recent.length > RESIDUAL:
            self._pack(self.recent.length - RESIDUAL)

    def begin_decode(self) -> None:
        if self.recent.length >= 2 * RESIDUAL:
            self._pack(RESIDUAL)

    def _pack(self, columns: int) -> None:
        """Move the oldest ``columns`` of the residual into the packed body."""
        view = self.recent.view()
        new = view.map(lambda x: x[:, :, columns:].clone())
        packed = _quantise(view.map(lambda x: x[:, :, :columns].clone()))
        if self.body:
            votes = {"log_votes"} & (packed.keys() ^ self.body.keys())
            for fields in (self.body, packed):
                for name in votes - fields.keys():
                    fields[name] = filled(fields["keys"], tuple(fields["positions"].shape), 0.0, torch.float32)
            packed = {name: torch.cat((self.body[name], x), dim=2) for name, x in packed.items()}
        self.body = packed
        self.recent.load(new)

    def _dequantised(self, columns: slice) -> Part:
        body = {name: x[:, :, columns] for name, x in self.body.items()}
        keys = body["keys"].to(body["keys_scale"].dtype) * body["keys_scale"]
        values = body["values"].to(body["values_scale"].dtype) * body["values_scale"]
        return Part(keys, values, body.get("log_votes"), body["positions"])

    def _tile(self) -> int:
        """Columns that are dequantised at once."""
        if not self.body:
            return 1
        keys, values, scale = self.body["keys"], self.body["values"], self.body["keys_scale"]
        column = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3]) * scale.element_size()
        return max(1, TILE_BYTES // column)

    def parts(self) -> Iterator[Part]:
        tile = self._tile()
        for start in range(0, self._packed, tile):
            yield self._dequantised(slice(start, start + tile))
        if self.recent.length:
            yield from self.recent.parts()

    def load(self, slots: Slots) -> None:
        self.body, self.recent, self._tail = {}, DenseStore(self.stats), 0
        self.recent.load(slots)
        self.settle()

    def view(self) -> Slots:
        tail = self.recent.view() if self.recent.length else None
        if not self.body:
            assert tail is not None
            return tail
        part = self._dequantised(slice(None))
        votes = part.log_votes
        if votes is None:
            votes = filled(part.keys, tuple(part.positions.shape), 0.0, torch.float32)
        body = Slots(part.keys, part.values, votes, part.positions, {n: self.body[n] for n in self.stats})
        return body if tail is None else body.join(tail)

    def put(self, stats: dict[str, Tensor]) -> None:
        for name, x in stats.items():
            if self.body:
                self.body[name].copy_(x[:, :, : self._packed])
        if self.recent.length:
            self.recent.put({name: x[:, :, self._packed :] for name, x in stats.items()})

    def index(self, rows: Tensor) -> None:
        self.body = {name: x.index_select(0, rows) for name, x in self.body.items()}
        self.recent.index(rows)

    def crop(self, tokens: int) -> None:
        self.recent.crop(tokens)
        self._tail -= tokens

    def tensors(self) -> dict[str, Tensor]:
        body = {f"body.{name}": x for name, x in self.body.items()}
        tail = {f"tail.{name}": x for name, x in self.recent.tensors().items()}
        return {**body, **tail, "appended": torch.tensor([self._tail])} if body or tail else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._tail = int(tensors["appended"][0])
        self.body = {name[5:]: x for name, x in tensors.items() if name.startswith("body.")}
        self.recent = DenseStore(self.stats)
        if tail := {name[5:]: x for name, x in tensors.items() if name.startswith("tail.")}:
            self.recent.restore(tail)


def _quantise(slots: Slots) -> dict[str, Tensor]:
    fields: dict[str, Tensor] = {"positions": slots.positions, **slots.stats}
    if bool(slots.log_votes.any()):
        fields["log_votes"] = slots.log_votes
    for name, x in (("keys", slots.keys), ("values", slots.values)):
        scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(torch.finfo(torch.float16).tiny)
        fields[name] = (x.float() / scale).round_().to(torch.int8)
        fields[f"{name}_scale"] = scale.to(x.dtype)
    return fields
