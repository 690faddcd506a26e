"""Runs an evaluation from its first open unit to its last, and sums it up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from keepkv import tasks
from keepkv.errors import KeepKVError, UnknownName
from keepkv.evaluation.journal import Journal, read_run
from keepkv.evaluation.records import Found, failed
from keepkv.evaluation.reducing import check_reducer
from keepkv.evaluation.rows import RUN, CellRow, ItemRow
from keepkv.evaluation.setup import HELD_OUT, Setup, Unit
from keepkv.evaluation.stages import stages_of
from keepkv.evaluation.summary import summarise
from keepkv.evaluation.unit import build, run
from keepkv.measure.alone import alone
from keepkv.measure.environment import MadeWith, imports
from keepkv.measure.files import folder as make_folder
from keepkv.methods import method_info
from keepkv.tasks.asking import Encoded
from keepkv.vision.reducers import REDUCERS

Step = Callable[[int, str], None]  # rows done, and what comes next


def evaluate(
    model: Any, tokenizer: Any, setup: Setup, folder: str | Path, step: Step | None = None, *, add: bool = False
) -> list[CellRow]:
    """Runs what of ``setup`` is not yet recorded in ``folder`` and returns the cells, which are written there too.

    ``model`` in evaluation mode. ``folder`` is made where it is missing. A finished evaluation in it takes further
    methods, budgets, tasks, lengths and modes; with ``add`` even from other versions of the libraries. An item that
    cannot be run is recorded as failed, with the reason, and counted. Raises ``KeepKVError`` while another process
    writes to ``folder``.
    """
    where = make_folder(folder)
    check_methods(setup, where)
    check_lengths(tokenizer, setup)
    for doubt in setup.doubts():
        warnings.warn(doubt, stacklevel=2)
    with alone(where):
        journal = Journal(where, setup, MadeWith.of(model, setup.model), ItemRow, add)
        _finish(model, tokenizer, journal, step or (lambda rows, what: None), total(setup))
        return summarise(where)


def _finish(model: Any, tokenizer: Any, journal: Journal[ItemRow], report: Step, asked: int) -> None:
    """Run what of ``journal`` is open. asked: rows that ``report`` is told of, all together."""

    @lru_cache(maxsize=1)
    def items(task: str, length: int, seeds: tuple[int, ...]) -> list[Encoded] | Exception:
        try:
            return build(tokenizer, setup, unit)
        except Exception as error:
            return error

    done = journal.done
    left = list(journal.units())[done:]
    report(asked - sum(len(unit.budgets) * len(unit.items) for _, _, unit in left), "")
    for stage, setup, unit in left:
        report(0, f"{unit.task} {unit.length} {unit.mode}: {unit.variant.label}")
        made = items(unit.task, unit.length, unit.items)
        if isinstance(made, Exception):
            journal.add(stage, unit, failed(unit, made))
        else:
            journal.add(stage, unit, _run(model, tokenizer, setup, unit, made))
        report(len(unit.budgets) * len(unit.items), "")


def check_methods(setup: Setup, folder: Path) -> None:
    """Raise ``KeepKVError`` where a method is not known, with the file that registered it for rows in ``folder``."""
    for variant in setup.variants:
        if variant.method in REDUCERS:
            check_reducer(setup, variant)
            continue
        try:
            method_info(variant.method)
        except UnknownName as error:
            stages = stages_of(read_run(folder)) if (folder / RUN).exists() else []
            files = {name: None for stage in stages for name in stage["environment"].get("imports") or {}}
            missing = [name for name in files if name not in (imports() or {})]
            if not missing:
                raise
            flags = " ".join(f"--import {name}" for name in missing)
            raise KeepKVError(f"{error} Rows in {str(folder)!r} were made with {flags}: give it again.") from error


def check_lengths(tokenizer: Any, setup: Setup) -> None:
    """Raise ``KeepKVError`` where a task cannot be made at a length: each is, once."""
    for name, length in product(setup.tasks, setup.lengths):
        try:
            tasks.get(name).generate(tokenizer, length, HELD_OUT, plain=setup.plain)
        except tasks.TaskError as error:
            raise KeepKVError(f"task {name} of {length} tokens: {error}") from error


def _run(model: Any, tokenizer: Any, setup: Setup, unit: Unit, items: list[Encoded]) -> Found[ItemRow]:
    """Measures ``unit``. Where some item of it cannot be run, each is run on its own, so that the others are not lost
    with it."""
    try:
        return run(model, tokenizer, setup, unit, items)
    except Exception as error:  # of whatever kind: it is counted, and its text recorded
        if len(items) == 1:
            return failed(unit, error)
    parts = [
        _run(model, tokenizer, setup, replace(unit, items=(seed,), first=unit.first and i == 0), [item])
        for i, (seed, item) in enumerate(zip(unit.items, items, strict=True))
    ]
    return Found(
        [part.items[k] for k in range(len(unit.budgets)) for part in parts],
        [row for part in parts for row in part.speed],
        [row for part in parts for row in part.maps],
    )


def total(setup: Setup) -> int:
    """Rows that an evaluation has when it is finished."""
    return sum(len(unit.budgets) * len(unit.items) for unit in setup.units())
