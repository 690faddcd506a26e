"""Rows of results: a dataclass declares what a line of JSON holds, and both who writes it and who reads it use that."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from keepkv.core.when import When
from keepkv.errors import KeepKVError

R = TypeVar("R", bound="Row")
# Metadata of a field. INLINE: a dataclass whose fields stand in the row itself, or a dict with every name of the row
# that no other field has. IF_KNOWN: left out of the row where it is None.
INLINE, IF_KNOWN = {"inline": True}, {"if known": True}


class RowError(KeepKVError, ValueError):
    """A row is not what its type declares."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. A subclass declares its fields: numbers, texts, None, dataclasses, and lists, tuples and dicts
    of those."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        made: dict[str, Any] = plain(self)
        return made

    def flat(self) -> dict[str, Any]:
        """One column for each number: for tables."""
        return self.to_dict()

    @classmethod
    def from_dict(cls: type[R], given: Any, where: str = "a row") -> R:
        """The row that ``to_dict`` gave; names that no field has are left out. Raises ``RowError``, which begins with
        ``where``, for a field that is missing or of another type."""
        try:
            kind: Any = cls
            made: R = _reader(kind)(given)
        except _Misfit as wrong:
            path = wrong.path.removeprefix(".") or "a row"
            raise RowError(f"{where}: {wrong.before}{path}{wrong.after}") from None
        return made

    @classmethod
    def from_line(cls: type[R], line: str, where: str) -> R:
        """The row in a line of JSON. Raises ``RowError`` as ``from_dict`` does, and where the line is not JSON."""
        return cls.from_dict(object_of(line, where), where)


def object_of(text: str, where: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises ``RowError``, which begins with ``where``, where that is something else."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RowError(f"{where}: not JSON that can be read ({type(error).__name__})") from error
    if not isinstance(given, dict):
        raise RowError(f"{where}: a row is {_show(given)}, not an object")
    return given


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses as objects, and what is unknown as its ``repr``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            mine = getattr(value, field.name)
            if "inline" in field.metadata:
                made |= plain(mine)
            elif mine is not None or "if known" not in field.metadata:
                made[field.name] = plain(mine)
        return made
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def method_label(method: str, options: dict[str, Any]) -> str:
    """Method and options as the command line takes them: ``keepkv:key=zip``, ``keepkv2:codec=int4,codec.bits=8``."""
    pairs = []
    for name, value in options.items():
        if name in ("store_options", "codec_options", "select_options") and isinstance(value, dict):
            pairs += [(f"{name.removesuffix('_options')}.{key}", one) for key, one in value.items()]
        elif isinstance(value, When):
            pairs += [(f"{name}.{key}", one) for key, one in _changed(method, value)]
        else:
            pairs.append((name, value))
    text = ",".join(f"{key}={value}" for key, value in pairs)
    return f"{method}:{text}" if text else method


def _changed(method: str, when: When) -> list[tuple[str, Any]]:
    """What of a schedule is not as ``method`` has it by itself."""
    from keepkv.methods import METHODS, method_info  # later: whoever reads rows need not load them

    usual = method_info(method).options.get("when") if method in METHODS else None
    usual = usual if isinstance(usual, When) else When()
    changed = [(key, one) for key, one in vars(when).items() if one != getattr(usual, key)]
    return [(key, "none" if one is None else one) for key, one in changed]


class _Misfit(Exception):
    """A value is not as declared. before, after: what is said around ``path``, which leads to it, outermost first."""

    def __init__(self, before: str, after: str) -> None:
        self.before, self.path, self.after = before, "", after


Read = Callable[[Any], Any]  # plain data as a value of some type; raises ``_Misfit``


@cache
def _reader(kind: Any) -> Read:
    """What reads a value of type ``kind``. A type is looked at once, for results have a hundred thousand rows."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _object(kind)
    if origin is types.UnionType and types.NoneType in inner:
        rest = [one for one in inner if one is not types.NoneType]
        return _known(_reader(rest[0]) if len(rest) == 1 else _plain(kind))
    if origin in (list, tuple):
        return _many(kind, origin, _reader(inner[0]))
    if origin is dict:
        return _named(kind, inner[0], _reader(inner[1]))
    return _plain(kind)


def _object(kind: Any) -> Read:
    """Reads a dataclass."""
    hints, none, inside = get_type_hints(kind), dataclasses.MISSING, _names(kind)
    own, inline = [], []
    for f in dataclasses.fields(kind):
        read, needed = _reader(hints[f.name]), f.default is none and f.default_factory is none
        if "inline" in f.metadata:
            inline.append((f.name, read, dataclasses.is_dataclass(hints[f.name])))
        else:
            own.append((f.name, read, needed))

    def row(given: Any) -> Any:
        if type(given) is kind:
            return given
        if not isinstance(given, dict):
            raise _Misfit("", f" is {_show(given)}, not an object")
        values, name = {}, ""
        try:
            for name, read, needed in own:
                if name in given:
                    values[name] = read(given[name])
                elif needed:
                    raise _Misfit("no ", "")
        except _Misfit as error:
            error.path = f".{name}{error.path}"
            raise
        for name, read, whole in inline:
            values[name] = read(given if whole else {key: one for key, one in given.items() if key not in inside})
        return kind(**values)

    return row


def _known(read: Read) -> Read:
    """Reads what may be None; a number that is not one (a divergence may be infinite) is unknown too."""

    def known(given: Any) -> Any:
        return None if given is None or (type(given) is float and not math.isfinite(given)) else read(given)

    return known


def _many(kind: Any, origin: Any, read: Read) -> Read:
    """Reads a list, or a tuple of one type, from a list."""
    otherwise = _plain(kind)

    def many(given: Any) -> Any:
        if not isinstance(given, list):
            return otherwise(given)
        made: list[Any] = []
        try:
            for one in given:
                made.append(read(one))
        except _Misfit as error:
            error.path = f"[{len(made)}]{error.path}"
            raise
        return origin(made)

    return many


def _named(kind: Any, of: Any, read: Read) -> Read:
    """Reads a dict; ``of`` makes a key of a name."""
    otherwise = _plain(kind)

    def named(given: Any) -> Any:
        if not isinstance(given, dict):
            return otherwise(given)
        made, key = {}, None
        try:
            for key, one in given.items():
                made[of(key)] = read(one)
        except _Misfit as error:
            error.path = f".{key}{error.path}"
            raise
        return made

    return named


def _plain(kind: Any) -> Read:
    """Takes a value as it is where ``kind`` allows it."""
    inner = get_args(kind) if get_origin(kind) is types.UnionType else (kind,)
    exact = {one for one in inner if one in (bool, int, float, str)} | ({int} if float in inner else set())

    def plain_value(given: Any) -> Any:
        if type(given) not in exact and not _fits(kind, given):
            either = " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else None
            raise _Misfit("", f" is {_show(given)}, expected {either or getattr(kind, '__name__', kind)}")
        return given

    return plain_value


@cache
def _names(kind: Any) -> set[str]:
    """Names that stand in a row of ``kind``."""
    hints, found = get_type_hints(kind), set[str]()
    for f in dataclasses.fields(kind):
        if "inline" not in f.metadata:
            found.add(f.name)
        elif dataclasses.is_dataclass(hints[f.name]):
            found |= _names(hints[f.name])
    return found


def _fits(kind: Any, given: Any) -> bool:
    if kind is Any:
        return True
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return given in inner
    if origin is types.UnionType:
        return any(_fits(one, given) for one in inner)
    if isinstance(given, bool):
        return kind is bool
    return isinstance(given, (int, float) if kind is float else origin or kind)


def _show(given: Any) -> str:
    text = json.dumps(given)
    return text if len(text) <= 40 else text[:37] + "..."
