"""The directory of an evaluation as plain dataclasses, every value checked as it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from keepkv.errors import KeepKVError
from keepkv.evaluation.ledger import files, text_of

T = TypeVar("T")
Mode = Literal["agnostic", "aware", "decode"]
Asked = float | int | str  # a budget, as ``keepkv.Budget`` takes it


class ReportError(KeepKVError, ValueError):
    """A directory that is not a finished evaluation, or a file in it that cannot be read."""


@dataclass(frozen=True)
class Environment:
    """What the numbers were made with."""

    versions: dict[str, str]
    device: str
    dtype: str
    revision: str | None = None


@dataclass(frozen=True)
class Run:
    """What was asked of the evaluation. items: of each task, length and seed."""

    model: str
    tasks: list[str]
    lengths: list[int]
    modes: list[Mode]
    methods: list[str]
    budgets: list[Asked]
    items: int
    seeds: list[int]
    environment: Environment


@dataclass(frozen=True)
class Key:
    """Which cell a row belongs to."""

    task: str
    length: int
    mode: Mode
    method: str
    budget: Asked


@dataclass(frozen=True)
class Item(Key):
    """One item of a task. score in [0, 1], None where it failed, which ``error`` explains."""

    seed: int
    score: float | None
    error: str | None = None
    compressed: bool = True
    tags: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Speed(Key):
    """One batch. Times in seconds; tokens_read: of prompts; tokens_written: of replies."""

    prefill_s: float
    answer_s: float
    tokens_read: float
    tokens_written: float


@dataclass(frozen=True)
class Map(Key):
    """What was kept of one item. kept: slots by layer and KV head; survival: of each token, the share of (layer, head)
    that still hold it; tokens: their text."""

    seed: int
    kept: list[list[float]]
    survival: list[float]
    tokens: list[str]
    questions: list[str]
    answers: list[str]


@dataclass(frozen=True)
class Cell(Key):
    """Summary of a cell. n: items scored; failed: items that were not; low, high: 95 % interval of the score;
    minus_full: mean of the differences from the full cache, item by item; ratio: bytes / full_bytes. What is None is
    not known, or there was nothing to measure it on."""

    n: int
    failed: int
    score: float | None
    low: float | None
    high: float | None
    minus_full: float | None
    minus_full_low: float | None
    minus_full_high: float | None
    ratio: float | None
    bytes: float | None
    full_bytes: float | None
    peak_bytes: float | None
    read_per_s: float | None
    written_per_s: float | None
    leaked: float | None = None


@dataclass(frozen=True)
class Leakage:
    """Several instructions, some of them defended, compressed. removed: share of the prompt's slots that went;
    leak: share of replies that tell what the defence forbids; directive: share that follow the directive."""

    method: str
    order: str
    spans: str
    removed: float
    n: int
    leak: float | None
    leak_low: float | None
    leak_high: float | None
    directive: float | None
    directive_low: float | None
    directive_high: float | None
    keep_defence: float | None
    keep_directive: float | None


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, None where there are too few values to say."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Fidelity:
    """A row of ``keepkv fidelity``: see ``keepkv.evaluation.FidelityRow``."""

    method: str
    options: dict[str, Any]
    budget: Asked
    ratio: float
    segments: int
    context: int
    metrics: dict[str, Interval]


@dataclass(frozen=True)
class Evaluation:
    """Everything that a directory holds."""

    directory: Path
    run: Run
    cells: list[Cell]
    items: list[Item]
    speed: list[Speed]
    maps: list[Map]
    leakage: list[Leakage]
    fidelity: list[Fidelity]


def read(directory: str | Path) -> Evaluation:
    """Reads run.json, cells.jsonl and items.jsonl, which must be there, and what else there is.

    Raises ``ReportError`` naming file, line and field where something is missing or not what it should be.
    """
    where = Path(directory).expanduser()
    if not where.is_dir():
        raise ReportError(
            f"{str(where)!r} is not a directory; give the one that an evaluation wrote (keepkv eval --out)"
        )
    missing = [name for name in ("run.json", "cells.jsonl", "items.jsonl") if not files(where, name)]
    if missing:
        raise ReportError(
            f"{str(where)!r} has no {' and no '.join(missing)}: it is not an evaluation's, or the evaluation has not "
            "finished. Give the directory that keepkv eval --out wrote, after it has ended."
        )
    run = _value(Run, _parse(_text(where / "run.json"), "run.json"), "run.json")
    found = Evaluation(
        where,
        run,
        _rows(Cell, where, "cells.jsonl"),
        _rows(Item, where, "items.jsonl"),
        _rows(Speed, where, "speed.jsonl"),
        _rows(Map, where, "maps.jsonl"),
        _rows(Leakage, where, "leakage.jsonl"),
        _rows(Fidelity, where, "fidelity.jsonl"),
    )
    _check(found)
    return found


def _check(found: Evaluation) -> None:
    """What holds between rows."""
    if not found.cells:
        raise ReportError(f"{str(found.directory / 'cells.jsonl')!r} is empty: there is nothing to report")
    seen: set[Key] = set()
    for line, cell in enumerate(found.cells, 1):
        key = Key(cell.task, cell.length, cell.mode, cell.method, cell.budget)
        if key in seen:
            raise ReportError(f"cells.jsonl, line {line}: {key.method} at {key.budget} on {key.task} is there twice")
        seen.add(key)
    for line, one in enumerate(found.maps, 1):
        if len(one.tokens) != len(one.survival):
            raise ReportError(
                f"maps.jsonl, line {line}: {len(one.survival)} values of survival for {len(one.tokens)} tokens"
            )


def _text(path: Path) -> str:
    try:
        return text_of(path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ReportError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(
            f"{where}: not JSON ({error.msg} at column {error.colno}). A run that was cut off leaves a broken last "
            "line: let it finish, or delete that line."
        ) from error


def _rows(kind: type[T], where: Path, name: str) -> list[T]:
    """One for each line that is not empty; none where there is no such file."""
    found: list[T] = []
    for path in files(where, name):
        for number, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                here = f"{path.name}, line {number}"
                found.append(_value(kind, _parse(line, here), here))
    return found


def _value(kind: Any, given: Any, where: str, path: str = "") -> Any:
    """``given`` as ``kind``: a dataclass, a type of JSON, or a list, dict or union of those."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(given, dict):
            raise ReportError(f"{where}: {path or 'a row'} is {_show(given)}, not an object")
        return _made(kind, given, where, path)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is list and isinstance(given, list):
        return [_value(inner[0], one, where, f"{path}[{i}]") for i, one in enumerate(given)]
    if origin is dict and isinstance(given, dict):
        return {key: _value(inner[1], one, where, f"{path}.{key}") for key, one in given.items()}
    if origin is types.UnionType and dataclasses.is_dataclass(inner[0]) and given is not None:
        return _value(inner[0], given, where, path)
    if not _fits(kind, given):
        wanted = " or ".join(map(repr, inner)) if origin is Literal else str(getattr(kind, "__name__", kind))
        raise ReportError(f"{where}: {path} is {_show(given)}, expected {wanted}")
    # A number that is not one (a divergence may be infinite) is unknown to every figure.
    return None if isinstance(given, float) and not math.isfinite(given) and type(None) in inner else given


def _made(kind: Any, given: dict[str, Any], where: str, path: str) -> Any:
    values = {}
    for name, hint, needed in _fields(kind):
        if name in given:
            values[name] = _value(hint, given[name], where, f"{path}.{name}" if path else name)
        elif needed:
            raise ReportError(f"{where}: no {path + '.' if path else ''}{name}")
    return kind(**values)


@cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    """Name, type and whether it must be given, of each field of a dataclass."""
    hints, none = get_type_hints(kind), dataclasses.MISSING
    return [(f.name, hints[f.name], f.default is none and f.default_factory is none) for f in dataclasses.fields(kind)]


def _fits(kind: Any, given: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return given in get_args(kind)
    if get_origin(kind) is types.UnionType:
        return any(_fits(one, given) for one in get_args(kind))
    if isinstance(given, bool):
        return kind is bool
    return isinstance(given, (int, float) if kind is float else kind)


def _show(given: Any) -> str:
    text = json.dumps(given)
    return text if len(text) <= 40 else text[:37] + "..."
