"""Rows of results: a dataclass declares what a line of JSON holds, and both who writes it and who reads it use that."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
        made: R = _value(cls, given, where, "")
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
        if name in ("store_options", "codec_options") and isinstance(value, dict):
            pairs += [(f"{name.removesuffix('_options')}.{key}", one) for key, one in value.items()]
        else:
            pairs.append((name, value))
    text = ",".join(f"{key}={value}" for key, value in pairs)
    return f"{method}:{text}" if text else method


def _value(kind: Any, given: Any, where: str, path: str) -> Any:
    """``given`` as ``kind``. path: of the value within the row."""
    if type(given) is kind:
        return given
    if _is_row(kind):
        if not isinstance(given, dict):
            raise RowError(f"{where}: {path or 'a row'} is {_show(given)}, not an object")
        return _made(kind, given, where, path)
    origin, inner = _parts(kind)
    if origin is types.UnionType and types.NoneType in inner:
        # A number that is not one (a divergence may be infinite) is unknown.
        if given is None or (isinstance(given, float) and not math.isfinite(given)):
            return None
        rest = [one for one in inner if one is not types.NoneType]
        if len(rest) == 1:
            return _value(rest[0], given, where, path)
    if origin in (list, tuple) and isinstance(given, list):
        return origin(_value(inner[0], one, where, f"{path}[{i}]") for i, one in enumerate(given))
    if origin is dict and isinstance(given, dict):
        of, kinds = inner
        return {of(key): _value(kinds, one, where, _join(path, key)) for key, one in given.items()}
    if not _fits(kind, given):
        wanted = " or ".join(map(repr, inner)) if origin is Literal else str(getattr(kind, "__name__", kind))
        raise RowError(f"{where}: {path} is {_show(given)}, expected {wanted}")
    return given


def _made(kind: Any, given: dict[str, Any], where: str, path: str) -> Any:
    values = {}
    for name, hint, needed, inline in _fields(kind):
        if inline:
            mine = given if _is_row(hint) else {key: one for key, one in given.items() if key not in _names(kind)}
            values[name] = _value(hint, mine, where, path)
        elif name in given:
            values[name] = _value(hint, given[name], where, _join(path, name))
        elif needed:
            raise RowError(f"{where}: no {_join(path, name)}")
    return kind(**values)


@cache
def _fields(kind: Any) -> list[tuple[str, Any, bool, bool]]:
    """Name, type, whether it must be given, and whether it stands inline, of each field of a dataclass."""
    hints, none = get_type_hints(kind), dataclasses.MISSING
    return [
        (f.name, hints[f.name], f.default is none and f.default_factory is none, "inline" in f.metadata)
        for f in dataclasses.fields(kind)
    ]


@cache
def _names(kind: Any) -> set[str]:
    """Names that stand in a row of ``kind``."""
    fields = _fields(kind)
    nested: list[set[str]] = [_names(hint) for _, hint, _, inline in fields if inline and _is_row(hint)]
    return {name for name, _, _, inline in fields if not inline}.union(*nested)


@cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


def _is_row(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _fits(kind: Any, given: Any) -> bool:
    if kind is Any:
        return True
    origin, inner = _parts(kind)
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
