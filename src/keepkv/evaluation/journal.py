"""The folder of an evaluation: it may be killed at any moment and goes on as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

from keepkv.errors import KeepKVError
from keepkv.evaluation.records import Found, R, places
from keepkv.evaluation.rows import ITEMS, MAPS, RUN, SPEED, ItemRow, MapRow, SpeedRow
from keepkv.evaluation.setup import Setup, Unit
from keepkv.evaluation.stages import check_addition, run_of, stages_of, units
from keepkv.measure.environment import MadeWith
from keepkv.measure.files import text_of
from keepkv.measure.ledger import Ledger, replace_text
from keepkv.measure.rows import RowError, object_of, plain


class Journal(Generic[R]):
    """``run.json`` says what is run; ``items.jsonl`` has a row of type ``kind`` per item, method and budget, in the
    order of ``units``, and depends on nothing but that; ``speed.jsonl`` and ``maps.jsonl`` belong to its rows.

    A unit is recorded when its rows stand in ``items.jsonl`` whole: they are written last, and at once. A finished
    evaluation takes further cells as a stage of its own (``stages``); ``add``: made with other versions, too. Raises
    ``KeepKVError`` where ``folder`` holds an evaluation that ``setup`` cannot continue.
    """

    def __init__(self, folder: Path, setup: Setup, made_with: MadeWith, kind: type[R], add: bool = False) -> None:
        asked = json.loads(json.dumps(setup.to_dict() | {"environment": plain(made_with)}))  # as it is read again
        path = folder / RUN
        if path.exists():
            self.stages = stages_of(read_run(folder))
        elif (folder / ITEMS).exists():
            raise KeepKVError(f"{str(folder)!r} has {ITEMS} without {RUN}: give another directory")
        else:
            self.stages = [asked]
            replace_text(path, json.dumps(asked, indent=1) + "\n")
        if asked not in self.stages:
            check_addition(self.stages, asked, str(folder), add)
        self.items = Ledger(folder / ITEMS, kind)
        self.speed, self.maps = Ledger(folder / SPEED, SpeedRow), Ledger(folder / MAPS, MapRow)
        self.done = self._recover()
        left = sum(1 for _ in self.units()) - self.done
        if (left and asked["environment"] != self.stages[-1]["environment"]) or (left and asked not in self.stages):
            raise KeepKVError(
                f"{str(folder)!r} holds an evaluation that is not finished: repeat the command that it was made with, "
                "under the same versions, before more is added, or give another directory"
            )
        if asked not in self.stages and len(list(units([*self.stages, asked]))) > self.done:
            self.stages.append(asked)
            replace_text(path, json.dumps(run_of(self.stages), indent=1) + "\n")

    def units(self) -> Iterator[tuple[int, Setup, Unit]]:
        """What is run and recorded, in order, with the number of the stage that asks for it first, and its setup."""
        return units(self.stages)

    def add(self, stage: int, unit: Unit, found: Found[R]) -> None:
        """Record a unit of a stage."""
        rows = found.items
        if stage:
            rows = [replace(row, stage=stage) if isinstance(row, ItemRow) else row for row in rows]
        self.speed.append(found.speed)
        self.maps.append(found.maps)
        self.items.append(rows)
        self.done += 1

    def _recover(self) -> int:
        """Cuts the files back to whole units and returns their number."""
        held = [_place(row) for row in self.items.rows()]
        recorded: list[tuple[Any, ...]] = []
        count = 0
        for _, _, unit in self.units():
            expected = places(unit)
            if held[len(recorded) : len(recorded) + len(expected)] != expected:
                break
            recorded += expected
            count += 1
        for ledger in (self.items, self.speed, self.maps):
            missing = set(recorded)
            ledger.keep(lambda row, missing=missing: _take(missing, _place(row)))  # type: ignore[misc]
        return count


def _take(missing: set[tuple[Any, ...]], place: tuple[Any, ...]) -> bool:
    """Whether ``place`` is one of ``missing``; from then on it is not."""
    there = place in missing
    missing.discard(place)
    return there


def read_run(folder: Path) -> dict[str, Any]:
    """What ``run.json`` of ``folder`` holds. Raises ``KeepKVError`` where nothing can be added to it."""
    path = folder / RUN
    try:
        held = object_of(text_of(path), path.name)
    except RowError as error:
        raise KeepKVError(
            f"{str(path)!r} is damaged, so nobody knows what the rows beside it were made with: {error}. Give another "
            "directory, or delete this one."
        ) from error
    if "shares" not in held:
        raise KeepKVError(
            f"{str(folder)!r} was made by an earlier version of keepkv, when a share as budget was one of the bytes. "
            "`keepkv report` reads it as it is; give another directory to what is run now."
        )
    return held


def _place(row: Any) -> tuple[Any, ...]:
    """Cell and seed of a row; of one for several items, the first one's."""
    return (*row.cell, *(row.seeds[:1] if isinstance(row, SpeedRow) else [row.seed]))
