"""Rows: what is declared is what is written, read back, and refused; files already written are read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import keepkv.evaluation
from keepkv.bench.rows import BenchRow
from keepkv.core.when import When
from keepkv.evaluation.fidelity import FidelityRow, fidelity
from keepkv.evaluation.leakage.rows import LeakageRow
from keepkv.evaluation.rows import CELLS, ITEMS, MAPS, SPEED, CellRow, ItemRow, MapRow, SpeedRow
from keepkv.measure import Estimate, MadeWith, Percentiles, Row, RowError
from keepkv.measure.files import read_file, read_lines, read_rows
from keepkv.measure.rows import IF_KNOWN, INLINE

RESULTS = Path(__file__).parents[2] / "benchmarks"
HERE = {"model": "m", "device": "cpu", "dtype": "float32", "versions": {"torch": "2"}, "revision": None}


@dataclass(frozen=True, kw_only=True)
class Sample(Row):
    """A field of every kind."""

    name: str
    kind: Literal["a", "b"]
    score: float | None
    budget: float | int | str
    times: Percentiles | None = None
    layers: dict[int, Estimate] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    peer: str | None = field(default=None, metadata=IF_KNOWN)
    measures: dict[str, float] = field(default_factory=dict, metadata=INLINE)
    made_with: MadeWith = field(metadata=INLINE)


SAMPLE = Sample(
    name="x", kind="a", score=0.5, budget=64, times=Percentiles(2.0, 1.0, 3.0, (1.0, 2.0, 3.0)),
    layers={3: Estimate(1.0, None, None, (1.0,))}, options={"window": 8}, shape=(2, 3), measures={"refused": 0.25},
    made_with=MadeWith(**HERE),
)  # fmt: skip


def test_a_row_is_read_as_it_was_written() -> None:
    line = json.dumps(SAMPLE.to_dict())
    assert Sample.from_line(line, "here") == SAMPLE
    held = json.loads(line)
    assert held["refused"] == 0.25 and held["device"] == "cpu" and held["layers"]["3"]["mean"] == 1.0
    assert not {"measures", "made_with", "peer"} & held.keys()
    assert Sample.from_dict(held | {"peer": "kvpress"}).to_dict()["peer"] == "kvpress"


def test_options_are_written_as_json_can_hold_them() -> None:
    row = FidelityRow.from_dict(_fidelity() | {"options": {"when": When(every=4), "score": object}})
    when = {"prefill": "immediate", "every": 4, "cap": None}
    assert row.to_dict()["options"] == {"when": when, "score": "<class 'object'>"}


def _fidelity() -> dict[str, Any]:
    numbers = dict.fromkeys(("slots", "bytes", "full_bytes", "ratio"), 1.0)
    counts = dict.fromkeys(("context", "continuation", "greedy", "segments", "seed"), 1)
    return {"method": "x", "options": {}, "budget": 0.5, "metrics": {}, "layers": {}, **numbers, **counts, **HERE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "^here: name is null, expected str$"),
        ({"kind": "c"}, "kind is \"c\", expected 'a' or 'b'"),
        ({"score": True}, "score is true, expected float"),
        ({"budget": [1]}, r"budget is \[1\]"),
        ({"times": {"median": 1.0}}, r"no times\.p20"),
        ({"times": {"median": 1, "p20": 1, "p80": 1, "values": [1, "2"]}}, r'times\.values\[1\] is "2"'),
        ({"layers": {"3": {"mean": "much"}}}, r'layers\.3\.mean is "much"'),
        ({"refused": "yes"}, 'refused is "yes", expected float'),
        ({"versions": ["torch"]}, r'versions is \["torch"\]'),
    ],
)
def test_what_is_not_as_declared_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        Sample.from_dict(SAMPLE.to_dict() | change, "here")


def test_a_field_that_is_missing_is_named() -> None:
    held = {name: value for name, value in SAMPLE.to_dict().items() if name != "dtype"}
    with pytest.raises(RowError, match=r"^a row: no dtype$"):
        Sample.from_dict(held)


def test_a_number_that_is_none_is_unknown() -> None:
    assert Sample.from_dict(SAMPLE.to_dict() | {"score": float("inf")}).score is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (ITEMS, ItemRow), (SPEED, SpeedRow), (MAPS, MapRow), (CELLS, CellRow), ("leakage.jsonl", LeakageRow),
        ("fidelity.jsonl", FidelityRow),
    ],
)  # fmt: skip
def test_an_evaluation_written_earlier_loses_nothing(name: str, kind: type[Row]) -> None:
    """Every value of a line stands in the row that is read from it."""
    folder = RESULTS / "evaluation" / "results"
    rows, lines = read_rows(folder, name, kind), list(read_lines(folder, name))
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows[::97], lines[::97], strict=True):
        held = json.loads(json.dumps(row.to_dict()))
        assert {key: held[key] for key in line} == line


def test_sweeps_written_earlier_lose_nothing() -> None:
    paths = sorted((RESULTS / "speed" / "results").glob("*.jsonl"))
    assert paths
    for path in paths:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows = read_file(path, BenchRow)
        for row, line in zip(rows, lines, strict=True):
            assert isinstance(row, BenchRow) and isinstance(row.decode, Percentiles)
            assert {key: row.to_dict()[key] for key in line} == line


def test_fidelity_is_the_same_function_from_both_places() -> None:
    assert keepkv.evaluation.fidelity is fidelity and callable(fidelity)
    assert keepkv.evaluation.FidelityRow is FidelityRow
