"""The folder of an evaluation: it may be killed at any moment and goes on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Generic

from keepkv.errors import KeepKVError
from keepkv.evaluation.records import Found, R, places
from keepkv.evaluation.rows import ITEMS, MAPS, RUN, SPEED, MapRow, SpeedRow
from keepkv.evaluation.setup import Setup, Unit
from keepkv.measure.environment import MadeWith
from keepkv.measure.files import text_of
from keepkv.measure.ledger import Ledger, replace_text
from keepkv.measure.rows import RowError, object_of, plain


class Journal(Generic[R]):
    """``run.json`` says what is run; ``items.jsonl`` has a row of type ``kind`` per item, method and budget, in the
    order of ``setup.units()``, and depends on nothing but that; ``speed.jsonl`` and ``maps.jsonl`` belong to its rows.

    A unit is recorded when its rows stand in ``items.jsonl`` whole: they are written last, and at once. Raises
    ``KeepKVError`` where ``folder`` holds another evaluation.
    """

    def __init__(self, folder: Path, setup: Setup, made_with: MadeWith, kind: type[R]) -> None:
        self.setup = setup
        run = json.loads(json.dumps(setup.to_dict() | {"environment": plain(made_with)}))  # as it is read again
        path = folder / RUN
        if path.exists():
            held = _run_of(path)
            if "shares" not in held:
                raise KeepKVError(
                    f"{str(folder)!r} was made by an earlier version of keepkv, when a share as budget was one of the "
                    "bytes. `keepkv report` reads it as it is; give another directory to what is run now."
                )
            if held != run:
                changed = sorted(key for key in {*held, *run} if held.get(key) != run.get(key))
                raise KeepKVError(
                    f"{str(folder)!r} holds another evaluation, which differs in {', '.join(changed)}. Give another "
                    "directory, or repeat what it was made with to finish it."
                )
        elif (folder / ITEMS).exists():
            raise KeepKVError(f"{str(folder)!r} has {ITEMS} without {RUN}: give another directory")
        else:
            replace_text(path, json.dumps(run, indent=1) + "\n")
        self.items = Ledger(folder / ITEMS, kind)
        self.speed, self.maps = Ledger(folder / SPEED, SpeedRow), Ledger(folder / MAPS, MapRow)
        self.done = self._recover()

    def add(self, unit: Unit, found: Found[R]) -> None:
        """Record a unit."""
        self.speed.append(found.speed)
        self.maps.append(found.maps)
        self.items.append(found.items)
        self.done += 1

    def _recover(self) -> int:
        """Cuts the files back to whole units and returns their number."""
        held = [_place(row) for row in self.items.rows()]
        recorded: list[tuple[Any, ...]] = []
        units = 0
        for unit in self.setup.units():
            expected = places(unit)
            if held[len(recorded) : len(recorded) + len(expected)] != expected:
                break
            recorded += expected
            units += 1
        for ledger in (self.items, self.speed, self.maps):
            missing = set(recorded)
            ledger.keep(lambda row, missing=missing: _take(missing, _place(row)))  # type: ignore[misc]
        return units


def _take(missing: set[tuple[Any, ...]], place: tuple[Any, ...]) -> bool:
    """Whether ``place`` is one of ``missing``; from then on it is not."""
    there = place in missing
    missing.discard(place)
    return there


def _run_of(path: Path) -> dict[str, Any]:
    try:
        return object_of(text_of(path), path.name)
    except RowError as error:
        raise KeepKVError(
            f"{str(path)!r} is damaged, so nobody knows what the rows beside it were made with: {error}. Give another "
            "directory, or delete this one."
        ) from error


def _place(row: Any) -> tuple[Any, ...]:
    """Cell and seed of a row; of one for several items, the first one's."""
    return (*row.cell, *(row.seeds[:1] if isinstance(row, SpeedRow) else [row.seed]))
