"""Runs an evaluation from its first open unit to its last, and sums it up."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from keepkv.evaluation.asking import Encoded
from keepkv.evaluation.ledger import Ledger
from keepkv.evaluation.records import Found, Record, failed
from keepkv.evaluation.setup import Setup, Unit
from keepkv.evaluation.summary import summarise
from keepkv.evaluation.unit import build, run
from keepkv.measure import environment

Step = Callable[[int, str], None]  # rows done, and what comes next


def evaluate(model: Any, tokenizer: Any, setup: Setup, folder: Path, step: Step | None = None) -> list[Record]:
    """Runs what of ``setup`` is not yet recorded in ``folder`` and returns the cells, which are written there too.

    ``model`` in evaluation mode. An item that cannot be run is recorded as failed, with the reason, and counted.
    """
    made_with = {
        "versions": environment.versions(), "device": environment.device_name(model),
        "dtype": str(model.dtype).removeprefix("torch."), "revision": environment.revision(),
    }  # fmt: skip
    ledger = Ledger(folder, setup, made_with)
    report = step or (lambda rows, what: None)

    @lru_cache(maxsize=1)
    def items(task: str, length: int, seeds: tuple[int, ...]) -> list[Encoded] | Exception:
        try:
            return build(tokenizer, setup, unit)
        except Exception as error:
            return error

    done = ledger.done
    for number, unit in enumerate(setup.units()):
        rows = len(unit.budgets) * len(unit.items)
        report(0, f"{unit.task} {unit.length} {unit.mode}: {unit.variant.label}")
        if number >= done:
            made = items(unit.task, unit.length, unit.items)
            ledger.add(
                unit, failed(unit, made) if isinstance(made, Exception) else _run(model, tokenizer, setup, unit, made)
            )
        report(rows, "")
    return summarise(folder)


def _run(model: Any, tokenizer: Any, setup: Setup, unit: Unit, items: list[Encoded]) -> Found:
    """Where some item of the unit cannot be run, each on its own, so that the others are not lost with it."""
    try:
        return run(model, tokenizer, setup, unit, items)
    except Exception as error:  # of whatever kind: it is counted, and its text recorded
        if len(items) == 1:
            return failed(unit, error)
    parts = []
    for i, item in enumerate(items):
        alone = Unit(**{**vars(unit), "items": (unit.items[i],), "first": unit.first and i == 0})
        parts.append(_run(model, tokenizer, setup, alone, [item]))
    by_budget = [[part.items[k] for part in parts] for k in range(len(unit.budgets))]
    found = Found([row for rows in by_budget for row in rows])
    for part in parts:
        found.speed += part.speed
        found.maps += part.maps
    return found


def total(setup: Setup) -> int:
    """Rows that an evaluation has when it is finished."""
    return sum(len(unit.budgets) * len(unit.items) for unit in setup.units())
