"""Options: what a piece takes is said once, by the annotation of its field, and checked when the piece is made.

    window: Window = 32
    pooling: Annotated[str, one_of("avg", "max")] = "avg"
    ridge: Annotated[float, above(0)] = 1.0

A type alone is checked too: ``int`` takes whole numbers but no bool, ``float`` takes finite numbers, a class its
instances. Numbers of numpy become plain ones, so that options can be compared and written to files.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from keepkv.errors import KeepKVError

MOST = 2**31 - 1  # of whole numbers that count tokens or slots: positions are int32
LARGE = 1e9  # of numbers without a scale: what float32 can square, and can divide by
UNFIT = object()  # what ``fitted`` makes of a value that is refused


@dataclass(frozen=True)
class Rule:
    """What an option must be beyond its type, in an ``Annotated``: ``words`` say what ``holds`` asks of a value."""

    words: str
    holds: Callable[[Any], bool]


def between(least: float, most: float) -> Rule:
    """Numbers from ``least`` to ``most``, both included."""
    return Rule(f"from {least} to {most}", lambda x: least <= x <= most)


def at_least(least: float) -> Rule:
    """Numbers that are not below ``least``."""
    return Rule(f"of at least {least}", lambda x: least <= x)


def above(bound: float) -> Rule:
    """Numbers larger than ``bound``."""
    return Rule(f"above {bound}", lambda x: bound < x)


def below(bound: float) -> Rule:
    """Numbers smaller than ``bound``."""
    return Rule(f"and below {bound}", lambda x: x < bound)


def one_of(*known: str) -> Rule:
    """One of these names."""
    return Rule(f"one of {', '.join(map(repr, known))}", lambda x: x in known)


Count = Annotated[int, between(0, MOST)]
Size = Annotated[int, between(1, MOST)]
Window = Annotated[int, between(1, 2**16)]  # queries that are remembered
Queries = Annotated[int, between(0, 2**16)]  # the same, or none
Kernel = Annotated[int, between(1, 2**16), Rule("that is odd", lambda x: x % 2 == 1)]  # slots of a neighbourhood
Seed = Annotated[int, between(-(2**63), 2**63 - 1)]
Share = Annotated[float, between(0, 1)]
Cosine = Annotated[float, between(-2, 2)]  # a threshold of cosines; above 1 none reaches it
Rate = Annotated[float, between(1 / LARGE, 1)]
Amount = Annotated[float, between(0, LARGE)]
Positive = Annotated[float, between(1 / LARGE, LARGE)]


class Checked:
    """Base of dataclasses whose fields are checked when they are made. One that has a ``__post_init__`` of its own
    calls that of this class first."""

    refusal: ClassVar[type[KeepKVError]] = KeepKVError
    form: ClassVar[str | None] = None  # how one is written, for messages that ask for one

    def __post_init__(self) -> None:
        check(self)


def check(piece: Checked) -> None:
    """Refuse fields of ``piece`` that do not fit, those of pieces in it too, with the error that its class names."""
    kind: Any = type(piece)
    hints, owner = hints_of(kind), kind.__name__
    for name in (x.name for x in fields(kind) if x.init) if is_dataclass(kind) else ():
        object.__setattr__(piece, name, taken(owner, name, getattr(piece, name), hints[name], piece.refusal))


def arguments(owner: str, factory: Callable[..., Any], *given: Any, **options: Any) -> inspect.BoundArguments:
    """Arguments of ``factory`` with its defaults, each fitting its annotation; ``KeepKVError`` says which do not."""
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(*given, **options)
    except TypeError as error:
        known = ", ".join(n for n, p in signature.parameters.items() if p.default is not p.empty) or "none"
        raise KeepKVError(f"{owner}: {error}. Its options: {known}.") from error
    bound.apply_defaults()
    hints = hints_of(factory)
    for name, value in bound.arguments.items():
        if name in hints:
            bound.arguments[name] = taken(owner, name, value, hints[name])
    return bound


def keywords(owner: str, name: str, value: Any) -> dict[str, Any]:
    """``value`` as a dict of options by name, empty for None."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise KeepKVError(f"{owner}: {name}={shown(value)} is not a dict of options by name")
    return dict(value or {})


def taken(owner: str, name: str, value: Any, hint: Any, refusal: type[KeepKVError] = KeepKVError) -> Any:
    """``value`` as an option that is annotated with ``hint``; raises ``refusal`` where it does not fit."""
    found = fitted(hint, value)
    if found is UNFIT:
        raise refusal(f"{owner}: {name}={shown(value)} is not {words(hint)}")
    return found


def fitted(hint: Any, value: Any) -> Any:
    """``value`` as the annotation ``hint`` takes it, or ``UNFIT``. Annotations of other kinds take anything."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *rules = get_args(hint)
        found = fitted(inner, value)
        kept = found is not UNFIT and all(rule.holds(found) for rule in rules if isinstance(rule, Rule))
        return found if kept else UNFIT
    if origin in (Union, UnionType):
        return next((x for one in get_args(hint) if (x := fitted(one, value)) is not UNFIT), UNFIT)
    if hint in (int, float):
        return _number(hint, value)
    kind = origin or hint
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return value
    if isinstance(value, Checked):
        check(value)
    return value if isinstance(value, kind) else UNFIT


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return UNFIT
    try:
        number = kind(value)
    except (OverflowError, ValueError):
        return UNFIT
    return number if kind is int or math.isfinite(number) else UNFIT


def words(hint: Any) -> str:
    """What ``fitted`` takes, in English."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *rules = get_args(hint)
        said = [rule.words for rule in rules if isinstance(rule, Rule)]
        return " ".join(said if inner is str and said else [words(inner), *said])
    if origin in (Union, UnionType):
        return " or ".join(words(one) for one in get_args(hint))
    plain: dict[Any, str] = {
        int: "a whole number", float: "a finite number", bool: "True or False", str: "a text", NoneType: "None",
    }  # fmt: skip
    kind = origin or hint
    return plain.get(kind) or getattr(kind, "form", None) or f"an object of type {getattr(kind, '__name__', kind)}"


def shown(value: Any) -> str:
    """``repr(value)`` in one short line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}…"


@cache
def hints_of(made: Any) -> Mapping[str, Any]:
    """Annotations of a class's fields or a function's arguments; a name in them that is not known here, as one that
    only type checkers import, takes anything."""
    if isinstance(made, type) and not is_dataclass(made):
        made = getattr(made, "__init__")  # noqa: B009
    unknown: dict[str, Any] = {}
    while True:
        try:
            return get_type_hints(made, localns=unknown or None, include_extras=True)
        except NameError as error:
            unknown[str(error.name)] = Any
