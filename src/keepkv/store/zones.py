"""What the dense and the ragged store share: exact tokens behind encoded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.options import Count
from keepkv.core.slots import EMPTY, Slots
from keepkv.store.base import NO_STATS, Held, Room, Store
from keepkv.store.codec.base import Fields
from keepkv.store.columns import Columns
from keepkv.store.content import TILE_BYTES, Content, check_together, in_order, moved, unchanged
from keepkv.store.exact import Exact
from keepkv.store.fields import beside, chosen, exact_part, fields_of, within, zone_of
from keepkv.store.older import Older, Zone

COPIES = 6  # of a tile that are there at once while it is read, in float32: as codes, scaled, turned, rotated
SLACK = 8  # columns allocated beyond need when a single token does not fit, or 1/16 of the length if more


class Zones(Store):
    """Slots in zones, oldest first; the last, ``recent``, grows by every token and is never encoded.

    With a codec, ``coded`` stands before it: tokens move there so many at a time, at the end of a multi-token forward
    and while decoding; ``Codec.exact`` to twice that stay exact. What was encoded once is not encoded again: a
    ``successor`` takes its codes from the store before, where they are those of the same content.

    exact_first: tokens at the start of a row, attention sinks, that a codec leaves exact. exact_protected: whether it
    leaves those of protected spans. exact_last: newest tokens that it leaves exact, where that is more than
    ``Codec.exact``; at a compression, newest slots of each head. exact_merged: slots of each head that it leaves exact
    at a compression, those with most votes. All but the newest lie in ``pinned``, before the others. What was encoded
    is not exact any more, and stays a code.
    """

    def __init__(
        self,
        held: Held,
        exact_first: Count = 0,
        exact_last: Count = 0,
        exact_merged: Count = 0,
        exact_protected: bool = False,
    ) -> None:
        super().__init__(held)
        starts = dict(held.stats)
        self.stays = Exact(exact_first, exact_last, exact_merged, exact_protected)
        self.stays.check(held)
        self.pinned = Columns(starts)
        self.coded = Columns(starts)
        self.recent = Columns(starts)
        self.content = Content(held)
        self._before: Zones | None = None  # whose place it takes, until something is loaded
        self._appended = 0

    # --- lengths -------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self.pinned.length + self.coded.length + self.recent.length

    @property
    def lengths(self) -> Tensor:
        zones = [zone for zone in (self.pinned, self.coded, self.recent) if zone.length] or [self.recent]
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

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, stats: Mapping[str, Tensor] = NO_STATS) -> None:
        b, h, t, _ = keys.shape
        new = {"keys": keys, "values": values, "positions": positions[:, None].expand(b, h, t).to(torch.int32)}
        if not self.recent.fields:
            for name, start in self.held.stats.items():
                new[name] = torch.full((b, h, t), start, dtype=torch.float32, device=keys.device)
        new |= stats
        alone = t > 1 or not (self._appended or self.content.exact)  # the first one beside codes that were loaded
        self._appended += t
        self.recent.add(new, 0 if alone else self._ahead(self.recent))

    def room(self) -> Room | None:
        recent, elsewhere = self.recent, self.pinned.length + self.coded.length
        plain = self.held.codec.exact is None and not (self.held.stats or elsewhere)
        own = type(self).append is Zones.append and type(self).parts is Zones.parts  # what a layout changes must run
        if not (plain and own) or not 0 < recent.length < recent.capacity:
            return None
        return Room(recent, next(self._older_parts(), None))

    def wrote(self) -> None:
        self.recent.length += 1
        self._appended += 1

    def meet(self, queries: Tensor, positions: Tensor) -> None:
        grouped = queries.unflatten(1, (self.like()[0].shape[1], -1))
        self.content.shared = self.held.codec.meet(grouped, positions, self.content.shared)

    def after_prefill(self) -> None:
        exact = self.held.codec.exact
        if exact is not None and (more := self.recent.length - max(exact, self.stays.last)) > 0:
            self._encode(more)

    def begin_decode(self) -> None:
        exact = self.held.codec.exact
        if exact is not None and self.recent.length >= exact + max(exact, self.stays.last):
            self._encode(exact)

    def _encode(self, columns: int) -> None:
        """Move the oldest ``columns`` of ``recent`` into ``coded``, and what stays exact into ``pinned``."""
        taken = self.recent.take_oldest(columns)
        if self.stays.asked and bool((exact := self.stays.tokens(taken["positions"], self.held.protects)).any()):
            self.pinned.add(within(taken, exact), 0)
            taken["positions"] = taken["positions"].masked_fill(exact, EMPTY)
        self.coded.add(self._written(taken), self._ahead(self.coded) if self.held.room is None else 0)

    def _ahead(self, zone: Columns) -> int:
        """Columns to allocate beyond need where a token does not fit: up to the next load, if that is known."""
        slack = max(SLACK, zone.length // 16)
        return slack if self.held.room is None else min(slack, -self._appended % self.held.room)

    def crop(self, tokens: int) -> None:
        self.recent.crop(tokens)
        self._appended -= tokens

    def hide(self, first: Tensor) -> None:
        self.pinned.hide(first)
        self.coded.hide(first)
        self.recent.hide(first)

    # --- slots ---------------------------------------------------------------------------------------------------

    def _written(self, fields: Fields) -> Fields:
        """A rectangle of fields, its keys and values as the codec writes them, the rest as it is."""
        return {**self.content.write(fields["keys"], fields["values"], fields["positions"]), **beside(fields)}

    def _slots(self, fields: Fields, encoded: bool = True) -> Slots:
        """A rectangle of fields as slots."""
        keys, values = self.content.read(fields) if encoded else (fields["keys"], fields["values"])
        votes = fields.get("log_votes")
        if votes is None:
            votes = torch.zeros(fields["positions"].shape, dtype=torch.float32, device=keys.device)
        return Slots(keys, values, votes, fields["positions"], {name: fields[name] for name in self.held.stats})

    def parts(self) -> Iterator[Part]:
        if self.pinned.length:
            yield exact_part(self.pinned.used())
        yield from self._older_parts()
        if self.recent.length:
            yield exact_part(self.recent.used())

    def _older_parts(self) -> Iterator[Part]:
        """What stands before ``recent``, decoded a tile at a time."""
        if self.coded.length and (packed := self.held.codec.packed(self.coded.used())) is not None:
            used = self.coded.used()
            like, shift = self.held.codec.like(used), self.held.codec.shift(self.content.shared)
            yield Part(*packed, used.get("log_votes"), used["positions"], like=like, shift=shift)
            return
        step = self._tile() if self.coded.length else 1
        for start in range(0, self.coded.length, step):
            yield self._part({name: x[:, :, start : start + step] for name, x in self.coded.used().items()})

    @property
    def shared_bytes(self) -> int:
        none = self.content.exact or self.held.codec.grouped
        return 0 if none else self.held.codec.row_bytes(*self._widths())

    @property
    def exact_slots(self) -> tuple[int, int]:
        content, _, plain = self._bytes_of(*self.like()) if self.stays.slots else (0, 0, 0)
        return self.stays.slots, max(0, plain - content)

    def protected_bytes(self, tokens: Tensor) -> int:
        if not self.stays.protected:
            return 0
        content, beside, plain = self._bytes_of(*self.like())
        most, freed = int(tokens.max()), tokens if self.ragged else tokens.min().expand_as(tokens)
        return len(tokens) * most * (plain + beside) - int(freed.sum()) * (content + beside)

    @property
    def groups(self) -> tuple[int, int]:
        codec = self.held.codec
        return (codec.grouped, codec.group_bytes(*self._widths())) if codec.grouped else (0, 0)

    def _widths(self) -> tuple[int, int, int, torch.dtype]:
        keys, values = self.like()
        return keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype

    def like(self) -> tuple[Tensor, Tensor]:
        if self.recent.fields:
            return self.recent.fields["keys"], self.recent.fields["values"]
        return self.content.read(self._one())

    def _one(self) -> Fields:
        """One encoded slot of each head of a row, (1,H,1,…)."""
        return {name: x[:1, :, :1] for name, x in self.coded.fields.items()}

    selects = True

    def older(self, window: int) -> Older:
        zones, newest = self._zones(), self.recent.length
        if self.content.exact and newest > window:
            zones.append(zone_of({name: x[:, :, : newest - window] for name, x in self.recent.used().items()}))
            newest = window
        used = {name: x[:, :, self.recent.length - newest :] for name, x in self.recent.used().items()}
        always = [exact_part(self.pinned.used())] if self.pinned.length else []
        return Older(self.content, zones, [*always, *([exact_part(used)] if newest else [])])

    def _zones(self) -> list[Zone]:
        """What stands before ``recent``."""
        return [zone_of(self.coded.used())] if self.coded.length else []

    def _tile(self) -> int:
        """Columns that are decoded at once: with all that comes in between they take ``TILE_BYTES`` at most."""
        heads, *widths, dtype = self._widths()
        size = COPIES * torch.promote_types(dtype, torch.float32).itemsize
        return max(1, TILE_BYTES // (self._rows * heads * sum(widths) * size))

    def _part(self, fields: Fields) -> Part:
        keys, values = self.content.read(fields)
        return Part(keys, values, fields.get("log_votes"), fields["positions"])

    def view(self) -> Slots:
        rest = self._rest()
        return self._slots(self.pinned.used(), encoded=False).join(rest) if self.pinned.length else rest

    def _rest(self) -> Slots:
        """All slots but those of ``pinned``."""
        zones = [self._slots(fields) for fields in self._older()]
        if self.recent.length or not zones:
            zones.append(self._slots(self.recent.used(), encoded=False))
        return reduce(Slots.join, zones)

    def positions(self) -> Tensor:
        exact = [[zone.used()["positions"]] if zone.fields else [] for zone in (self.pinned, self.recent)]
        return torch.cat([*exact[0], *self._older_positions(), *exact[1]], dim=2)

    def _older_positions(self) -> list[Tensor]:
        """Positions of what stands before ``recent``, as rectangles (B,H,S)."""
        return [self.coded.used()["positions"]] if self.coded.length else []

    def _older(self) -> list[Fields]:
        """What stands before ``recent`` as rectangles of encoded fields (B,H,S,…)."""
        return [self.coded.used()] if self.coded.length else []

    def successor(self) -> Store:
        twin = self.empty()
        assert isinstance(twin, Zones)
        if not self.content.exact:
            twin.content.shared, twin._before = dict(self.content.shared), self
        return twin

    def empty(self, held: Held | None = None) -> Store:
        stays = {f"exact_{name}": x for name, x in vars(self.stays).items()}
        return type(self)(held or self.held, **stays)

    def load(self, slots: Slots) -> None:
        if self.content.exact:
            self._hold(fields_of(slots), {})
            return
        written, newest = self._written_before(slots), {}
        if self.stays.asked:
            split = self.stays.split(slots, (written >= 0) & (written < self._coded_before), self.held)
            self.pinned.set(fields_of(slots.select(split.pinned)))
            newest = fields_of(slots.select(split.newest))
            rest = slots.valid & ~(split.pinned | split.newest)
            written, slots = written.gather(2, slots.kept_indices(rest)[0]), slots.select(rest)
        self._hold({**self._content_of(slots, written), **beside(fields_of(slots))}, newest)

    def load_kept(self, slots: Slots, keep: Tensor) -> None:
        if self._before is None or self.stays.asked:
            self.load(slots.select(keep))
            return
        written, positions = self._before._codes(self.content)
        content = moved(written, in_order(slots, keep, positions))
        del written
        kept = slots.with_(keys=slots.keys[..., :0], values=slots.values[..., :0]).select(keep)
        self._hold({**self._pruned(content, kept), **beside(fields_of(kept))}, {})

    def _hold(self, fields: Fields, newest: Fields) -> None:
        """Hold a rectangle of fields, the ``newest`` behind it, and what is pinned."""
        self.coded, self.recent = Columns(self.coded.starts), Columns(self.recent.starts)
        (self.recent if self.content.exact else self.coded).set(fields)
        if newest:
            self.recent.set(newest)
        self._appended = 0

    def _written_before(self, slots: Slots) -> Tensor:
        """(B,H,S) int64: where among the slots of the store before, those of ``pinned`` not counted, each of ``slots``
        lies with the same content; −1 for a slot that is new."""
        if self._before is None or self._before.length == self._before.pinned.length:
            return torch.full_like(slots.positions, -1, dtype=torch.int64)
        where = unchanged(slots, self._before._rest())
        return where.masked_fill((where < 0).any(1, keepdim=True), -1) if self.held.codec.together else where

    @property
    def _coded_before(self) -> int:
        """How many of these columns hold codes."""
        before = self._before
        return 0 if before is None else before.length - before.pinned.length - before.recent.length

    def _content_of(self, slots: Slots, written: Tensor) -> Fields:
        """The content of ``slots``, as it was written in the store before at the columns ``written`` (B,H,S); written
        now where that is −1."""
        same = written >= 0
        if self._before is None or not bool(same.any()):
            return self._pruned(self.content.write(slots.keys, slots.values, slots.positions), slots)
        content = moved(self._before._codes(self.content)[0], written)
        if not bool((same | ~slots.valid).all()):
            new = self.content.write(slots.keys, slots.values, slots.positions)
            content = {name: chosen(same, x, new[name]) for name, x in content.items()}
        return self._pruned(content, slots)

    def _pruned(self, content: Fields, slots: Slots) -> Fields:
        """``content`` of ``slots``, all that this store is going to hold; nothing was before it from now on."""
        if self.held.codec.together:
            check_together(slots.positions)
        self._before = None
        return self.content.prune(content, slots.valid)

    def _codes(self, content: Content) -> tuple[Fields, Tensor]:
        """The content of all slots, (B,H,S,·), what is exact as ``content`` writes it, and positions (B,H,S)."""
        zones = self._older()
        if self.recent.length:
            used = self.recent.used()
            positions = {"positions": used["positions"]}
            zones.append({**content.write(used["keys"], used["values"], used["positions"]), **positions})
        names = [name for name in zones[0] if name not in ("positions", "log_votes", *self.held.stats)]
        joined = {name: torch.cat([x[name] for x in zones], 2) for name in (*names, "positions")}
        return joined, joined.pop("positions")

    def write_stats(self, stats: dict[str, Tensor]) -> None:
        start = self.length - self.recent.length - self.coded.length
        for name, x in stats.items() if self.pinned.length else ():
            self.pinned.fields[name].copy_(x[:, :, : self.pinned.length])
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
        self.pinned.index(rows)
        self.coded.index(rows)
        self.recent.index(rows)
        self.content.index(rows)

    def join(self, other: Store) -> None:
        assert isinstance(other, Zones)
        rows = (self._rows, other._rows)
        self.pinned.join(other.pinned, rows)
        self.coded.join(other.coded, rows)
        self.recent.join(other.recent, rows)
        self.content.join(other.content, rows)
        self._appended = min(self.appended, other.appended)
