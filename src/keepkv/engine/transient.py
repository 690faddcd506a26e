"""Text that is read and taken back: nothing of it is compressed or remembered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def transient(cache: Any) -> Iterator[None]:
    """See ``Cache.transient``. Raises ``CacheStateError`` at the end where a store has encoded what was read."""
    shared = cache.shared
    for layer in cache.compressible:
        layer.listen()
    before, columns, offsets = shared.compressing, shared.positions.columns, shared.positions.offsets
    shared.compressing = False
    try:
        yield
    finally:
        if fed := shared.positions.columns - columns:
            cache.crop(-fed)
        shared.compressing, shared.positions.offsets = before, offsets
