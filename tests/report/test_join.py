"""Several directories in one report: what they share must agree, and is counted once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluation_rows
import pytest
from evaluation_rows import rows
from typer.testing import CliRunner

from keepkv.cli.program import program
from keepkv.evaluation.summary import cells
from keepkv.report import Evaluation, ReportError, arrange, join, read


def made(folder: Path, *methods: str) -> Evaluation:
    sizes = replace(evaluation_rows.SMALL, methods=methods)
    return read(evaluation_rows.write(folder, sizes, leakage=False, fidelity=False))


def scores(items: Any) -> list[Any]:
    return sorted((repr(row.cell), row.seed, row.score, row.scores) for row in items)


def test_directories_are_joined(tmp_path: Path) -> None:
    """Before: one directory only."""
    whole = made(tmp_path / "whole", "snapkv", "random", "keepkv")
    one, two = made(tmp_path / "one", "snapkv", "random"), made(tmp_path / "two", "random", "keepkv")
    joined = join([one, two])
    assert scores(joined.items) == scores(whole.items)
    again = {cell.cell: cell.score for cell in cells(whole.items, whole.speed, whole.run)}
    assert {cell.cell: cell.score for cell in joined.cells} == again
    assert joined.run.methods == ["snapkv", "random", "keepkv"] and "keepkv" in arrange(joined).methods
    assert len(joined.maps) == len(whole.maps) and join([one]) is one


def test_conflicts_are_told(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", "snapkv", "random"), made(tmp_path / "two", "random", "keepkv")
    held = rows(tmp_path / "two", "items")
    for row in held:
        if row["method"] == "random":
            row |= {"score": 0.123, "scores": []}
    evaluation_rows.lines(tmp_path / "two" / "items.jsonl", held)
    with pytest.raises(ReportError, match=r"disagree: .*'random'.* 0\.123 in another"):
        join([one, read(two.directory)])
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    (tmp_path / "two" / "run.json").write_text(json.dumps(run | {"model": "another"}))
    with pytest.raises(ReportError, match="differ in model: their scores do not belong"):
        join([one, read(two.directory)])


def test_the_command_needs_a_place_for_several(tmp_path: Path) -> None:
    folders = [str(made(tmp_path / name, "snapkv", "random", name).directory) for name in ("keepkv", "keydiff")]
    refused = CliRunner().invoke(program, ["report", *folders])
    assert refused.exit_code == 2 and "--out DIRECTORY" in refused.stderr
    done = CliRunner().invoke(program, ["report", *folders, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0 and "keydiff" in (tmp_path / "out" / "report.md").read_text(), done.output
