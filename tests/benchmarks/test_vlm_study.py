"""The study of models that see: its clock, its entries, and tables that come from rows alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import keepkv
from benchmarks.vlm.methods import METHODS
from benchmarks.vlm.speed import LatencyRow, measured
from benchmarks.vlm.tables import fronts, table
from keepkv.cli.arguments import variant
from keepkv.evaluation.rows import ItemRow
from keepkv.evaluation.vision import aggregates, generalisation
from keepkv.measure import Percentiles
from keepkv.vision.reducers import REDUCERS
from keepkv.vision.seeing import Seeing


def row(method: str, budget: float, task: str, seed: int, score: float, reply: str, slots: float) -> ItemRow:
    return ItemRow(
        task=task, length=300, mode="aware", method=method, budget=budget, seed=seed, tokens=100, score=score,
        scores=[score], replies=[reply], slots=slots,
    )  # fmt: skip


ROWS = [
    *(row("full", 1.0, task, i, 1.0 - (task == "never"), " red", 100) for task in ("a", "b", "never") for i in (0, 1)),
    *(row("snapkv", 0.2, "a", i, 1.0, " Red ", 20) for i in (0, 1)),
    *(row("snapkv", 0.2, "b", i, float(i), ("blue", "red")[i], 20) for i in (0, 1)),
    *(row("snapkv", 0.2, "never", i, 0.0, "green", 20) for i in (0, 1)),
    replace(row("snapkv", 0.2, "a", 2, 0.0, "", 0), error="lost", score=None, replies=[]),
]


def test_rows_are_all_that_tables_need() -> None:
    full, snap = aggregates(ROWS)
    assert (full.performance, full.loyalty.macro, full.left_out) == (1.0, 100.0, ("never",))  # type: ignore[union-attr]
    assert snap.rho == {"a": 1.0, "b": 0.5} and snap.performance == pytest.approx((1.25 / 2) ** 0.5)
    assert snap.loyalty.macro == pytest.approx(100 * (1 + 0.5 + 0) / 3) and snap.failed == 1  # type: ignore[union-attr]
    assert (snap.entries, snap.share) == (20, pytest.approx(0.2))
    found = generalisation({"one": [full, snap], "two": [full, replace(snap, rho={"a": 0.5, "b": 0.5})]})
    assert found["aware", 300, "full", 1.0] == 0.0
    assert found["aware", 300, "snapkv", 0.2] == pytest.approx(100 * 0.125 / 0.625)
    assert any("`snapkv` | 0.2 | 20, 0.200" in line for line in table(ROWS, [full, snap]))


def latency(made: LatencyRow, method: str, budget: float, first: float, each: float) -> LatencyRow:
    def one(x: float) -> Percentiles:
        return Percentiles(x, x, x, (x,))

    return replace(made, method=method, budget=budget, first=one(first), each=one(each), tokens=300)


@pytest.mark.parametrize("name", ["full", "vl-cache", "visionzip"])
def test_a_latency_says_what_was_held(name: str) -> None:
    made = made_of(name)
    assert made.first.median > 0 and made.each.median > 0 and made.made_with.versions
    wanted = made.tokens if name == "full" else int(0.5 * made.tokens)
    assert wanted - 1 <= made.entries <= wanted
    points = [latency(made, "full", 1.0, 1.0, 1.0), latency(made, "snapkv", 0.2, 2.0, 0.5)]
    lines = fronts(aggregates(ROWS), points, 300)
    assert lines[2].endswith("| first, each |")  # the best score is on both
    assert "| 0.50 | 2.00 |" in lines[3] and lines[3].endswith("| each |")


def made_of(name: str) -> Any:
    model, processor = keepkv.embedded_vlm()
    seeing = Seeing(model, processor.tokenizer, None, processor)
    return measured(model, seeing, name, 0.5, 130, 2, 1)


def test_what_is_compared_exists() -> None:
    assert all(name in REDUCERS or variant(name) for name in METHODS)
