"""Stages: what was asked of one folder, one command after the other. Each adds cells to those that are there.

A stage is plain data as ``run.json`` has it: a ``Setup`` and the environment. All stages of a folder give each cell the
same items under the same conditions; a cell is run in the first stage that asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.evaluation.setup import Setup, Unit

Record = dict[str, Any]
GROWS = ("tasks", "variants", "methods", "budgets", "lengths", "modes")  # what a stage may have more of
SAME = ("device", "dtype")  # of the environment, whatever else may have changed between stages


def stages_of(run: Record) -> list[Record]:
    """The stages of a ``run.json``."""
    return list(run.get("stages", [run]))


def run_of(stages: Sequence[Record]) -> Record:
    """The ``run.json`` of ``stages``: with all that any of them has more of."""
    if len(stages) == 1:
        return stages[0]
    union = {name: [one for i, one in enumerate(held) if one not in held[:i]] for name, held in _held(stages)}
    return {**stages[0], **union, "stages": list(stages)}


def units(stages: Sequence[Record]) -> Iterator[tuple[int, Setup, Unit]]:
    """The units of all stages in the order in which they are run and recorded, each with the number of its stage;
    without the cells of earlier stages."""
    known: set[tuple[Any, ...]] = set()
    for number, stage in enumerate(stages):
        setup, mine = Setup.from_dict(stage), set[tuple[Any, ...]]()
        for unit in setup.units():
            # 1 and 1.0 are different budgets.
            places = {b: (unit.task, unit.length, unit.mode, unit.variant.label, repr(b)) for b in unit.budgets}
            mine.update(places.values())
            if fresh := tuple(budget for budget, place in places.items() if place not in known):
                yield number, setup, replace(unit, budgets=fresh)
        known |= mine


def check_addition(stages: Sequence[Record], asked: Record, folder: str, other_versions: bool) -> None:
    """Raise ``KeepKVError`` where ``asked`` cannot be a further stage: rows of one table must agree in all else.

    other_versions: whether libraries and the revision of keepkv may differ from those of the stages before.
    """
    first, before, now = stages[0], stages[-1]["environment"], asked["environment"]
    settings = {*first, *asked} - {*GROWS, "environment", "stages"}
    changed = sorted(key for key in settings if first.get(key) != asked.get(key))
    made = sorted(key for key in {*before, *now} - {"imports"} if before.get(key) != now.get(key))
    barred = [key for key in made if key in SAME or not other_versions]
    if changed or barred:
        said = [*changed, *([f"environment ({', '.join(barred)})"] if barred else [])]
        may = barred and not changed and not {*SAME} & {*barred}
        hint = " `keepkv eval --add` takes other versions: each cell says what it was made with." if may else ""
        raise KeepKVError(
            f"{folder!r} holds another evaluation, which differs in {', '.join(said)}. Methods, budgets, tasks, "
            f"lengths and modes can be added to it; for anything else, give another directory.{hint}"
        )
    for stage in stages:
        for name, digest in (stage["environment"].get("imports") or {}).items():
            if (now.get("imports") or {}).get(name, digest) != digest:
                raise KeepKVError(
                    f"{name} has changed since rows in {folder!r} were made with it: old and new would stand in one "
                    "table under one name. Give the new file and what it registers names of their own, or give another "
                    "directory."
                )


def _held(stages: Sequence[Record]) -> Iterator[tuple[str, list[Any]]]:
    for name in GROWS:
        yield name, [one for stage in stages for one in stage[name]]
