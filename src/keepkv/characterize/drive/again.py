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
    """A metric, before and now; share: by which it is larger now, None where it was 0."""

    name: str
    before: float
    now: float

    @property
    def share(self) -> float | None:
        return self.now / self.before - 1 if self.before else None


def again(
    run: Run, row: ResultRow, names: tuple[str, ...], step: Step = lambda points, what: None,
    command: list[str] | None = None,
) -> list[Change]:  # fmt: skip
    """Measures ``row`` of ``run`` again, with the same requests, and its baseline beside it, in the folder ``again``;
    what was measured there before is not measured anew. Returns the metrics ``names``.

    Raises ``KeepKVError`` where it cannot be measured, or gives nothing now.
    """
    specs = [Point.from_dict(point.spec) for point in run.points if point.point in row.points and point.spec]
    if not specs:
        raise KeepKVError(f"{row.choice} was measured by another tool, and cannot be measured again here")
    base = specs[0].as_baseline("baseline", specs[0].block)
    points = [base, *(point for point in specs if point != base)]
    folder = Path(run.folder) / FOLDER
    characterize(Grid.from_dict(run.grid), folder, step, only=points, command=command)
    found = [one.row for one in choices(read(folder)) if one.row.choice == row.choice and one.row.place == row.place]
    if not found or found[0].status != "ok":
        raise KeepKVError(f"{row.choice} gave nothing this time: {found[0].error if found else 'no row'}")
    pairs = [(name, row.value(name), found[0].value(name)) for name in names]
    return [Change(name, before, now) for name, before, now in pairs if before is not None and now is not None]
