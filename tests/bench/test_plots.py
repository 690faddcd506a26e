"""The pictures of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepkv.bench.plots import draw
from keepkv.bench.rows import BenchRow
from keepkv.measure.files import read_rows

RESULTS = Path(__file__).parents[2] / "benchmarks/speed/results"


def test_ten_lines_in_a_panel_and_none_differs_by_colour_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("keepkv.report.figures.svg", lambda figure: figures.append(figure) or "<svg>")
    row = next(row for row in read_rows(RESULTS, "flat.jsonl", BenchRow) if row.kind == "sweep" and row.error is None)
    rows = [replace(row, label=f"method-{i}") for i in range(12)]
    assert len(draw(rows, tmp_path)) == 3
    for figure in figures:
        lines = [[one for one in axes.lines if one.get_label().startswith("method")] for axes in figure.axes]
        assert sorted(map(len, lines)) == [2, 10]
        for panel in lines:
            looks = {(one.get_marker(), one.get_linestyle(), one.get_markerfacecolor() == "white") for one in panel}
            assert len(looks) == len(panel)
            named = {one.get_text() for one in panel[0].axes.get_legend().get_texts()}
            assert named == {one.get_label() for one in panel}
