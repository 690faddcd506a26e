"""Exceptions. Each message says what was given, what is supported, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_NAMES, NEAREST = 30, 10  # of so many names all are said, of more the nearest


class KeepKVError(Exception):
    """Base of every error that keepkv raises on purpose."""


class UnknownName(KeepKVError, ValueError):
    """A method, score, store … that is not registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        folded = {one.casefold(): one for one in names}
        given = name.casefold()
        begin = [one for one in folded if given and one.startswith(given)]  # niah for niah-single-1
        near = begin[:1] or get_close_matches(given, folded, n=1)
        hint = f" Did you mean {folded[near[0]]!r}?" if near else ""
        rest = ""
        if len(names) > MOST_NAMES:
            some = [folded[one] for one in get_close_matches(given, folded, n=NEAREST, cutoff=0.0)]
            names, rest = some, f" and {len(names) - len(some)} others"
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}{rest}.")


class NameTaken(KeepKVError, ValueError):
    """A name that another score, method, store … has."""


class BudgetError(KeepKVError, ValueError):
    """A budget that cannot be read, or that cannot hold what must be kept."""


class UnsupportedModel(KeepKVError):
    """A model whose attention a compressed cache cannot serve."""


class UnsupportedInput(KeepKVError):
    """Input that would give silently wrong output, such as right padding."""


class CacheStateError(KeepKVError):
    """An operation that the present state of a cache does not allow."""


class CacheFileError(KeepKVError):
    """A saved cache that is truncated, altered, foreign, or for another model."""


class CalibrationError(KeepKVError):
    """A calibration that is missing, damaged, not needed, or of another model."""


class SpanError(KeepKVError, ValueError):
    """Spans that cannot be read, contradict each other, or do not lie in the text they were given for."""


class TooLarge(KeepKVError):
    """What a server can never hold: ``needed`` of what there is ``limit`` of."""

    def __init__(self, message: str, needed: int, limit: int) -> None:
        super().__init__(message)
        self.needed, self.limit = needed, limit


class Busy(KeepKVError):
    """What a server cannot take now, and may later: ``waiting`` requests, of ``limit``, are before it."""

    def __init__(self, message: str, waiting: int, limit: int) -> None:
        super().__init__(message)
        self.waiting, self.limit = waiting, limit


class Stopped(KeepKVError):
    """A server that stops, or has not been started, was asked for something."""


class ContextMissing(KeepKVError, LookupError):
    """A context of a name that no server has, or that was made with another model."""


class ContextExists(KeepKVError):
    """A context of this name is there already."""
