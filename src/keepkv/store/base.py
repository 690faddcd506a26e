"""The store: how the slots of one layer lie in memory. Only stores know a layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.nn import Module

from keepkv.attention.part import Part, plain
from keepkv.core.layer_info import LayerInfo
from keepkv.core.options import taken
from keepkv.core.registry import Registry, known_as
from keepkv.core.slots import Slots
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.store.codec import AUTO, CODECS, Codec, Plain
from keepkv.store.columns import Columns
from keepkv.store.older import Older

POSITION = VOTES = STATISTIC = 4  # bytes
NO_STATS: Mapping[str, Tensor] = {}  # nobody writes to it; decode that is compiled iterates over it


class SlotBytes(NamedTuple):
    """Bytes that one slot of every KV head of a layer takes for one row.

    content: its key and value as they are held. beside: what is kept with them: position, votes where slots merge,
    statistics. plain: key and value in the model's dtype, all that a plain cache holds.
    """

    content: int
    beside: int
    plain: int


@dataclass(frozen=True)
class Held:
    """What a store is made for.

    stats: the statistics kept per slot, and the value a new slot starts with. votes: whether slots may have any.
    codec: how content is written. room: tokens that come between two loads, where no more are allocated ahead. layer:
    whose slots they are. calibration: tensors of that layer by name, where some were made for it. places: the rotary
    positions (B,…[,A]) of the tokens at positions (B,…), where these are not the same. protects: which tokens at
    positions (B,…) lie in a protected span, where there may be any.
    """

    stats: Mapping[str, float] = field(default_factory=dict)
    votes: bool = True
    codec: Codec = field(default_factory=Plain)
    room: int | None = None
    layer: LayerInfo = field(default_factory=LayerInfo)
    calibration: Mapping[str, Tensor] | None = None
    places: Callable[[Tensor], Tensor] | None = None
    protects: Callable[[Tensor], Tensor] | None = None

    @property
    def beside(self) -> int:
        """Bytes of one slot of one head beside its content."""
        return POSITION + VOTES * self.votes + STATISTIC * len(self.stats)


class Room(NamedTuple):
    """Columns that hold the newest slots, exact, and have room for another token; ``older``: all others, ragged and
    exact; None: there are none."""

    newest: Columns
    older: Part | None


class Store(ABC):
    """Slots of one layer: rows B × KV heads H, each with its own number of valid slots.

    Subclass it for a new layout and register it. Two zones: what the last ``load`` wrote, and the tokens appended
    since, newest last. Fields per slot: what the codec writes for keys and values, positions, log_votes (allocated only
    once a slot has any) and the score's statistics.
    """

    compileable: ClassVar[bool] = False  # decode runs inside one compiled graph
    ragged: ClassVar[bool] = False  # heads of different lengths take no more than they hold
    selects: ClassVar[bool] = False  # hands out ``older``
    encodes: ClassVar[bool] = True  # takes codecs other than "none"
    needs_calibration: ClassVar[str | None] = None  # the kind of calibration that it reads from ``held.calibration``

    def __init__(self, held: Held) -> None:
        self.held = held

    @property
    @abstractmethod
    def length(self) -> int:
        """Physical length: columns of the rectangular view."""

    @property
    def lengths(self) -> Tensor:
        """(B,H) int64: valid slots of each row and head."""
        return self.view().lengths

    @property
    @abstractmethod
    def appended(self) -> int:
        """Columns appended since the last ``load`` that ``crop`` can still remove."""

    @property
    @abstractmethod
    def holds_all(self) -> bool:
        """True if one rectangle, the first of ``parts``, holds every appended token as it was given, provided that
        ``load`` was never called: stock attention may read it."""

    @property
    def static_length(self) -> int | None:
        """Tokens that layers which stay stock must have room for, where decode is compiled; else None."""
        return None

    @property
    def views_share_memory(self) -> bool:
        """Whether a view is no copy now, and what is written to the statistics of ``live_view`` is stored."""
        return False

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, positions: Tensor, stats: Mapping[str, Tensor] = NO_STATS) -> None:
        """Add T tokens: keys (B,H,T,D), values (B,H,T,Dv), positions (B,T) int, ``EMPTY`` for padding. stats: their
        statistics (B,H,T) float32 where these are known already; others are what a new slot starts with."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """All slots in order, for attention; the last part ends with the tokens appended last."""

    def room(self) -> Room | None:
        """Where one more token may be written from outside; None: nowhere now. Whoever writes it says so by
        ``wrote``."""
        return None

    def wrote(self) -> None:
        """A token was written behind those of ``room``."""
        raise UnsupportedInput(f"{type(self).__name__} writes its tokens itself")

    def older(self, window: int) -> Older:
        """All slots but the newest: at least ``window`` columns of these, or what no codec has written yet."""
        raise UnsupportedInput(f"{type(self).__name__} hands out all of its slots, not some of them")

    def successor(self) -> Store:
        """The store that takes the place of this one once something was loaded into it.

        This one still holds what it holds; it refuses to be read where both lie in the same memory.
        """
        return self.empty()

    @abstractmethod
    def load(self, slots: Slots) -> None:
        """Replace everything by ``slots``; memory of what was held before is freed."""

    def load_kept(self, slots: Slots, keep: Tensor) -> None:
        """``load`` those of ``slots`` where ``keep`` (B,H,S) bool is true, all of them valid."""
        self.load(slots.select(keep))

    @abstractmethod
    def view(self) -> Slots:
        """All slots in rectangular form. Statistics may share memory with the store; ``write_stats`` stores them."""

    def positions(self) -> Tensor:
        """(B,H,S) int32: the positions of ``view``, where no content is read for them."""
        return self.view().positions

    def live_view(self) -> Slots:
        """The view that statistics are updated through after each forward; may hold empty slots anywhere."""
        return self.view()

    @abstractmethod
    def write_stats(self, stats: dict[str, Tensor]) -> None:
        """Store the statistics of a ``view``, each (B,H,length)."""

    @abstractmethod
    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``; the number of rows may change."""

    @abstractmethod
    def join(self, other: Store) -> None:
        """Add the rows of ``other``, a store of the same kind, behind the present ones."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Remove the newest ``tokens`` columns, at most ``appended``."""

    def hide(self, first: Tensor) -> None:
        """Make slots empty whose position is ``first`` (B,) of their row or later; none of these was loaded."""
        raise UnsupportedInput(
            f"{type(self).__name__} cannot hide tokens that it holds: an attention mask must go on as it began"
        )

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name: what is counted in bytes and written to files."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` of the same class returned."""

    def meet(self, queries: Tensor, positions: Tensor) -> None:  # noqa: B027 most stores have nothing to do
        """Called with the queries (B,Hq,T,D) after RoPE, at positions (B,T), of a forward of more than one token whose
        keys were appended, before any of them is written; where the codec ``meets_queries``."""

    def after_prefill(self) -> None:  # noqa: B027
        """Called after the attention of a forward of more than one token."""

    def begin_decode(self) -> None:  # noqa: B027
        """Called before each forward of one token."""

    def clone(self, held: Held | None = None) -> Store:
        """An independent copy; ``held``: with other room."""
        twin = self.empty(held)
        if tensors := self.tensors():
            twin.restore({name: x.clone() for name, x in tensors.items()})
        return twin

    def empty(self, held: Held | None = None) -> Store:
        """A store of the same kind and options that holds nothing; ``held``: for another layer."""
        return type(self)(held or self.held)

    def like(self) -> tuple[Tensor, Tensor]:
        """Keys (·,H,·,D) and values (·,H,·,Dv) of any slots, of a store that holds something: for shapes and dtype."""
        return plain(next(next(iter(self.parts())).rectangles()))

    def slot_bytes(self) -> SlotBytes:
        """What one slot takes; of a store that holds something."""
        return self._bytes_of(*self.like())

    @property
    def row_bytes(self) -> int:
        """What a row takes beside its slots, but for groups of tokens."""
        return self.shared_bytes

    @property
    def shared_bytes(self) -> int:
        """Of that, what its slots share wherever they lie."""
        return 0

    @property
    def groups(self) -> tuple[int, int]:
        """How many tokens in a row share content at most, and the bytes of it, of every KV head; 0, 0: none do."""
        return 0, 0

    @property
    def exact_slots(self) -> tuple[int, int]:
        """How many slots of each head stay exact beside codes at most, protected ones not counted, and what one of
        every KV head takes more than others; 0, 0: none do."""
        return 0, 0

    def protected_bytes(self, tokens: Tensor) -> int:
        """What slots of ``tokens`` (B,) protected ones of each row take more than others, of every KV head."""
        return 0

    def _bytes_of(self, keys: Tensor, values: Tensor) -> SlotBytes:
        """From any keys (·,H,·,D) and values (·,H,·,Dv)."""
        heads, widths, dtype = keys.shape[1], (keys.shape[-1], values.shape[-1]), keys.dtype
        content = self.held.codec.token_bytes(heads, *widths, dtype)
        return SlotBytes(content, heads * self.held.beside, heads * sum(widths) * dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of storage really allocated, slack included, of all that it holds, named in ``tensors`` or not."""
        return allocated(tensors_in(self))


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    storages = (x.untyped_storage() for x in tensors)
    return sum({x._cdata: x.nbytes() for x in storages}.values())  # not by address: on "meta" there is none


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Every tensor that ``x`` holds, through its attributes, dictionaries and sequences; not what a store was made for,
    nor modules."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors_in(value)
    elif isinstance(x, list | tuple):
        for value in x:
            yield from tensors_in(value)
    elif hasattr(x, "__dict__") and not isinstance(x, Held | Module | type):
        yield from tensors_in(vars(x))


STORES: Registry[Store] = Registry("store")
FORMER = {"flat": ("ragged", "none"), "int8": ("auto", "int8")}  # names of before layouts and codecs were apart


def register_store(name: str, *, replace: bool = False) -> Callable[[Any], Any]:
    """Register a ``Store`` subclass, a layout, under ``name``; ``replace`` takes the place of another one."""
    return STORES.register(name, replace=replace)


def choose(layout: str, codec: str, ragged: bool) -> tuple[str, str]:
    """Names of layout and codec, former names resolved and ``layout="auto"``; ``codec="auto"``, which hangs on the
    budget, is left to ``settled`` where the layout encodes.

    ragged: whether heads may keep different numbers of slots. Raises ``KeepKVError`` for a pair that does not work.
    """
    layout, codec = taken("Cache", "store", layout, str), taken("Cache", "codec", codec, str)
    layout, codec = known_as(layout, ["auto", *FORMER, *STORES], "store"), known_as(codec, [AUTO, *CODECS], "codec")
    if layout in FORMER:
        if codec not in ("none", FORMER[layout][1]):
            raise KeepKVError(
                f"store={layout!r} is the former name of codec={FORMER[layout][1]!r}; codec={codec!r} "
                "was given too. Give the codec alone."
            )
        layout, codec = FORMER[layout]
    layout = ("ragged" if ragged else "dense") if layout == "auto" else layout
    kind: Any = STORES.factory(layout)
    if codec == AUTO:
        return layout, AUTO if kind.encodes else "none"
    if codec != "none" and not kind.encodes:
        raise KeepKVError(
            f"store {layout!r} holds slots as they are; codec={codec!r} needs a store that encodes them: "
            f"{', '.join(repr(x) for x in STORES if getattr(STORES.factory(x), 'encodes', False))}"
        )
    if getattr(CODECS.factory(codec), "together", False) and (ragged or layout == "ragged"):
        raise KeepKVError(
            f"codec {codec!r} writes the KV heads of a token together, in store='dense' and with as many slots in each "
            "head. Use these, with an allocation such as 'uniform', or a codec that writes each head by itself: 'int4'."
        )
    if ragged and layout == "dense":
        raise KeepKVError(
            "store 'dense' is a rectangle as wide as the fullest head, and this method keeps different numbers of "
            "slots in each head: little would be freed. Use store='ragged', or an allocation such as 'uniform'."
        )
    return layout, codec
