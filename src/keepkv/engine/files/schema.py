"""Checks of plain data, put together from small ones: what a header may say is a table of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[Any, str], None]  # of a value and where it stands; raises ``ValueError``
MOST = (1 << 31) - 1  # of every count: positions have 32 bits


def fail(where: str, value: Any, expected: str) -> None:
    """Raise ``ValueError`` saying what stands where, and what should."""
    raise ValueError(f"{where or 'the header'} is {repr(value)[:60]}, expected {expected}")


def whole(least: int = 0, most: int = MOST) -> Check:
    """A whole number within bounds."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            fail(where, value, f"a whole number from {least} to {most}")

    return check


def number(least: float = -1e30, most: float = 1e30) -> Check:
    """A finite number within bounds."""

    def check(value: Any, where: str) -> None:
        is_one = (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= 1 << 53)
        if not is_one or not least <= value <= most:
            fail(where, value, f"a number from {least} to {most}")

    return check


def flag(value: Any, where: str) -> None:
    """True or false."""
    if type(value) is not bool:
        fail(where, value, "true or false")


def text(value: Any, where: str) -> None:
    """A text of a line or so."""
    if type(value) is not str or len(value) > 4096:
        fail(where, value, "a short text")


def nothing(value: Any, where: str) -> None:
    """null."""
    if value is not None:
        fail(where, value, "null")


def either(*checks: Check) -> Check:
    """What one of ``checks`` takes."""

    def check(value: Any, where: str) -> None:
        said = []
        for one in checks:
            try:
                return one(value, where)
            except ValueError as error:
                said.append(str(error).rpartition("expected ")[2])
        return fail(where, value, " or ".join(said))

    return check


def each(item: Check, count: int | None = None) -> Check:
    """A list, ``count`` long if that is given."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list or (count is not None and len(value) != count):
            fail(where, value, "a list" if count is None else f"a list of {count}")
        for i, one in enumerate(value):
            item(one, f"{where}[{i}]")

    return check


def pair(first: Check, second: Check) -> Check:
    """A list of two."""

    def check(value: Any, where: str) -> None:
        each(lambda one, place: None, 2)(value, where)
        first(value[0], f"{where}[0]")
        second(value[1], f"{where}[1]")

    return check


def mapping(item: Check) -> Check:
    """An object with any names."""

    def check(value: Any, where: str) -> None:
        if type(value) is not dict:
            fail(where, value, "an object")
        for name, one in value.items():
            item(one, f"{where}.{name}"[:200])

    return check


def table(fields: Mapping[str, Check], may_lack: Iterable[str] = ()) -> Check:
    """An object with these fields and no others."""
    optional = set(may_lack)

    def check(value: Any, where: str) -> None:
        if type(value) is not dict:
            fail(where, value, "an object")
        if unknown := sorted(value.keys() - fields.keys()):
            raise ValueError(f"{where or 'the header'} has {', '.join(unknown)[:60]!r}, which is no field of it")
        if missing := sorted(fields.keys() - value.keys() - optional):
            raise ValueError(f"{where or 'the header'} has no {', '.join(missing)}")
        for name, one in value.items():
            fields[name](one, f"{where}.{name}" if where else name)

    return check


def plain(value: Any, where: str, depth: int = 0) -> None:
    """Any data of JSON that an option may be: numbers that are finite, short texts, at most five levels."""
    if depth > 5:
        fail(where, value, "at most five levels")
    if isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            plain(one, where, depth + 1)
    elif value is not None:
        either(flag, whole(-MOST), number(), text)(value, where)
