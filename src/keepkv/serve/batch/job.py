"""What the worker is given: something to read, which waits for memory, and then takes its turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from keepkv.engine.cache import Cache


class Job(Protocol):
    """Work whose prompt is read in turns.

    need: bytes that it may take at its peak, from when it is admitted. cancelled: whether nobody wants it any more.
    """

    need: int

    @property
    def cancelled(self) -> bool: ...

    def turns(self) -> Iterator[None]:
        """The work, pausing between forwards."""
        ...

    def held(self) -> Cache | None:
        """The cache that it holds now."""
        ...

    def cancel(self) -> None:
        """End it, and say so."""
        ...

    def fail(self, error: Exception) -> None:
        """End it by ``error``, and say so."""
        ...


def bytes_of(cache: Cache | None) -> int:
    """Bytes that ``cache`` holds, as allocated."""
    from keepkv.engine.receipt import held_by
    from keepkv.store.base import allocated

    return 0 if cache is None else allocated(x for layer in cache.layers for x in held_by(layer))
