"""Scores over all tasks, from the items of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

from keepkv import tasks
from keepkv.evaluation.rows import CellKey, CellRow, ItemRow
from keepkv.evaluation.summary import over_tasks, per_second
from keepkv.measure.interval import mean, mean_low_high
from keepkv.report.budgets import budget_label
from keepkv.report.read import Evaluation

ALL = "all tasks"
K = TypeVar("K", bound=CellKey)
Short = dict[tuple[str, int], tuple[int, int]]  # items given and wanted, by mode and length


def pooled(evaluation: Evaluation) -> tuple[list[CellRow], dict[str, Short]]:
    """One cell for each mode, length, method and budget, over all tasks (``over_tasks``), a failed item as 0.

    The same items are drawn for every method: differences are paired. A method that was not given all of the items has
    no pooled score: what it was given is returned beside.
    """
    panels: dict[tuple[str, int], dict[tuple[str, str], dict[tuple[str, int], ItemRow]]] = defaultdict(dict)
    for item in filter(lambda item: tasks.pooled(item.task), evaluation.items):
        own = panels[item.mode, item.length].setdefault((item.method, budget_label(item.budget)), {})
        own[item.task, item.seed] = item
    batches, parts = _grouped(evaluation.speed), _grouped(evaluation.cells)
    made = []
    short: dict[str, Short] = defaultdict(dict)
    for (mode, length), groups in panels.items():
        wanted = sorted(set().union(*groups.values()))
        if len({task for task, _ in wanted}) < 2:
            continue
        full = next((items for (method, _), items in groups.items() if method == "full"), {})
        for (method, budget), items in groups.items():
            if len(items) < len(wanted):
                short[method].setdefault((mode, length), (len(items), len(wanted)))
                continue
            scores, pairs = defaultdict(list), defaultdict(list)
            for key in wanted:
                scores[key[0]].append(items[key].score or 0.0)
                if len(full) == len(wanted):
                    pairs[key[0]].append((items[key].score or 0.0) - (full[key].score or 0.0))
            score, low, high = mean_low_high(over_tasks(scores))
            minus, minus_low, minus_high = mean_low_high(over_tasks(pairs))
            of = [cell for cell in parts[mode, length, method, budget] if tasks.pooled(cell.task)]
            read, written = per_second(batches[mode, length, method, budget])
            made.append(
                CellRow(
                    task=ALL, length=length, mode=next(iter(items.values())).mode, method=method,
                    budget=next(iter(items.values())).budget, n=len(wanted),
                    failed=sum(one.score is None for one in items.values()), score=score, low=low, high=high,
                    minus_full=minus, minus_full_low=minus_low, minus_full_high=minus_high,
                    ratio=mean(c.ratio for c in of), bytes=mean(c.bytes for c in of),
                    full_bytes=mean(c.full_bytes for c in of),
                    peak_bytes=max((c.peak_bytes for c in of if c.peak_bytes is not None), default=None),
                    read_per_s=read, written_per_s=written, made_with=evaluation.run.environment,
                )
            )  # fmt: skip
    return made, short


def _grouped(rows: Iterable[K]) -> dict[tuple[str, int, str, str], list[K]]:
    """Rows by mode, length, method and budget: those of all tasks together."""
    found: dict[tuple[str, int, str, str], list[K]] = defaultdict(list)
    for row in rows:
        found[row.mode, row.length, row.method, budget_label(row.budget)].append(row)
    return found
