"""The store: how the slots of one layer lie in memory. Only stores know a layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.registry import Registry
from keepkv.core.slots import Slots


class Store(ABC):
    """Slots of one layer: rows B × KV heads H, each with its own number of valid slots.

    Two zones: what the last ``load`` wrote, and the tail of tokens appended since, newest last. Fields per slot:
    keys, values, positions, log_votes (allocated only when a slot has any) and the score's statistics.
    """

    lossy: ClassVar[bool] = False  # what is read differs from what was written
    compileable: ClassVar[bool] = False  # decode runs inside one compiled graph

    def __init__(self, stats: dict[str, float]) -> None:
        self.stats = stats  # per-slot statistics and the value they start with

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
    def tail(self) -> int:
        """Columns appended since the last ``load``."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether ``parts`` is one rectangle in which every appended column still stands as it was given, provided
        that ``load`` was never called."""

    @property
    def views_share_memory(self) -> bool:
        """Whether a view is no copy now, and what is written to the statistics of ``live_view`` is stored."""
        return False

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add T tokens: keys (B,H,T,D), values (B,H,T,Dv), positions (B,T) int, ``EMPTY`` for padding."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """All slots as rectangles in order, for attention; the last one ends with the tail."""

    @abstractmethod
    def load(self, slots: Slots) -> None:
        """Replace everything by ``slots``; memory of what was held before is freed."""

    def load_kept(self, slots: Slots, keep: Tensor) -> None:
        """``load`` those of ``slots`` that ``keep`` (B,H,S) bool, valid ones, is true of."""
        self.load(slots.select(keep))

    @abstractmethod
    def view(self) -> Slots:
        """All slots in rectangular form. Statistics may share memory with the store; ``put`` writes them back."""

    def live_view(self) -> Slots:
        """The view that statistics are updated through after each forward; may hold empty slots anywhere."""
        return self.view()

    @abstractmethod
    def put(self, stats: dict[str, Tensor]) -> None:
        """Write back the statistics of a ``view``, each (B,H,length)."""

    @abstractmethod
    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``; the number of rows may change."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Remove the newest ``tokens`` columns, at most ``tail``."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by name: what is counted in bytes and written to files."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` of the same class returned."""

    def settle(self) -> None:  # noqa: B027 most stores have nothing to do
        """Called after the attention of a forward of more than one token."""

    def begin_decode(self) -> None:  # noqa: B027
        """Called before each forward of one token."""

    def clone(self) -> Store:
        """An independent copy."""
        twin = self.empty()
        if tensors := self.tensors():
            twin.restore({name: x.clone() for name, x in tensors.items()})
        return twin

    def empty(self) -> Store:
        """A store of the same kind and options that holds nothing."""
        return type(self)(self.stats)

    @property
    def nbytes(self) -> int:
        """Bytes of storage really allocated, slack included."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors().values()}
        return sum(storages.values())


STORES: Registry[Store] = Registry("store")


def filled(like: Tensor, shape: tuple[int, ...], value: float, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor of ``shape`` on the device of ``like``."""
    return torch.full(shape, value, dtype=dtype or like.dtype, device=like.device)
