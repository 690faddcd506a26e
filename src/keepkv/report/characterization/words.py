"""Numbers as they are shown: with their intervals, and with units that fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from keepkv.characterize.record.names import metric
from keepkv.characterize.record.rows import PointRow, ResultRow
from keepkv.measure.interval import Estimate

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
    for factor, name in SCALES.get(unit, ()):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value:.3g}" + (f" {unit}" if unit else "")


def measured(row: ResultRow, name: str) -> str:
    """A metric with its interval."""
    found, unit = row.metrics.get(name), metric(name).unit
    return estimate(found, unit)


def estimate(found: Estimate | None, unit: str) -> str:
    if found is None:
        return NOTHING
    if found.low is None or found.high is None:
        return number(found.mean, unit)
    return f"{number(found.mean, unit)} ({number(found.low, unit)} to {number(found.high, unit)})"


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
