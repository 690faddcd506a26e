"""Cells: what the items of one task, length, mode, method and budget say together, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keepkv import tasks
from keepkv.errors import KeepKVError
from keepkv.evaluation.rows import CELLS, ITEMS, RUN, SPEED, CellRow, ItemRow, Run, SpeedRow, named
from keepkv.measure.files import read_rows, text_of, write
from keepkv.measure.interval import Estimate, bootstrap, mean, mean_low_high, mean_of_means
from keepkv.measure.rows import RowError

Key = tuple[Any, ...]


def summarise(folder: Path) -> list[CellRow]:
    """The cells of the evaluation in ``folder``, written to ``cells.jsonl`` and ``cells.csv``. Raises ``KeepKVError``
    where there is none, or where a row stands twice."""
    try:
        run = Run.from_line(text_of(folder / RUN), RUN)
    except RowError as error:
        raise KeepKVError(f"{str(folder)!r} holds no evaluation: {error}") from error
    items, speed = named(read_rows(folder, ITEMS, ItemRow), run), named(read_rows(folder, SPEED, SpeedRow), run)
    each_once((*row.cell, row.seed) for row in items)
    each_once((*row.cell, *row.seeds) for row in speed)
    found = cells(items, speed, run)
    write(found, folder, CELLS.partition(".")[0])
    return found


def each_once(places: Iterable[Key]) -> None:
    """Raise ``KeepKVError`` where a row, told by its cell and seed, stands twice: it would count twice, and intervals
    would be too narrow."""
    seen: set[Key] = set()
    for place in places:
        if place in seen:
            raise KeepKVError(
                f"a row stands twice: {', '.join(map(str, place))}. Two runs wrote to the same directory, or files "
                "were joined that share rows. Run the evaluation again with the same options, which leaves each row "
                "once; of files of peers, delete one."
            )
        seen.add(place)


def cells(items: Iterable[ItemRow], speed: Iterable[SpeedRow], run: Run) -> list[CellRow]:
    """One row per cell, in the order of their first items. run: what they were made with."""
    groups: dict[Key, list[ItemRow]] = defaultdict(list)
    for row in items:
        groups[row.cell].append(row)
    batches: dict[Key, list[SpeedRow]] = defaultdict(list)
    for batch in speed:
        batches[batch.cell].append(batch)
    full = {(*key[:3], row.seed): row.score for key, rows in groups.items() if key[3] == "full" for row in rows}
    return [_cell(rows, full, batches[key], run) for key, rows in groups.items()]


def per_second(batches: Sequence[SpeedRow]) -> tuple[float | None, float | None]:
    """Tokens read and written, all ``batches`` together."""
    read_s, written_s = sum(row.prefill_s for row in batches), sum(row.answer_s for row in batches)
    read = sum(row.tokens_read for row in batches) / read_s if read_s > 0 else None
    return read, sum(row.tokens_written for row in batches) / written_s if written_s > 0 else None


def over_tasks(scores: Mapping[str, Sequence[float]]) -> Estimate | None:
    """The score over all tasks, given the scores of each task's items: the mean of the tasks' means, each of the same
    weight, without tasks that are not to be pooled. None where fewer than two are left."""
    counted = [held for name, held in scores.items() if held and tasks.pooled(name)]
    return mean_of_means(counted) if len(counted) > 1 else None


def _cell(rows: list[ItemRow], full: dict[Key, float | None], batches: list[SpeedRow], run: Run) -> CellRow:
    first, scored = rows[0], [row for row in rows if row.score is not None and row.error is None]
    scores = [row.score or 0.0 for row in scored]
    whole = [full.get((*first.cell[:3], row.seed)) for row in scored]
    pairs = [a - b for a, b in zip(scores, whole, strict=True) if b is not None]
    score, low, high = mean_low_high(bootstrap(scores) if scores else None)
    minus, minus_low, minus_high = mean_low_high(bootstrap(pairs) if pairs else None)
    read, written = per_second(batches)
    return CellRow(
        task=first.task, length=first.length, mode=first.mode, method=first.method, budget=first.budget,
        n=len(scored), questions=sum(len(row.scores) for row in scored), failed=len(rows) - len(scored),
        score=score, low=low, high=high, minus_full=minus, minus_full_low=minus_low, minus_full_high=minus_high,
        ratio=mean([row.ratio for row in scored]), bytes=mean([row.bytes for row in scored]),
        full_bytes=mean([row.full_bytes for row in scored]), slots=mean([row.slots for row in scored]),
        tokens=mean([row.tokens for row in scored]),
        leaked=mean([leaked for row in scored for leaked in row.leaked]),
        peak_bytes=max((row.peak_bytes for row in batches if row.peak_bytes is not None), default=None),
        read_per_s=read, written_per_s=written,
        error=next((row.error for row in rows if row.error is not None), None), seed=run.seeds,
        made_with=run.made_with(first),
    )  # fmt: skip
