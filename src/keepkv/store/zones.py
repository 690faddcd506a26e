"""What the dense and the ragged store share: exact tokens behind encoded ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.slots import Slots
from keepkv.store.base import Held, SlotBytes, Store
from keepkv.store.columns import Columns

TILE_BYTES = 8 << 20  # decoded at once for attention
SLACK = 8  # columns allocated beyond need when a single token does not fit, or 1/16 of the length if more


class Zones(Store):
    """Slots in zones, oldest first; the last, ``recent``, grows by every token and is never encoded.

    With a codec, ``coded`` stands before it: tokens move there so many at a time, at the end of a multi-token forward
    and while decoding; ``Codec.recent`` to twice that stay exact.
    """

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        starts = dict(held.stats)
        self.coded = Columns(starts)
        self.recent = Columns(starts)
        self._appended = 0

    # --- lengths -------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self.coded.length + self.recent.length

    @property
    def lengths(self) -> Tensor:
        zones = [zone for zone in (self.coded, self.recent) if zone.length] or [self.recent]
        return torch.stack([(zone.used()["positions"] >= 0).sum(-1) for zone in zones]).sum(0)

    @property
    def appended(self) -> int:
        return min(self._appended, self.recent.length)

    @property
    def holds_all(self) -> bool:
        return self.length == self.recent.length

    @property
    def views_share_memory(self) -> bool:
        return self.holds_all

    # --- tokens --------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        b, h, t, _ = keys.shape
        new = {"keys": keys, "values": values, "positions": positions[:, None].expand(b, h, t).to(torch.int32)}
        if not self.recent.fields:
            for name, start in self.held.stats.items():
                new[name] = torch.full((b, h, t), start, dtype=torch.float32, device=keys.device)
        self._appended += t
        self.recent.add(new, self._ahead(self.recent) if t == 1 else 0)

    def after_prefill(self) -> None:
        exact = self.held.codec.exact
        if exact is not None and self.recent.length > exact:
            self._encode(self.recent.length - exact)

    def begin_decode(self) -> None:
        exact = self.held.codec.exact
        if exact is not None and self.recent.length >= 2 * exact:
            self._encode(exact)

    def _encode(self, columns: int) -> None:
        """Move the oldest ``columns`` of ``recent`` into ``coded``."""
        taken = self._written(self.recent.take_oldest(columns))
        self.coded.add(taken, self._ahead(self.coded) if self.held.room is None else 0)

    def _ahead(self, zone: Columns) -> int:
        """Columns to allocate beyond need where a token does not fit: up to the next load, if that is known."""
        slack = max(SLACK, zone.length // 16)
        return slack if self.held.room is None else min(slack, -self._appended % self.held.room)

    def crop(self, tokens: int) -> None:
        self.recent.crop(tokens)
        self._appended -= tokens

    def hide(self, first: Tensor) -> None:
        self.coded.hide(first)
        self.recent.hide(first)

    # --- slots ---------------------------------------------------------------------------------------------------

    def _written(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys and values of ``fields`` as the codec writes them, the rest as it is."""
        rest = {name: x for name, x in fields.items() if name not in ("keys", "values")}
        return {**self.held.codec.encode(fields["keys"], fields["values"]), **rest}

    def _slots(self, fields: dict[str, Tensor], encoded: bool = True) -> Slots:
        """A rectangle of fields as slots."""
        keys, values = self.held.codec.decode(fields) if encoded else (fields["keys"], fields["values"])
        votes = fields.get("log_votes")
        if votes is None:
            votes = torch.zeros(fields["positions"].shape, dtype=torch.float32, device=keys.device)
        return Slots(keys, values, votes, fields["positions"], {name: fields[name] for name in self.held.stats})

    def parts(self) -> Iterator[Part]:
        yield from self._older_parts()
        if self.recent.length:
            used = self.recent.used()
            yield Part(used["keys"], used["values"], used.get("log_votes"), used["positions"])

    def _older_parts(self) -> Iterator[Part]:
        """What stands before ``recent``, decoded a tile at a time."""
        step = self._tile() if self.coded.length else 1
        for start in range(0, self.coded.length, step):
            yield self._part({name: x[:, :, start : start + step] for name, x in self.coded.used().items()})

    def slot_bytes(self) -> SlotBytes:
        if self.recent.fields:
            fields = self.recent.fields
            return self._bytes_of(fields["keys"], fields["values"], fields["positions"].shape[1])
        one = self._one()
        return self._bytes_of(*self.held.codec.decode(one), one["positions"].shape[1])

    def _one(self) -> dict[str, Tensor]:
        """One encoded slot of each head of a row, (1,H,1,…)."""
        return {name: x[:1, :, :1] for name, x in self.coded.fields.items()}

    def _tile(self) -> int:
        """Columns that are decoded at once."""
        return max(1, TILE_BYTES // (self._rows * self.slot_bytes().plain))

    def _part(self, fields: dict[str, Tensor]) -> Part:
        keys, values = self.held.codec.decode(fields)
        return Part(keys, values, fields.get("log_votes"), fields["positions"])

    def view(self) -> Slots:
        zones = [self._slots(fields) for fields in self._older()]
        if self.recent.length or not zones:
            zones.append(self._slots(self.recent.used(), encoded=False))
        return reduce(Slots.join, zones)

    def _older(self) -> list[dict[str, Tensor]]:
        """What stands before ``recent`` as rectangles of encoded fields (B,H,S,…)."""
        return [self.coded.used()] if self.coded.length else []

    def load(self, slots: Slots) -> None:
        fields = fields_of(slots)
        self.coded, self.recent = Columns(self.coded.starts), Columns(self.recent.starts)
        if self.held.codec.exact is None:
            self.recent.set(fields)
        else:
            self.coded.set(self._written(fields))
        self._appended = 0

    def write_stats(self, stats: dict[str, Tensor]) -> None:
        start = self.length - self.recent.length - self.coded.length
        for zone in (self.coded, self.recent):
            for name, x in stats.items() if zone.length else ():
                zone.fields[name][:, :, : zone.length] = x[:, :, start : start + zone.length]
            start += zone.length

    # --- rows ----------------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        zone = self.recent if self.recent.fields else self.coded
        return zone.fields["positions"].shape[0]

    def index(self, rows: Tensor) -> None:
        self.coded.index(rows)
        self.recent.index(rows)

    def join(self, other: Store) -> None:
        assert isinstance(other, Zones)
        rows = (self._rows, other._rows)
        self.coded.join(other.coded, rows)
        self.recent.join(other.recent, rows)
        self._appended = min(self.appended, other.appended)


def fields_of(slots: Slots) -> dict[str, Tensor]:
    """The fields of ``slots``; votes only where a slot has any."""
    fields = {"keys": slots.keys, "values": slots.values, "positions": slots.positions, **slots.stats}
    return {**fields, "log_votes": slots.log_votes} if bool(slots.log_votes.any()) else fields
