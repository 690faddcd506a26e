"""Static store: fixed buffers at fixed addresses, so that decode compiles to one graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.options import Size
from keepkv.core.slots import EMPTY, Slots
from keepkv.errors import CacheStateError
from keepkv.store.base import NO_STATS, Held, SlotBytes, Store, register_store
from keepkv.store.dense import DenseStore


@register_store("static")
class StaticStore(Store):
    """Grows like ``DenseStore`` while a prompt is read; from the first one-token forward on, slots lie in buffers of
    ``capacity`` columns that are written at a cursor tensor and never move, compressions included.

    capacity: slots per KV head that decode may need at once: budget, tokens between compressions, and for a
    schedule without decode compression every token to be generated.
    """

    compileable: ClassVar[bool] = True
    encodes: ClassVar[bool] = False  # tokens are written one by one inside a compiled graph
    views_share_memory = True

    def __init__(self, held: Held, capacity: Size = 4096) -> None:
        super().__init__(held)
        self.capacity = capacity
        self.growing: DenseStore | None = DenseStore(held)  # while a prompt is read
        self.fields: dict[str, Tensor] = {}
        self.cursor = torch.zeros(1, dtype=torch.int64)
        self._used = 0  # host copy of the cursor, kept outside of the graph
        self._appended = 0
        self._given_up = False  # its buffers are being written for a successor

    def successor(self) -> Store:
        twin = StaticStore(self.held, self.capacity)
        if self.fields:
            twin.growing, twin.fields, twin.cursor = None, self.fields, self.cursor
            self._given_up = self.growing is None
        return twin

    def empty(self, held: Held | None = None) -> Store:
        return StaticStore(held or self.held, self.capacity)

    @property
    def static_length(self) -> int | None:
        return self.capacity

    @property
    def length(self) -> int:
        return self._used if self.growing is None else self.growing.length

    @property
    def appended(self) -> int:
        return self._appended

    @property
    def holds_all(self) -> bool:
        return self.growing is not None

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, stats: Mapping[str, Tensor] = NO_STATS) -> None:
        t = keys.shape[2]
        if t == 1 and self.growing is None:
            # The traced path: no Python integer of the store is read.
            self.fields["keys"].index_copy_(2, self.cursor, keys)
            self.fields["values"].index_copy_(2, self.cursor, values)
            new = positions[:, None].expand(*keys.shape[:2], 1).to(torch.int32)
            self.fields["positions"].index_copy_(2, self.cursor, new)
            for name, x in stats.items():
                self.fields[name].index_copy_(2, self.cursor, x)
            self.cursor += 1
            return
        if self.growing is None:  # a new turn: the prompt is read into growing buffers again
            slots, appended = self.view(), self._appended
            self.growing = DenseStore(self.held)
            self.growing.load(slots.map(torch.clone))
            self._appended = appended
        self.growing.append(keys, values, positions, stats)
        self._appended += t

    def begin_decode(self) -> None:
        self._check()
        if self.growing is not None and self.growing.recent.fields:
            slots = self.growing.view()
            self.growing = None
            self._write(slots)
        elif self.growing is not None:
            return
        if self._used >= self.capacity:
            raise CacheStateError(
                f"the static store holds {self.capacity} slots per head and all are in use. Give it more with "
                f"store_options={{'capacity': N}}, compress while decoding (When(every=…)), or use store='dense'."
            )
        self._used += 1
        self._appended += 1

    def _write(self, slots: Slots) -> None:
        used = slots.positions.shape[2]
        if used > self.capacity:
            raise CacheStateError(
                f"{used} slots per head do not fit the static store's capacity of {self.capacity}. Give it more with "
                "store_options={'capacity': N}, or a smaller budget."
            )
        contents = {"keys": slots.keys, "values": slots.values, "positions": slots.positions}
        contents |= {"log_votes": slots.log_votes, **slots.stats}
        fits = self.fields and self.fields["positions"].shape[0] == slots.positions.shape[0]
        if not fits:
            for name, x in contents.items():
                self.fields[name] = x.new_zeros(*x.shape[:2], self.capacity, *x.shape[3:])
                torch._dynamo.mark_static_address(self.fields[name])
            self.cursor = torch.zeros(1, dtype=torch.int64, device=slots.keys.device)
            torch._dynamo.mark_static_address(self.cursor)
        for name, x in contents.items():
            self.fields[name][:, :, :used] = x
            self.fields[name][:, :, used:] = {"positions": EMPTY}.get(name, self.held.stats.get(name, 0.0))
        self.cursor.fill_(used)
        self._used = used

    def _check(self) -> None:
        if self._given_up:
            raise CacheStateError(
                "a compression was interrupted while it wrote into the static store's buffers; call cache.reset()"
            )

    def parts(self) -> Iterator[Part]:
        self._check()
        if self.growing is not None:
            yield from self.growing.parts()
        else:
            f = self.fields
            yield Part(f["keys"], f["values"], f["log_votes"], f["positions"])

    def load(self, slots: Slots) -> None:
        self._appended = 0
        b, _, used = slots.shape
        if self.growing is None and (b, True) != (self.fields["positions"].shape[0], used <= self.capacity):
            self.growing = DenseStore(self.held)  # until decode begins, which says what does not fit
        if self.growing is not None:
            self.growing.load(slots)
        else:
            self._write(slots)

    def view(self) -> Slots:
        self._check()
        if self.growing is not None:
            return self.growing.view()
        used = {name: x[:, :, : self._used] for name, x in self.fields.items()}
        stats = {name: used[name] for name in self.held.stats}
        return Slots(used["keys"], used["values"], used["log_votes"], used["positions"], stats)

    def live_view(self) -> Slots:
        if self.growing is not None:
            return self.growing.view()
        f = self.fields  # whole buffers: a slice of the used columns would be a new graph at every step
        return Slots(
            f["keys"], f["values"], f["log_votes"], f["positions"], {name: f[name] for name in self.held.stats}
        )

    def _bytes_of(self, keys: Tensor, values: Tensor) -> SlotBytes:
        sizes, heads = super()._bytes_of(keys, values), keys.shape[1]
        return sizes._replace(beside=heads * replace(self.held, votes=True).beside)  # the buffers have votes anyway

    def write_stats(self, stats: dict[str, Tensor]) -> None:
        if self.growing is not None:
            self.growing.write_stats(stats)
            return
        for name, x in stats.items():
            self.fields[name][:, :, : x.shape[2]].copy_(x)

    def index(self, rows: Tensor) -> None:
        if self.growing is not None:
            self.growing.index(rows)
        for name, x in self.fields.items():
            if len(rows) == x.shape[0]:
                x.copy_(x.index_select(0, rows))  # addresses stay
            else:
                self.fields[name] = x.index_select(0, rows)

    def join(self, other: Store) -> None:
        assert isinstance(other, StaticStore)
        both = DenseStore(self.held)
        both.load(self.view())
        theirs = DenseStore(self.held)
        theirs.load(other.view())
        both.join(theirs)
        self.growing, self.fields, self._appended = both, {}, 0  # decode moves them into buffers of their own

    def crop(self, tokens: int) -> None:
        if self.growing is not None:
            self.growing.crop(tokens)
        else:
            self._used -= tokens
            self.cursor -= tokens
            self.fields["positions"][:, :, self._used :] = EMPTY
        self._appended -= tokens

    def hide(self, first: Tensor) -> None:
        if self.growing is not None:
            self.growing.hide(first)
        else:
            at = self.fields["positions"]
            at.masked_fill_(at >= first[:, None, None], EMPTY)

    def tensors(self) -> dict[str, Tensor]:
        if self.growing is not None:
            return {f"growing.{name}": x for name, x in self.growing.tensors().items()} | self._counts()
        return {**self.fields, "cursor": self.cursor} | self._counts()

    def _counts(self) -> dict[str, Tensor]:
        return {"appended": torch.tensor([self._appended])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._appended = int(tensors["appended"][0])
        growing = {name[8:]: x for name, x in tensors.items() if name.startswith("growing.")}
        if growing or "cursor" not in tensors:
            self.growing = DenseStore(self.held)
            if growing:
                self.growing.restore(growing)
            return
        self.growing = None
        self.cursor, self._used = tensors["cursor"], int(tensors["cursor"][0])
        self.fields = {name: x for name, x in tensors.items() if name not in ("cursor", "appended")}
        self.capacity = self.fields["positions"].shape[2]
