"""Reading an evaluation for its report: every file, peers beside it, and what is broken is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluation_rows
import pytest
from evaluation_rows import data_of, rows

from keepkv.report import Report, ReportError, arrange, read
from keepkv.report.page import page

pytest_plugins = ["report_run"]
OPTIONAL = ("speed", "maps", "leakage", "fidelity")


def test_everything_is_read(directory: Path, report: Report) -> None:
    for name in ("cells", "items", *OPTIONAL):
        assert len(getattr(report.evaluation, name)) == len(rows(directory, name)) > 0


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_files_may_be_missing(copy: Path, name: str) -> None:
    (copy / f"{name}.jsonl").unlink()
    found = arrange(read(copy))
    assert getattr(found.evaluation, name) == []
    assert data_of(page(found))["cells"]


def test_peers_have_files_of_their_own(copy: Path, text: str) -> None:
    lines = (copy / "items.jsonl").read_text("utf-8").splitlines(keepends=True)
    (copy / "items.jsonl").write_text("".join(one for one in lines if "kvpress" not in one), encoding="utf-8")
    (copy / "items-kvpress.jsonl").write_text("".join(one for one in lines if "kvpress" in one), encoding="utf-8")
    cells, expected = (data_of(one)["cells"] for one in (page(arrange(read(copy))), text))
    assert sorted(cells, key=str) == sorted(expected, key=str)


def test_not_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="is not a directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"no run\.json and no cells\.jsonl and no items\.jsonl"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cells", lambda row: row.pop("score"), r"cells\.jsonl, line 3: no score"),
        ("cells", lambda row: row.update(score="good"), 'line 3: score is "good", expected float'),
        ("cells", lambda row: row.update(mode="blind"), "line 3: mode is \"blind\", expected 'agnostic' or 'aware'"),
        ("cells", lambda row: row.update(n=True), "line 3: n is true, expected int"),
        ("items", lambda row: row.update(tags={"depth": "deep"}), r'items\.jsonl, line 3: tags\.depth is "deep"'),
        ("maps", lambda row: row["tokens"].pop(), r"maps\.jsonl, line 3: 60 values of survival for 59 tokens"),
        ("maps", lambda row: row["kept"][1].append(None), r"line 3: kept\[1\]\[2\] is null"),
        ("fidelity", lambda row: row["metrics"]["kl"].pop("mean"), r"line 3: no metrics\.kl\.mean"),
        ("leakage", lambda row: row.update(leak=[1]), r"leakage\.jsonl, line 3: leak is \[1\]"),
    ],
)
def test_broken_rows_are_named(copy: Path, name: str, change: Any, message: str) -> None:
    held = rows(copy, name)
    change(held[2])
    evaluation_rows.lines(copy / f"{name}.jsonl", held)
    with pytest.raises(ReportError, match=message):
        read(copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{}", r"run\.json: no model"),
        ("run.json", "[]", "a row is .*, not an object"),
        ("cells.jsonl", "", "is empty: there is nothing to report"),
        ("items.jsonl", '{"task": "qa', r"items\.jsonl, line 1: not JSON .* cut off"),
    ],
)
def test_broken_files_are_named(copy: Path, name: str, content: str, message: str) -> None:
    (copy / name).write_text(content, encoding="utf-8")
    with pytest.raises(ReportError, match=message):
        read(copy)


def test_a_file_that_is_not_text(copy: Path) -> None:
    (copy / "maps.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match=r"cannot read .*maps\.jsonl"):
        read(copy)


def test_a_cell_twice(copy: Path) -> None:
    held = rows(copy, "cells")
    evaluation_rows.lines(copy / "cells.jsonl", [*held, held[1]])
    with pytest.raises(ReportError, match=rf"line {len(held) + 1}: snapkv at 0\.1 on qa-1 is there twice"):
        read(copy)


# What is computed
