"""The files of an evaluation: written so that it may be killed at any moment and goes on as if it had not been."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.evaluation.records import Found, Record, cell_of, places
from keepkv.evaluation.setup import Setup, Unit

RUN, ITEMS, SPEED, MAPS, CELLS = "run.json", "items.jsonl", "speed.jsonl", "maps.jsonl", "cells.jsonl"


class Ledger:
    """``run.json`` says what is run; ``items.jsonl`` has a row per item, method and budget, in the order of
    ``setup.units()``, and depends on nothing but that; ``speed.jsonl`` and ``maps.jsonl`` belong to its rows.

    A unit is recorded when its rows stand in ``items.jsonl`` whole: they are written last, and at once.
    """

    def __init__(self, folder: Path, setup: Setup, environment: dict[str, Any]) -> None:
        self.folder, self.setup = folder, setup
        run = json.loads(json.dumps(setup.to_dict() | {"environment": environment}))  # as it is read again
        path = folder / RUN
        if path.exists():
            if (held := json.loads(path.read_text(encoding="utf-8"))) != run:
                changed = sorted(key for key in {*held, *run} if held.get(key) != run.get(key))
                raise KeepKVError(
                    f"{str(folder)!r} holds another evaluation, which differs in {', '.join(changed)}. Give another "
                    "directory, or repeat what it was made with to finish it."
                )
        elif (folder / ITEMS).exists():
            raise KeepKVError(f"{str(folder)!r} has {ITEMS} without {RUN}: give another directory")
        else:
            _replace(path, json.dumps(run, indent=1) + "\n")
        self.done = self._recover()

    def add(self, unit: Unit, found: Found) -> None:
        """Record a unit."""
        for name, records in ((SPEED, found.speed), (MAPS, found.maps), (ITEMS, found.items)):
            if records:
                with (self.folder / name).open("ab") as file:
                    file.write("".join(map(_line, records)).encode())
                    file.flush()
                    os.fsync(file.fileno())
        self.done += 1

    def _recover(self) -> int:
        """Cuts the files back to whole units and returns their number."""
        lines = _whole_lines(self.folder / ITEMS)
        recorded: list[tuple[Any, ...]] = []
        units = 0
        for unit in self.setup.units():
            expected = places(unit)
            mine = lines[len(recorded) : len(recorded) + len(expected)]
            if [_place(line) for line in mine] != expected:
                break
            recorded += expected
            units += 1
        _replace(self.folder / ITEMS, "".join(lines[: len(recorded)]))
        known = set(recorded)
        for name in (SPEED, MAPS):
            held = _whole_lines(self.folder / name)
            _replace(self.folder / name, "".join(line for line in held if _place(line) in known))
        return units


def files(folder: Path, name: str) -> list[Path]:
    """``items.jsonl`` and what peers add beside it (``items-kvpress.jsonl``), each as it is or compressed (``.gz``)."""
    stem, _, suffix = name.rpartition(".")
    names = [folder / name, *folder.glob(f"{stem}-*.{suffix}")]
    packed = [folder / f"{name}.gz", *folder.glob(f"{stem}-*.{suffix}.gz")]
    found = [path for path in names if path.is_file()]
    return sorted(found + [path for path in packed if path.is_file() and path.with_suffix("") not in found])


def text_of(path: Path) -> str:
    """The text of a file that may be compressed."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def read_lines(folder: Path, name: str) -> Iterator[Record]:
    """The records of all ``files`` of that name."""
    for path in files(folder, name):
        for line in text_of(path).splitlines():
            yield json.loads(line)


def _place(line: str) -> tuple[Any, ...]:
    """Cell and seed of a record; of one for several items, the first one's."""
    record = json.loads(line)
    return (*cell_of(record), record["seeds"][0] if "seeds" in record else record["seed"])


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def _whole_lines(path: Path) -> list[str]:
    """Without what a kill left unfinished."""
    if not path.exists():
        return []
    text = path.read_bytes()
    return text[: text.rfind(b"\n") + 1].decode().splitlines(keepends=True)


def _replace(path: Path, text: str) -> None:
    """All of ``text`` or the old file, whatever happens."""
    draft = path.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
