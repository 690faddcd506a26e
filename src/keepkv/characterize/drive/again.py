"""A choice that was recommended, measured once more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keepkv.characterize.drive.run import Step, characterize
from keepkv.characterize.grid.levels import Point
from keepkv.characterize.grid.read import Grid
from keepkv.characterize.record.folder import Run, read
from keepkv.characterize.record.rows import ResultRow
from keepkv.characterize.record.summary import choices
from keepkv.errors import KeepKVError

FOLDER = "again"


@dataclass(frozen=True)
class Change:
    """A metric, before and now. base_before, base_now: that of the baseline, measured beside it each time."""

    name: str
    before: float
    now: float
    base_before: float | None = None
    base_now: float | None = None

    @property
    def share(self) -> float | None:
        """By which it is larger now; None where it was 0."""
        return self.now / self.before - 1 if self.before else None

    @property
    def beside(self) -> float | None:
        """By which it is larger now beside the baseline, so that a machine which is slower now counts on both sides;
        None where one of them is 0 or was not measured."""
        if not (self.before and self.base_before and self.base_now):
            return None
        return self.now / self.base_now / (self.before / self.base_before) - 1


def again(
    run: Run, row: ResultRow, names: tuple[str, ...], step: Step = lambda points, what: None,
    command: list[str] | None = None,
) -> list[Change]:  # fmt: skip
    """Measures ``row`` of ``run`` again, with the same requests, and before each point the baseline of its seed, in a
    folder of its own in ``again``, named by its first point; what was measured there before is not measured anew.
    Returns the metrics ``names``.

    Raises ``KeepKVError`` where it cannot be measured, or gives nothing now.
    """
    specs = [Point.from_dict(point.spec) for point in run.points if point.point in row.points and point.spec]
    if not specs:
        raise KeepKVError(f"{row.choice} was measured by another tool, and cannot be measured again here")
    points: list[Point] = []
    for spec in specs:
        base = spec.as_baseline("baseline", spec.block)
        points += [base] if spec == base else [base, spec]
    folder = Path(run.folder) / FOLDER / row.points[0]  # no baseline of another time beside it
    characterize(Grid.from_dict(run.grid), folder, step, only=points, command=command)
    found, beside = _rows(read(folder), row)
    if found is None or found.status != "ok":
        raise KeepKVError(f"{row.choice} gave nothing this time: {found.error if found else 'no row'}")
    return _changes((row, found), (_rows(run, row)[1], beside), names)


Pair = tuple[ResultRow | None, ResultRow | None]


def _rows(run: Run, like: ResultRow) -> Pair:
    """Of ``run`` the rows of the choice of ``like``, and of the baseline at its place."""
    here = [one.row for one in choices(run) if one.row.place == like.place]
    chosen = next((row for row in here if row.choice == like.choice), None)
    return chosen, next((row for row in here if row.is_baseline and row.status == "ok"), None)


def _changes(chosen: tuple[ResultRow, ResultRow], base: Pair, names: tuple[str, ...]) -> list[Change]:
    """Of each of ``names`` that was measured both times. chosen, base: before and now."""
    found = []
    for name in names:
        before, now = (row.value(name) for row in chosen)
        beside = (None if row is None else row.value(name) for row in base)
        if before is not None and now is not None:
            found.append(Change(name, before, now, *beside))
    return found
