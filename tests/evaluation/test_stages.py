"""A finished evaluation takes further cells: what is there stays, byte for byte; a kill at any byte loses nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.errors import KeepKVError
from keepkv.evaluation.journal import Journal
from keepkv.evaluation.records import failed
from keepkv.evaluation.rows import ITEMS, RUN, ItemRow, Run
from keepkv.evaluation.runner import evaluate
from keepkv.evaluation.setup import Setup, Variant
from keepkv.evaluation.summary import summarise
from keepkv.measure import MadeWith, environment
from keepkv.measure.files import read_rows, text_of

pytestmark = pytest.mark.filterwarnings("ignore:.* items of each task", "ignore:of .* tokens, a budget of")
HERE = MadeWith(device="cpu", dtype="float32", versions={"torch": "1"}, revision="a")
FIRST = Setup("m", ("niah-single-2",), (Variant("keepkv"),), ("25%bytes",), (128,), items=3, batch=2)
MORE = replace(
    FIRST, tasks=("niah-single-2", "qa-1"), variants=(Variant("keydiff"), Variant("keepkv", {"when": When(every=3)})),
    budgets=("25%bytes", 0.5, 1),
)  # fmt: skip


def fill(folder: Path, setup: Setup, made_with: MadeWith = HERE, limit: int | None = None, add: bool = False) -> None:
    """Record what is open, as many units as ``limit`` says, without running a model."""
    folder.mkdir(exist_ok=True)
    journal = Journal(folder, setup, made_with, ItemRow, add)
    for stage, _, unit in list(journal.units())[journal.done :][:limit]:
        found = failed(unit, ValueError("not run"))
        journal.add(stage, unit, replace(found, items=[replace(row, score=0.5, error=None) for row in found.items]))


def held(folder: Path) -> list[ItemRow]:
    return read_rows(folder, ITEMS, ItemRow)


def test_only_new_cells_are_run_and_what_is_there_stays(tmp_path: Path) -> None:
    """Before: refused, "holds another evaluation, which differs in budgets, methods, tasks, variants"."""
    fill(tmp_path, FIRST)
    before = (tmp_path / ITEMS).read_bytes()
    fill(tmp_path, MORE)
    after = (tmp_path / ITEMS).read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    cells = {row.cell[3:] for row in held(tmp_path) if row.task == "niah-single-2"}
    assert len({(*row.cell[:4], repr(row.budget), row.seed) for row in held(tmp_path)}) == len(held(tmp_path))
    assert {("full", 1.0), ("random", 0.5), ("snapkv", 1), ("keydiff", "25%bytes"), ("keepkv", "25%bytes")} <= cells
    assert ("keepkv", 0.5) not in cells  # only what was asked for
    run = Run.from_line(text_of(tmp_path / RUN), RUN)
    assert run.tasks == ["niah-single-2", "qa-1"] and len(run.stages) == 2
    assert run.methods == ["full", "random", "snapkv", "keepkv", "keydiff", "keepkv:when.every=3"]
    for again in (FIRST, MORE):  # each command alone finds all its cells
        fill(tmp_path, again)
        assert (tmp_path / ITEMS).read_bytes() == after


def test_an_addition_that_is_killed_at_any_byte_ends_the_same(tmp_path: Path) -> None:
    fill(tmp_path / "whole", FIRST)
    early = {name: (tmp_path / "whole" / name).read_bytes() for name in (RUN, ITEMS)}
    fill(tmp_path / "whole", MORE)
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in (RUN, ITEMS)}
    draw = random.Random(0)
    places = [len(early[ITEMS]), *(draw.randrange(len(whole[ITEMS]) + 1) for _ in range(30))]
    for k, place in enumerate(places):
        folder = tmp_path / str(k)
        folder.mkdir()
        # Killed after run.json was renewed, or, with the old rows alone, before it.
        (folder / RUN).write_bytes(early[RUN] if k == 0 else whole[RUN])
        (folder / ITEMS).write_bytes(whole[ITEMS][:place])
        fill(folder, MORE)
        assert {name: (folder / name).read_bytes() for name in (RUN, ITEMS)} == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, "differs in model"),
        ({"items": 4}, "differs in items"),
        ({"seeds": (0, 1)}, "differs in seeds"),
        ({"sinks": None, "plain": True}, "differs in plain, sinks"),
        ({"batch": 3}, "differs in batch"),
    ],
)
def test_what_would_change_old_rows_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    fill(tmp_path, FIRST)
    before = (tmp_path / RUN).read_bytes()
    for add in (False, True):
        with pytest.raises(KeepKVError, match=rf"{words}\. Methods, budgets, tasks, lengths and modes can be added"):
            fill(tmp_path, replace(MORE, **changes), add=add)
    assert (tmp_path / RUN).read_bytes() == before


def test_an_unfinished_evaluation_is_finished_first(tmp_path: Path) -> None:
    fill(tmp_path, FIRST, limit=2)
    with pytest.raises(KeepKVError, match="not finished: repeat the command"):
        fill(tmp_path, MORE)
    fill(tmp_path, FIRST)
    fill(tmp_path, MORE, limit=3)
    with pytest.raises(KeepKVError, match="not finished"):
        fill(tmp_path, replace(MORE, tasks=("qa-2",)))
    with pytest.raises(KeepKVError, match="not finished"):
        fill(tmp_path, MORE, replace(HERE, revision="b"), add=True)


def test_other_versions_are_added_where_asked_and_each_cell_says_its_own(tmp_path: Path) -> None:
    later = replace(HERE, revision="b", versions={"torch": "2"})
    fill(tmp_path, FIRST)
    with pytest.raises(KeepKVError, match=r"environment \(revision, versions\).*keepkv eval --add"):
        fill(tmp_path, MORE, later)
    with pytest.raises(KeepKVError, match=r"environment \(device\)\. Methods.*another directory\.$"):
        fill(tmp_path, MORE, replace(HERE, device="cuda"), add=True)
    fill(tmp_path, MORE, later, add=True)
    made = {(cell.method, repr(cell.budget)): cell.made_with for cell in summarise(tmp_path)}
    assert made["keepkv", "'25%bytes'"] == HERE and made["keydiff", "0.5"] == later


def test_a_file_that_has_changed_is_refused_by_its_name(tmp_path: Path) -> None:
    old, new = (replace(HERE, imports={"my_score.py": digest}) for digest in ("aa", "bb"))
    fill(tmp_path, FIRST, old)
    assert {cell.made_with.imports["my_score.py"] for cell in summarise(tmp_path) if cell.made_with.imports} == {"aa"}
    assert "my_score.py" in (tmp_path / "cells.csv").read_text().splitlines()[0]
    for setup, add in ((FIRST, False), (MORE, False), (MORE, True)):
        with pytest.raises(KeepKVError, match=r"my_score\.py has changed since rows"):
            fill(tmp_path, setup, new, add=add)
    fill(tmp_path, MORE, replace(HERE, imports={"my_score.py": "aa", "other.py": "cc"}))


def test_a_setup_is_read_as_it_was_written() -> None:
    for setup in (FIRST, replace(MORE, questions=(("a", "b"),))):
        assert Setup.from_dict(json.loads(json.dumps(setup.to_dict()))) == setup


def test_methods_are_added_with_the_scores_they_have_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "revision", lambda: None)
    path = embedded_model()
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    small = replace(FIRST, items=2, budgets=(0.3,))
    evaluate(*loaded, small, tmp_path / "made" / "here")  # before: FileNotFoundError
    told: list[int] = []
    more = replace(small, variants=(Variant("keydiff"),))
    cells = evaluate(*loaded, more, str(tmp_path / "made" / "here"), lambda rows, what: told.append(rows))
    assert [cell.method for cell in cells] == ["full", "random", "snapkv", "keepkv", "keydiff"]
    assert sum(told) == 8
    alone = evaluate(*loaded, more, tmp_path / "alone")
    assert [x.score for x in cells if x.method != "keepkv"] == [x.score for x in alone]
