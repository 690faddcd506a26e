"""The directory of a run: appended to, never changed, and read again after a kill as if there had been none."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepkv.characterize.grid.levels import SCHEMA
from keepkv.characterize.record.migrate import migrated
from keepkv.characterize.record.rows import POINTS, REQUESTS, RUN, PointRow, RequestRow
from keepkv.errors import KeepKVError
from keepkv.measure.files import text_of
from keepkv.measure.ledger import Ledger, replace_text
from keepkv.measure.rows import object_of


@dataclass
class Run:
    """What a directory holds. grid: as ``run.json`` has it, limits among it; dropped: points that could not be run,
    with the reason. requests: of each point, by its digest."""

    folder: Path
    grid: dict[str, Any]
    dropped: list[dict[str, str]] = field(default_factory=list)
    points: list[PointRow] = field(default_factory=list)
    requests: dict[str, list[RequestRow]] = field(default_factory=dict)

    @property
    def limits(self) -> dict[str, float]:
        """Seconds that a request must keep, by name."""
        return dict(self.grid.get("limits") or {})


def begin(folder: Path, grid: dict[str, Any], dropped: list[dict[str, str]]) -> None:
    """Write ``run.json``. Raises ``KeepKVError`` where ``folder`` holds the run of another grid."""
    path = folder / RUN
    asked = json.loads(json.dumps({"schema": SCHEMA, "grid": grid, "dropped": dropped}))
    if path.exists():
        held = migrated(object_of(text_of(path), RUN), RUN)
        if held["grid"] != asked["grid"]:
            changed = sorted(key for key in {*held["grid"], *grid} if held["grid"].get(key) != asked["grid"].get(key))
            raise KeepKVError(
                f"{str(folder)!r} holds the run of another grid, which differs in {', '.join(changed)}: give another "
                "directory, or the same grid to go on"
            )
        return
    if (folder / POINTS).exists():
        raise KeepKVError(f"{str(folder)!r} has {POINTS} without {RUN}: give another directory")
    replace_text(path, json.dumps(asked, indent=1) + "\n")


def done(folder: Path) -> set[str]:
    """Digests of the points that are recorded. Requests of a point that was cut off are taken out: a point counts when
    its own row is written, which comes last."""
    held = {row.point for row in Ledger(folder / POINTS, PointRow).rows()}
    Ledger(folder / REQUESTS, RequestRow).keep(lambda row: row.point in held)
    return held


def add(folder: Path, point: PointRow, requests: Iterable[RequestRow]) -> None:
    """Record a point and its requests."""
    Ledger(folder / REQUESTS, RequestRow).append(requests)
    Ledger(folder / POINTS, PointRow).append([point])


def read(folder: str | Path) -> Run:
    """The run in ``folder``, rows of older schemas made ones of this. Raises ``KeepKVError`` where there is none."""
    where = Path(folder).expanduser()
    if not (where / RUN).is_file() and not (where / POINTS).is_file():
        raise KeepKVError(f"{str(folder)!r} holds no run of keepkv characterize: there is no {RUN}")
    held: dict[str, Any] = {"grid": {}}
    if (where / RUN).is_file():
        held = migrated(object_of(text_of(where / RUN), RUN), RUN)
    run = Run(where, held["grid"], held.get("dropped", []))
    run.points = [PointRow.from_dict(migrated(row, POINTS), POINTS) for row in _lines(where / POINTS)]
    for row in _lines(where / REQUESTS):
        made = RequestRow.from_dict(migrated(row, REQUESTS), REQUESTS)
        run.requests.setdefault(made.point, []).append(made)
    return run


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file() and path.with_name(f"{path.name}.gz").is_file():
        path = path.with_name(f"{path.name}.gz")
    if not path.is_file():
        return []
    lines = text_of(path).split("\n")[:-1]  # a line without an end is what a kill left
    return [object_of(line, f"{path.name}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
