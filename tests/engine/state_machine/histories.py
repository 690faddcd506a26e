"""What happened to one row of a cache, and is still true of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

Columns = tuple[int | None, ...]  # tokens of a row in one forward; None: padding


@dataclass(frozen=True)
class Event:
    """One step of a row.

    kind: "read", a forward of a prompt; "decode", a forward of one token; "verify", a forward whose newest tokens may
    be taken back; "settle", what was due before a forward has run, or of it ("settle prompt") the compression of what
    was read, or ("settle rows") that of decoded tokens; "compress", "freeze", "thaw", "record", "load": the operations
    of these names. columns: of forwards.
    """

    kind: str
    columns: Columns = ()

    @property
    def tokens(self) -> list[int]:
        """The columns without padding."""
        return [x for x in self.columns if x is not None]


History = tuple[Event, ...]


def columns(history: History) -> list[int | None]:
    """Every column that the row still has."""
    return [x for event in history for x in event.columns]


def tokens(history: History) -> list[int]:
    """Every token that the row still has."""
    return [x for x in columns(history) if x is not None]


def has_gaps(history: History) -> bool:
    """Whether padding stands behind a token."""
    held = columns(history)
    first = next((i for i, x in enumerate(held) if x is not None), len(held))
    return None in held[first:]


def without_gaps(history: History) -> History:
    """The history of a row whose columns are its tokens."""
    return tuple(replace(event, columns=tuple(event.tokens)) for event in history)


def without_newest(history: History, count: int) -> History:
    """The history after the newest ``count`` columns were taken back.

    What was due before a forward has run even if all of that forward is taken back.
    """
    return tuple(_without_newest(history, count))


def _without_newest(history: History, count: int) -> Iterator[Event]:
    kept: list[Event] = []
    for event in reversed(history):
        taken = min(count, len(event.columns))
        count -= taken
        left = event.columns[: len(event.columns) - taken]
        gone = bool(event.columns) and not left
        kept.append(
            Event("settle" if event.kind != "read" else "settle rows") if gone else replace(event, columns=left)
        )
    return reversed(kept)
