"""A watch over a store: whatever overwrites a slot, mixes up rows or gathers the wrong ones raises an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from keepkv.attention.part import Part, plain
from keepkv.core.slots import EMPTY, Slots
from keepkv.errors import CacheStateError
from keepkv.kernels.codes import Codes
from keepkv.store.base import NO_STATS, Held, SlotBytes, Store
from keepkv.store.older import Older

SWITCH = "KEEPKV_CANARY"
PRIME = 1_099_511_628_211  # of the FNV hash; products wrap around in 64 bits


def guarded(store: Store) -> Store:
    """``store``, watched by a ``Canary`` where the environment says KEEPKV_CANARY=1; else as it is, at no cost."""
    return Canary(store) if os.environ.get(SWITCH) == "1" else store


@dataclass
class Hashes:
    """What each column of a store must hold, (B,H,S) int64. positions: ``EMPTY`` where it is no slot. content: a hash
    of what was stored, or where that was encoded since, of what was read back then."""

    positions: Tensor
    content: Tensor

    @classmethod
    def of(cls, slots: Slots, keep: Tensor | None = None) -> Hashes:
        """Of ``slots``, those alone where ``keep`` (B,H,S) bool is true."""
        positions = slots.positions if keep is None else slots.positions.masked_fill(~keep, EMPTY)
        return cls(positions.clone(), hashed(slots))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The two."""
        return self.positions, self.content

    def rows(self, which: Tensor) -> Hashes:
        """Those of rows ``which``."""
        return Hashes(*(x[which.to(x.device)] for x in self.tensors()))

    def columns(self, stop: int) -> Hashes:
        """The first ``stop`` columns."""
        return Hashes(*(x[:, :, :stop] for x in self.tensors()))

    def then(self, newer: Hashes) -> Hashes:
        """These columns followed by ``newer``."""
        return Hashes(*(torch.cat(pair, 2) for pair in zip(self.tensors(), newer.tensors(), strict=True)))

    def above(self, other: Hashes) -> Hashes:
        """These rows and those of ``other``; the shorter ones start with empty columns."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Hashes(*(torch.cat(_aligned(a, b, EMPTY)) for a, b in pairs))


class Canary(Store):
    """A store, and beside it a hash of the key, value, position and votes of each slot, taken when it is stored.

    Hashes are compared whenever slots are read: by ``view``, ``parts``, ``tensors``, ``clone``. Statistics may change
    and are not watched. Decode is not compiled. Raises ``CacheStateError`` with layer, row, head and slot.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner.held)
        self.inner = inner
        self.hashes: Hashes | None = None
        self.ragged, self.encodes = inner.ragged, inner.encodes  # type: ignore[misc]
        self.needs_calibration, self.selects = inner.needs_calibration, inner.selects  # type: ignore[misc]

    # --- what changes slots --------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, stats: Mapping[str, Tensor] = NO_STATS) -> None:
        self.inner.append(keys, values, positions, stats)
        places = positions[:, None].expand(keys.shape[:3]).to(torch.int32)
        votes = torch.zeros(places.shape, device=keys.device)
        new = Hashes.of(Slots(keys, values, votes, places))
        self.hashes = new if self.hashes is None else self.hashes.then(new)

    def load(self, slots: Slots) -> None:
        hashes = Hashes.of(slots)
        self.inner.load(slots)
        self.hashes = self._encoded(hashes)

    def load_kept(self, slots: Slots, keep: Tensor) -> None:
        hashes = Hashes.of(slots, keep)
        self.inner.load_kept(slots, keep)
        self.hashes = self._encoded(hashes)

    def index(self, rows: Tensor) -> None:
        self.inner.index(rows)
        self.hashes = None if self.hashes is None else self.hashes.rows(rows)

    def join(self, other: Store) -> None:
        assert isinstance(other, Canary) and self.hashes is not None and other.hashes is not None
        self.view(), other.view()
        hashes = self.hashes.above(other.hashes)
        self.inner.join(other.inner)
        self.hashes = self._encoded(hashes)

    def _encoded(self, hashes: Hashes) -> Hashes:
        """``hashes``, or where the codec may have written slots anew, those of what it is read back as."""
        return hashes if self.held.codec.exact is None else Hashes.of(self.inner.view())

    def crop(self, tokens: int) -> None:
        self.inner.crop(tokens)
        if self.hashes is not None:
            self.hashes = self.hashes.columns(self.hashes.positions.shape[2] - tokens)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.inner.restore(tensors)
        self.hashes = Hashes.of(self.inner.view()) if self.inner.length else None

    def hide(self, first: Tensor) -> None:
        self.inner.hide(first)
        if self.hashes is not None:
            late = self.hashes.positions >= first[:, None, None]
            self.hashes = replace(self.hashes, positions=self.hashes.positions.masked_fill(late, EMPTY))

    def successor(self) -> Store:
        return Canary(self.inner.successor())

    def older(self, window: int) -> Older:
        self.view()
        return self.inner.older(window)

    def write_stats(self, stats: dict[str, Tensor]) -> None:
        self.inner.write_stats(stats)

    def meet(self, queries: Tensor, positions: Tensor) -> None:
        self.inner.meet(queries, positions)

    def after_prefill(self) -> None:
        self._encoding(self.inner.after_prefill)

    def begin_decode(self) -> None:
        self._encoding(self.inner.begin_decode)

    def _encoding(self, step: Callable[[], None]) -> None:
        """Run a step that may encode slots."""
        if self.hashes is not None and self.held.codec.exact is not None:
            self.view()
            step()
            self.hashes = Hashes.of(self.inner.view())
        else:
            step()

    # --- what reads slots ----------------------------------------------------------------------------------------

    def view(self) -> Slots:
        return self._checked(self.inner.view(), "a view")

    def live_view(self) -> Slots:
        return self._checked(self.inner.live_view(), "a view")

    def parts(self) -> Iterator[Part]:
        parts = list(self.inner.parts())
        rectangles = [_slots(rectangle) for part in parts for rectangle in part.rectangles()]
        if any(isinstance(part.keys, Codes) for part in parts):  # expanded otherwise: rounded otherwise, too
            self.view()
        elif rectangles:
            self._checked(reduce(Slots.join, rectangles), "attention")
        yield from parts

    def tensors(self) -> dict[str, Tensor]:
        if self.hashes is not None:
            self.view()
        return self.inner.tensors()

    def clone(self, held: Held | None = None) -> Store:
        if self.hashes is not None:
            self.view()
        twin = Canary(self.inner.clone(held))
        twin.hashes = self.hashes  # never changed in place
        return twin

    def empty(self, held: Held | None = None) -> Store:
        return Canary(self.inner.empty(held))

    def _checked(self, slots: Slots, reader: str) -> Slots:
        """``slots`` as they are, which ``reader`` is about to read."""
        hashes = self.hashes
        if hashes is None:
            return slots
        stored = hashes.positions >= 0
        held, found = _aligned(_ordered(hashes.content, stored), _ordered(hashed(slots), slots.valid), 0)
        wrong = (found != held).nonzero()
        if len(wrong):
            row, head, column = wrong[0].tolist()
            count, places = int(stored[row, head].sum()), slots.positions[row, head][slots.valid[row, head]]
            place = int(places[column - found.shape[2] + len(places)])
            slot = column - found.shape[2] + count  # counted among those of the head
            raise CacheStateError(
                f"canary: {reader} of layer {self.held.layer.index}, row {row}, head {head} found in slot {slot} of "
                f"{count} (position {place}) other contents than were stored there; {len(wrong)} slots of the layer "
                "differ. Something wrote to them or took the wrong ones; call cache.reset()."
            )
        return slots

    # --- passed on -----------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self.inner.length

    @property
    def lengths(self) -> Tensor:
        return self.inner.lengths

    def positions(self) -> Tensor:
        return self.inner.positions()

    @property
    def appended(self) -> int:
        return self.inner.appended

    @property
    def holds_all(self) -> bool:
        return self.inner.holds_all

    @property
    def static_length(self) -> int | None:
        return self.inner.static_length

    @property
    def views_share_memory(self) -> bool:
        return self.inner.views_share_memory

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def row_bytes(self) -> int:
        return self.inner.row_bytes

    @property
    def shared_bytes(self) -> int:
        return self.inner.shared_bytes

    @property
    def groups(self) -> tuple[int, int]:
        return self.inner.groups

    def slot_bytes(self) -> SlotBytes:
        return self.inner.slot_bytes()


def hashed(slots: Slots) -> Tensor:
    """(B,H,S) int64: a hash of the bits of key, value, position and votes of each slot, chained in this order."""
    keys, values = _folded(slots.keys), _folded(slots.values)
    votes = _bits(slots.log_votes + 0.0)  # −0 is 0
    return ((keys * PRIME + values) * PRIME + slots.positions.long()) * PRIME + votes


def _folded(x: Tensor) -> Tensor:
    """(…,S) int64: the bits of (…,S,D), each times a power of an odd number."""
    bits = _bits(x)
    powers = torch.full((x.shape[-1],), PRIME, dtype=torch.int64, device=x.device).cumprod(0)
    return (bits * powers).sum(-1)


def _bits(x: Tensor) -> Tensor:
    """The bits of floats as int64."""
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]).long()


def _slots(part: Part) -> Slots:
    """A rectangle of a part as slots."""
    votes = part.log_votes
    votes = torch.zeros(part.positions.shape, device=part.positions.device) if votes is None else votes
    return Slots(*plain(part), votes, part.positions)


def _ordered(x: Tensor, valid: Tensor, empty: int = 0) -> Tensor:
    """``x`` (B,H,S) with its ``valid`` columns last, in their order, and ``empty`` before them."""
    order = valid.to(torch.int8).sort(dim=-1, stable=True).indices
    return x.masked_fill(~valid, empty).gather(-1, order)


def _aligned(one: Tensor, two: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """Both (…,S) as wide as the wider one, columns of ``empty`` in front of the other."""
    wide = max(one.shape[-1], two.shape[-1])
    a, b = (torch.nn.functional.pad(x, (wide - x.shape[-1], 0), value=empty) for x in (one, two))
    return a, b
