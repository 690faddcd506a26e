"""Numbers as they are shown: with their intervals, and with units that fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from keepkv.characterize.record.names import metric
from keepkv.characterize.record.rows import PointRow, ResultRow

NOTHING = "n/a"
SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "J": ((1.0, "J"), (1e-3, "mJ")),
}


def number(value: float | None, unit: str = "") -> str:
    """Three digits and a unit that fits; ``n/a`` for what was not measured."""
    if value is None:
        return NOTHING
    factor, name = _scale(value, unit)
    return f"{_digits(value / factor)} {name}".rstrip()


def measured(row: ResultRow, name: str) -> str:
    """A metric with its interval, in one unit."""
    found = row.metrics.get(name)
    if found is None or found.low is None or found.high is None:
        return number(None if found is None else found.mean, metric(name).unit)
    factor, unit = _scale(found.mean, metric(name).unit)
    low, high = (_digits(x / factor) for x in (found.low, found.high))
    return f"{_digits(found.mean / factor)} ({low} to {high}) {unit}".rstrip()


def _scale(value: float, unit: str) -> tuple[float, str]:
    """What to divide by, and what it is then in; units without smaller ones stand in headings."""
    fits = [one for one in SCALES.get(unit, ()) if abs(value) >= one[0]]
    return fits[0] if fits else (1.0, unit if unit in SCALES else "")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shown(place: Iterable[str]) -> list[str]:
    """Parts of a place or a choice, a file by its name alone."""
    return [
        " ".join(Path(word).name if "/" in word and Path(word).suffix else word for word in x.split(" ")) for x in place
    ]


def made_with(points: Iterable[PointRow]) -> dict[str, str]:
    """What rows were made with, each value once."""
    found: dict[str, dict[str, None]] = {}
    for one in points:
        made = one.made_with
        said = {
            "Model": made.model or "unknown", "Device": f"{made.device}, {made.dtype}", "Machine": one.machine,
            "Versions": ", ".join(f"{name} {x}" for name, x in made.versions.items()),
            "Revision": (made.revision or "unknown")[:16], "Energy": one.energy_source,
        }  # fmt: skip
        for name, value in said.items():
            if value:
                found.setdefault(name, {})[value] = None
    return {name: "; ".join(values) for name, values in found.items()}
