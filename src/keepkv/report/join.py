"""Several directories as one evaluation: what they hold of the same cells must agree, and is counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from keepkv.evaluation.rows import RUN, ItemRow, Stage
from keepkv.evaluation.summary import cells
from keepkv.measure.files import text_of
from keepkv.measure.rows import object_of
from keepkv.report.read import Evaluation, ReportError

T = TypeVar("T")
SETTINGS = ("model", "sinks", "window", "every", "plain", "slack", "questions")  # of a run, which change its scores


def join(parts: Sequence[Evaluation]) -> Evaluation:
    """``parts`` as one, in their order. Raises ``ReportError`` where they are of different models, devices or settings,
    or where one row has two scores."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        _check(first, other)
    stages: list[Stage] = []
    items: list[ItemRow] = []
    for part in parts:
        items += [replace(row, stage=len(stages) + (row.stage or 0)) for row in part.items]
        stages += part.run.stages or [Stage(environment=part.run.environment)]
    runs = [part.run for part in parts]
    run = replace(
        first.run,
        tasks=_union(one.tasks for one in runs),
        lengths=_union(one.lengths for one in runs),
        modes=_union(one.modes for one in runs),
        methods=_union(one.methods for one in runs),
        budgets=_union(one.budgets for one in runs),
        items=max(one.items for one in runs),
        seeds=_union(one.seeds for one in runs),
        stages=stages,
    )
    items = _once(items, lambda row: (*row.cell, row.seed), lambda row: row.scores or row.score)
    speed = _once(chain(*(part.speed for part in parts)), lambda row: (*row.cell, *row.seeds))
    return Evaluation(
        first.directory,
        run,
        cells(items, speed, run),
        items,
        speed,
        _once(chain(*(part.maps for part in parts)), lambda row: row.cell),
        _once(
            chain(*(part.leakage for part in parts)),
            lambda row: (row.method, row.order, row.spans, row.removed),
            lambda row: (row.n, row.leak, row.directive),
        ),
        _once(
            chain(*(part.fidelity for part in parts)),
            lambda row: (row.label, row.budget, row.context),
            lambda row: {name: one.mean for name, one in row.metrics.items()},
        ),
    )


def _check(first: Evaluation, other: Evaluation) -> None:
    ours, theirs = (object_of(text_of(one.directory / RUN), RUN) for one in (first, other))
    differ = [name for name in SETTINGS if ours.get(name) != theirs.get(name)]
    here, there = first.run.environment, other.run.environment
    differ += [name for name in ("device", "dtype") if getattr(here, name) != getattr(there, name)]
    if differ:
        raise ReportError(
            f"{str(first.directory)!r} and {str(other.directory)!r} differ in {', '.join(differ)}: their scores do not "
            "belong into one table. Give directories of one model and one setting."
        )


def _once(rows: Iterable[T], place: Callable[[T], Any], value: Callable[[T], Any] = lambda row: None) -> list[T]:
    """``rows`` without those whose ``place`` an earlier one has; raises where they then differ in ``value``."""
    held: dict[str, T] = {}
    for row in rows:
        where = repr(place(row))  # 1 and 1.0 are different budgets
        if where not in held:
            held[where] = row
        elif value(held[where]) != value(row):
            raise ReportError(
                f"the directories disagree: {where} has the value {value(held[where])} in one and {value(row)} in "
                "another, as of another version or other items. Give those that agree, or run one of them again."
            )
    return list(held.values())


def _union(lists: Iterable[Sequence[T]]) -> list[T]:
    return list({repr(one): one for held in lists for one in held}.values())
