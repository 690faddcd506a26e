"""Ragged store: each (row, head) has its own length, and nothing is allocated beyond it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.slots import Slots
from keepkv.kernels.decode.tiles import reads_in_tiles
from keepkv.kernels.segments import TILE
from keepkv.store.base import SlotBytes, Store, register_store
from keepkv.store.codec.base import Fields
from keepkv.store.columns import Columns
from keepkv.store.fields import fields_of
from keepkv.store.older import Zone
from keepkv.store.ragged_fields import RaggedFields
from keepkv.store.zones import Zones

SEGMENT = 16  # bytes of a head: where it begins and its length
SHARED = 3 * TILE * 9  # of a head: the tiles that it shares with others, where slots are read in tiles


@register_store("ragged")
class RaggedStore(Zones):
    """What ``load`` writes lies in segments, encoded where there is a codec; tokens appended since lie in rectangles,
    since every head gets one slot per token."""

    ragged: ClassVar[bool] = True

    @cached_property
    def body(self) -> RaggedFields:
        """The segments."""
        return RaggedFields()

    @property
    def length(self) -> int:
        return self.body.length + super().length

    @property
    def lengths(self) -> Tensor:
        if self.body.lengths is None:
            return super().lengths
        return self.body.lengths + super().lengths if self.length > self.body.length else self.body.lengths

    @property
    def holds_all(self) -> bool:
        return self.body.lengths is None and super().holds_all

    def _older_positions(self) -> list[Tensor]:
        return ([self.body.positions()] if self.body.length else []) + super()._older_positions()

    def _older(self) -> list[Fields]:
        return ([self.body.rectangle()] if self.body.length else []) + super()._older()

    def _older_parts(self) -> Iterator[Part]:
        if self.body.length and self.held.codec.exact is None:
            f = self.body.fields
            yield Part(f["keys"], f["values"], f.get("log_votes"), f["positions"], self.body.segments)
        elif self.body.length and (packed := self.held.codec.packed(self.body.fields)) is not None:
            f = self.body.fields
            like, shift = self.held.codec.like(f), self.held.codec.shift(self.content.shared)
            yield Part(*packed, f.get("log_votes"), f["positions"], self.body.segments, like, shift)
        elif self.body.length:
            step = self._tile()
            for start in range(0, self.body.length, step):
                yield self._part(self.body.rectangle(start, start + step))
        yield from super()._older_parts()

    def _zones(self) -> list[Zone]:
        body = self.body
        return ([Zone(body.length, body.rectangle, body.at)] if body.length else []) + super()._zones()

    def _one(self) -> Fields:
        return self.body.rectangle(0, 1) if self.body.length else super()._one()

    def _bytes_of(self, keys: Tensor, values: Tensor) -> SlotBytes:
        sizes, heads = super()._bytes_of(keys, values), keys.shape[1]
        # Which slots of a tile are its head's.
        return sizes._replace(beside=sizes.beside + 2 * heads) if self._has_tiles(keys, values) else sizes

    @property
    def row_bytes(self) -> int:
        return self._heads * (SEGMENT + SHARED * self._has_tiles(*self.like())) + self.shared_bytes

    def _has_tiles(self, keys: Tensor, values: Tensor) -> bool:
        """Whether slots like these are read in tiles: what is encoded never is."""
        return self.held.codec.exact is None and reads_in_tiles(keys, values)

    @property
    def _heads(self) -> int:
        if self.body.lengths is not None:
            return self.body.lengths.shape[1]
        return (self.recent.fields or self.coded.fields)["positions"].shape[1]

    def load_kept(self, slots: Slots, keep: Tensor) -> None:
        if self.content.exact:  # no rectangle in between
            self._hold_kept(fields_of(slots), keep, {})
        else:
            super().load_kept(slots, keep)

    def _hold(self, fields: Fields, newest: Fields) -> None:
        self._hold_kept(fields, fields["positions"] >= 0, newest)

    def _hold_kept(self, fields: Fields, keep: Tensor, newest: Fields) -> None:
        where = keep.flatten().nonzero()[:, 0]  # once, as the host waits for it
        kept = {name: x.flatten(0, 2).index_select(0, where) for name, x in fields.items()}
        self.body.set(kept, keep.sum(-1))
        self.coded, self.recent = Columns(self.coded.starts), Columns(self.recent.starts)
        if newest:
            self.recent.set(newest)
        self._appended = 0

    def write_stats(self, stats: dict[str, Tensor]) -> None:
        if self.body.length:
            start = self.pinned.length
            self.body.put({name: x[:, :, start : start + self.body.length] for name, x in stats.items()})
        super().write_stats(stats)

    @property
    def _rows(self) -> int:
        return super()._rows if self.body.lengths is None else len(self.body.lengths)

    def index(self, rows: Tensor) -> None:
        self.body.index(rows)
        super().index(rows)

    def join(self, other: Store) -> None:
        """As ``Store.join``; everything moves into segments, so that no empty column is held for a shorter row."""
        assert isinstance(other, RaggedStore)
        mine, theirs, rows = self._in_segments(), other._in_segments(), (self._rows, other._rows)
        mine.body.join(theirs.body)
        mine.content.join(theirs.content, rows)
        mine.pinned.join(theirs.pinned, rows)
        mine.recent.join(theirs.recent, rows)
        self.body, self.content, self.pinned, self.recent = mine.body, mine.content, mine.pinned, mine.recent
        self.coded = Columns(self.coded.starts)  # empty, for fewer rows
        self._appended = 0

    def _in_segments(self) -> RaggedStore:
        """This store, or one that holds its slots in segments alone."""
        if self.length == self.pinned.length + self.body.length and self.body.lengths is not None:
            return self
        twin, slots = self.successor(), self.view()
        assert isinstance(twin, RaggedStore)
        twin.load_kept(slots, slots.valid)
        return twin

    def tensors(self) -> dict[str, Tensor]:
        named = {f"body.{name}": x for name, x in self.body.tensors().items()}
        named |= {f"pinned.{name}": x for name, x in self.pinned.tensors().items()}
        named |= {f"coded.{name}": x for name, x in self.coded.tensors().items()}
        named |= {f"tail.{name}": x for name, x in self.recent.tensors().items()} | self.content.tensors()
        encodes = self.held.codec.exact is not None  # otherwise all that lies in the tail was appended
        return {**named, "appended": torch.tensor([self._appended])} if named and encodes else named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        found: dict[str, Fields] = {"body": {}, "pinned": {}, "coded": {}, "tail": {}, "shared": {}}
        for name, x in tensors.items():
            zone, _, rest = name.partition(".")
            if rest:
                found[zone][rest] = x
        self.body = RaggedFields()
        if found["body"]:
            self.body.restore(found["body"])
        self.pinned.restore(found["pinned"])
        self.coded.restore(found["coded"])
        self.recent.restore(found["tail"])
        self.content.restore(tensors)
        self._appended = int(tensors["appended"][0]) if "appended" in tensors else self.recent.length
