"""EffiVLM-Bench's aggregates, recomputed from the tables that it prints, and what they must be."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from keepkv.metrics import casefolded, flips, frontier, overall_generalisation, overall_performance, ratios

# arXiv 2506.00479: DocVQA, ChartQA, TextVQA, OCRBench, AI2D, GQA, MMMU, MME, RealWorldQA, MMStar, MathVista,
# LLaVA-Wilder, MMBench, MMVet, ImageDC; the full cache, and FastV at 1 %.
PRINTED = {
    "LLaVA-OV": (
        "87, 80.00, 74.79, 595, 89.96, 61.92, 45.44, 1974.1, 65.88, 58.75, 58.20, 71.40, 83.12, 55.00, 87.25",
        "8, 14.00, 9.18, 27, 66.35, 35.04, 40.89, 697.7, 36.86, 28.97, 36.40, 49.10, 27.69, 12.30, 20.95",
    ),
    "Qwen2-VL": (
        "95, 81.56, 81.82, 813, 91.02, 62.30, 50.77, 2327.8, 66.53, 57.11, 58.30, 72.70, 78.25, 67.40, 86.35",
        "19, 12.24, 22.45, 71, 65.22, 39.79, 44.67, 1330.0, 41.18, 26.83, 33.70, 51.40, 21.91, 18.10, 24.60",
    ),
    "InternVL2.5": (
        "94, 88.04, 82.87, 802, 95.11, 64.48, 61.56, 2453.9, 72.41, 69.80, 70.20, 74.80, 86.94, 69.40, 86.45",
        "11, 14.88, 10.64, 23, 67.64, 35.49, 51.22, 1264.1, 44.44, 29.64, 34.60, 52.70, 22.64, 7.10, 20.20",
    ),
}


def printed() -> dict[str, dict[str, float]]:
    def scores(text: str) -> dict[str, float]:
        return {f"b{i}": float(x) for i, x in enumerate(text.split(","))}

    return {model: ratios(scores(fastv), scores(full)).rho for model, (full, fastv) in PRINTED.items()}


def test_published_numbers_are_recomputed() -> None:
    rho = printed()
    found = {model: round(overall_performance([*own.values()]), 3) for model, own in rho.items()}
    assert found == {"LLaVA-OV": 0.483, "Qwen2-VL": 0.506, "InternVL2.5": 0.466}
    assert overall_generalisation(rho) == pytest.approx(58.45, abs=0.005)
    q = [fmean(own[b] for own in rho.values()) for b in next(iter(rho.values()))]
    assert 100 * stdev(q) / fmean(q) == pytest.approx(60.50, abs=0.005)  # of the sample: another number


def test_nothing_changed_is_one_and_nought() -> None:
    full = {"a": 3.0, "b": 40.0, "none": 0.0}
    same = ratios(full, full)
    assert same.left_out == ("none",) and overall_performance([*same.rho.values()]) == 1.0
    assert overall_generalisation({"m": same.rho, "n": same.rho}) == 0.0
    assert {how: overall_performance([0.5, 1.5], how) for how in ("mean", "min")} == {"mean": 1.0, "min": 0.5}
    assert math.isnan(overall_generalisation({"m": {"a": 0.0}}))
    for wrong in (lambda: overall_performance([]), lambda: ratios({"a": 1.0}, {}), lambda: overall_generalisation({})):
        with pytest.raises(ValueError, match=r"at least|no score"):
            wrong()


def test_flips_add_up_to_what_changed() -> None:
    rng = random.Random(0)
    for _ in range(20):
        n = rng.randint(1, 30)
        right = [str(rng.randint(0, 3)) for _ in range(n)]
        before, now = ([rng.choice(right) + rng.choice(("", " ")) for _ in range(n)] for _ in range(2))
        judge = [[a.strip() == b for a, b in zip(said, right, strict=True)] for said in (before, now)]
        found = flips(before, now, *judge, normalise=casefolded)
        assert found.lost + found.won + found.moved + found.reworded == pytest.approx(1 - found.exact.mean)
        assert found.net.mean == pytest.approx(found.won - found.lost) and found.n == n
        assert abs(found.net.mean) <= 1 - found.exact.mean + 1e-12
        same = flips(before, before, judge[0], judge[0])
        assert same.exact.mean == 1.0 and same.net.mean == same.lost == 0.0
    with pytest.raises(ValueError, match="stricter"):
        flips(["a"], ["A"], [True], [False], normalise=casefolded)


def test_the_frontier_is_what_nothing_beats() -> None:
    rng = random.Random(1)
    for _ in range(50):
        points = [(rng.randint(0, 6), rng.randint(0, 6), rng.randint(0, 2)) for _ in range(rng.randint(1, 25))]
        beaten = [any(p != q and all(a >= b for a, b in zip(p, q, strict=True)) for p in points) for q in points]
        wanted = [i for i, q in enumerate(points) if not beaten[i] and q not in points[:i]]
        assert frontier(points) == wanted
        shuffled = rng.sample(points, len(points))
        best = {points[i] for i in wanted}
        assert {shuffled[i] for i in frontier(shuffled)} == best  # whatever the order
        without = [q for q, lost in zip(points, beaten, strict=True) if not lost]
        assert {without[i] for i in frontier(without)} == best  # and without what is beaten anyway
    assert frontier([]) == []
