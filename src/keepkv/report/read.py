"""The directory of an evaluation as its rows, every value checked as it is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from keepkv.errors import KeepKVError
from keepkv.evaluation.fidelity.rows import FidelityRow
from keepkv.evaluation.leakage.rows import LeakageRow
from keepkv.evaluation.rows import CELLS, ITEMS, MAPS, RUN, SPEED, CellRow, ItemRow, MapRow, Run, SpeedRow, named
from keepkv.evaluation.summary import each_once
from keepkv.measure.files import files, read_rows, text_of
from keepkv.measure.rows import RowError

LEAKAGE, FIDELITY = "leakage.jsonl", "fidelity.jsonl"


class ReportError(KeepKVError, ValueError):
    """A directory that is not a finished evaluation, or a file in it that cannot be read."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that a directory holds."""

    directory: Path
    run: Run
    cells: list[CellRow]
    items: list[ItemRow]
    speed: list[SpeedRow]
    maps: list[MapRow]
    leakage: list[LeakageRow]
    fidelity: list[FidelityRow]


def read(directory: str | Path) -> Evaluation:
    """Reads run.json, cells.jsonl and items.jsonl, which must be there, and what else there is.

    Raises ``ReportError`` naming file, line and field where something is missing or not what it should be.
    """
    where = Path(directory).expanduser()
    if not where.is_dir():
        raise ReportError(
            f"{str(where)!r} is not a directory; give the one that an evaluation wrote (keepkv eval --out)"
        )
    missing = [name for name in (RUN, CELLS, ITEMS) if not files(where, name)]
    if missing:
        raise ReportError(
            f"{str(where)!r} has no {' and no '.join(missing)}: it is not an evaluation's, or the evaluation has not "
            "finished. Give the directory that keepkv eval --out wrote, after it has ended."
        )
    try:
        run = Run.from_line(text_of(where / RUN), RUN)
        found = Evaluation(
            where,
            replace(run, budgets=[run.named(one) for one in run.budgets]),
            named(read_rows(where, CELLS, CellRow), run),
            named(read_rows(where, ITEMS, ItemRow), run),
            named(read_rows(where, SPEED, SpeedRow), run),
            named(read_rows(where, MAPS, MapRow), run),
            read_rows(where, LEAKAGE, LeakageRow),
            read_rows(where, FIDELITY, FidelityRow),
        )
    except RowError as error:
        raise ReportError(str(error)) from error
    _check(found)
    return found


def _check(found: Evaluation) -> None:
    """What holds between rows."""
    if not found.cells:
        raise ReportError(f"{str(found.directory / CELLS)!r} is empty: there is nothing to report")
    try:
        each_once((*row.cell, row.seed) for row in found.items)
    except KeepKVError as error:
        raise ReportError(f"{str(found.directory / ITEMS)!r}: {error}") from error
    seen = set()
    for line, cell in enumerate(found.cells, 1):
        if cell.cell in seen:
            raise ReportError(f"{CELLS}, line {line}: {cell.method} at {cell.budget} on {cell.task} is there twice")
        seen.add(cell.cell)
    for line, one in enumerate(found.maps, 1):
        if len(one.tokens) != len(one.survival):
            raise ReportError(
                f"maps.jsonl, line {line}: {len(one.survival)} values of survival for {len(one.tokens)} tokens"
            )
