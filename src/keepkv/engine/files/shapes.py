"""Names, dtypes and shapes of the tensors in a cache file, checked before any is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepkv.core.tensorfile import Declared
from keepkv.engine.layer import Layer
from keepkv.store.base import Store
from keepkv.store.codec.base import Fields
from keepkv.store.dense import DenseStore
from keepkv.store.ragged import RaggedStore
from keepkv.store.static import StaticStore

WIDE = (torch.float32, torch.float64)
FLOATS = (torch.float16, torch.bfloat16, *WIDE)
COUNTS = (torch.int64,)
Dims = tuple[str | int, ...]


@dataclass(frozen=True)
class Field:
    """A tensor: a letter among ``dims`` is the same number wherever it stands; B rows, H heads, D and V dimensions of
    keys and values, Q query heads, E dimensions of queries, and how many queries a score keeps under a name."""

    dims: Dims
    dtypes: tuple[torch.dtype, ...]
    needed: bool = True


@dataclass(frozen=True)
class Zone:
    """Some slots of a store, as they are named in a file. form: "columns" (B,H,C,…), "segments" (N,…) with ``lengths``,
    or "buffers", columns with a ``cursor``."""

    prefix: str
    form: str
    encoded: bool = False

    @property
    def lead(self) -> Dims:
        """Dimensions of one entry per slot."""
        return (f"{self.prefix}N",) if self.form == "segments" else ("B", "H", f"{self.prefix}C")


def zones(store: Store) -> list[Zone] | None:
    """The zones of a store of ours; None for one of somebody else's, of which nothing is known."""
    codes = store.held.codec.exact is not None
    if type(store) is DenseStore:
        beside = [Zone("pinned.", "columns"), Zone("tail.", "columns")]
        return [Zone("body.", "columns", True), *beside] if codes else [Zone("", "columns")]
    if type(store) is RaggedStore:
        coded = [Zone("pinned.", "columns"), Zone("coded.", "columns", True)] if codes else []
        return [Zone("body.", "segments", codes), *coded, Zone("tail.", "columns")]
    if type(store) is StaticStore:
        return [Zone("growing.", "columns"), Zone("", "buffers")]
    return None


KEPT = ("window", "merge_window", "span_window", "sample")  # queries that scores keep
# What scores and reductions remember of rows. Of others nothing is known but that rows come first.
STATE: dict[str, Field] = {
    "queries_count": Field(("B",), WIDE), "queries_mean": Field(("B", "Q", "E"), WIDE),
    "queries_spread": Field(("B", "Q", "E", "E"), WIDE), "ema_start": Field(("B",), COUNTS),
    "d2o_threshold": Field(("B", "H"), FLOATS),
    "asked_mass": Field(("B", "Q", "asked"), FLOATS), "asked_said": Field(("B", "Q", "asked", "V"), FLOATS),
}  # fmt: skip
for _name in (*KEPT, "asked"):
    STATE[_name] = Field(("B", "Q", _name, "E"), FLOATS)
    STATE[f"{_name}_positions"] = Field(("B", _name), COUNTS)
TOGETHER = (
    ("asked", "asked_positions", "asked_mass", "asked_said"), ("queries_count", "queries_mean"), ("queries_spread",),
    ("ema_start",), ("d2o_threshold",), *((name, f"{name}_positions") for name in KEPT),
)  # fmt: skip
TALLY = {
    "merged": Field(("B", "H"), COUNTS), "dropped": Field(("B", "H"), COUNTS),
    "votes_dropped": Field(("B", "H"), FLOATS), "mass_dropped": Field(("B",), FLOATS),
}  # fmt: skip


class Shapes:
    """Ticks off the tensors that a file declares. letters: what is known of them. Every method raises ``ValueError``,
    which names the tensor."""

    def __init__(self, declared: Mapping[str, Declared]) -> None:
        self.left = dict(declared)
        self.letters: dict[str, int] = {}

    def names(self, prefix: str) -> list[str]:
        """Of the tensors below ``prefix`` that were not ticked off, without it."""
        return [name[len(prefix) :] for name in self.left if name.startswith(prefix)]

    def take(self, prefix: str, fields: Mapping[str, Field]) -> bool:
        """Tick off ``fields`` below ``prefix``: all that are needed, or none at all. Whether they are there."""
        found = [name for name in fields if prefix + name in self.left]
        if found and (missing := [name for name, x in fields.items() if x.needed and name not in found]):
            raise ValueError(f"tensor {prefix + missing[0]!r} is missing beside {prefix + found[0]!r}")
        for name in found:
            self._tick(prefix + name, fields[name])
        return bool(found)

    def _tick(self, name: str, field: Field) -> None:
        one = self.left.pop(name)
        if one.dtype not in field.dtypes:
            raise ValueError(f"tensor {name!r} is {one.dtype}, expected {' or '.join(map(str, field.dtypes))}")
        if len(one.shape) != len(field.dims):
            raise ValueError(f"tensor {name!r} has shape {one.shape}, expected {len(field.dims)} dimensions")
        for letter, size in zip(field.dims, one.shape, strict=True):
            known = letter if isinstance(letter, int) else self.letters.setdefault(letter, size)
            if size != known:
                raise ValueError(f"tensor {name!r} has shape {one.shape}: {size} where {known} was expected")

    def layer(self, prefix: str, layer: Layer, kinds: tuple[torch.dtype, ...], known: Mapping[str, int]) -> None:
        """Tick off what a layer of ours holds. kinds: dtypes that keys may have. known: letters; those of the
        last layer are forgotten."""
        self.letters = dict(known)
        self._store(f"{prefix}store.", layer.store, kinds)
        if {"D", "V"} <= self.letters.keys():
            self.letters["E"] = self.letters["D"] + self.letters["V"] * layer.form.one_content
        self.take(f"{prefix}count.", {name: Field(x.dims, x.dtypes, False) for name, x in TALLY.items()})
        self.take(prefix, {"sinks": Field(("Q",), FLOATS, False)})
        for names in TOGETHER:
            fields = {name: STATE[name] for name in names}
            if names[0] in KEPT:
                fields[names[0]] = Field(STATE[names[0]].dims, kinds)
            self.take(f"{prefix}state.", fields)
        for name in self.names(f"{prefix}state."):
            self._rows(f"{prefix}state.{name}")

    def _rows(self, name: str) -> None:
        shape = self.left[name].shape
        self._tick(name, Field(("B", *shape[1:]) if shape else ("B",), (*FLOATS, *COUNTS, torch.bool)))

    def _store(self, prefix: str, store: Store, kinds: tuple[torch.dtype, ...]) -> None:
        known = zones(store)
        if known is None:
            for name in self.names(prefix):
                del self.left[prefix + name]
            return
        exact = store.held.codec.exact is None
        # Tokens that are not encoded first: they tell the dimensions where the model does not.
        for zone in sorted(known, key=lambda x: x.encoded):
            if not zone.encoded or self.names(prefix + zone.prefix):
                self.take(prefix + zone.prefix, self._zone(zone, store, kinds))
        if self.names(f"{prefix}shared."):
            self.take(f"{prefix}shared.", self._shared(store, kinds))
        rest = {"appended": Field((1,), COUNTS)}
        if self.take(prefix, rest) != (type(store) is StaticStore or (not exact and self._holds(known))):
            raise ValueError(f"tensor '{prefix}appended' is missing, or is where none should be")

    def _holds(self, known: Iterable[Zone]) -> bool:
        return any(zone.lead[-1] in self.letters for zone in known)

    def _zone(self, zone: Zone, store: Store, kinds: tuple[torch.dtype, ...]) -> dict[str, Field]:
        lead: Dims = zone.lead
        plain: dict[str, tuple[Dims, Any]] = {"keys": (("D",), kinds), "values": (("V",), kinds)}
        content = self._content(store, kinds) if zone.encoded else plain
        made = {name: Field((*lead, *dims), some) for name, (dims, some) in content.items()}
        for name in self._once(store, kinds) if zone.encoded else ():
            made[name] = Field(("B", 1, *made[name].dims[2:]), made[name].dtypes)
        exact = WIDE if torch.float64 in kinds else WIDE[:1]
        made |= {"positions": Field(lead, (torch.int32,)), **{name: Field(lead, exact) for name in store.held.stats}}
        made["log_votes"] = Field(lead, exact, needed=zone.form == "buffers")
        if zone.form == "columns":
            made["counts"] = Field((f"{zone.prefix}counts",), COUNTS)
        else:
            name, dims = ("lengths", ("B", "H")) if zone.form == "segments" else ("cursor", (1,))
            made[name] = Field(dims, COUNTS)
        return made

    def _content(self, store: Store, kinds: tuple[torch.dtype, ...]) -> dict[str, tuple[Dims, Any]]:
        """What the codec makes of one slot of each of ``kinds``; D and V are known."""
        made: dict[str, tuple[Dims, Any]] = {}
        for fields, _ in self._blanks(store, kinds):
            for name, x in fields.items():
                made[name] = tuple(x.shape[3:]), (*made.get(name, ((), ()))[1], x.dtype)
        return made

    def _once(self, store: Store, kinds: tuple[torch.dtype, ...]) -> set[str]:
        """What the codec writes once for all heads of a slot."""
        if not store.held.codec.together:
            return set()
        return {name for fields, _ in self._blanks(store, kinds, 2) for name, x in fields.items() if x.shape[1] == 1}

    def _shared(self, store: Store, kinds: tuple[torch.dtype, ...]) -> dict[str, Field]:
        """What the slots of a head share."""
        made: dict[str, Field] = {}
        for _, shared in self._blanks(store, kinds):
            for name, x in shared.items():
                dims: Dims = ("B", "H", "shared", *x.shape[3:])
                made[name] = Field(dims, (*(made[name].dtypes if name in made else ()), x.dtype))
        return made

    def _blanks(
        self, store: Store, kinds: tuple[torch.dtype, ...], heads: int | None = None
    ) -> list[tuple[Fields, Fields]]:
        if not {"D", "V"} <= self.letters.keys():
            raise ValueError("only encoded slots, and the model does not tell how wide they are")
        widths = self.letters["D"], self.letters["V"]
        return [store.held.codec.blank(heads or self.letters.get("H", 1), *widths, dtype) for dtype in kinds]
