"""Recommendations: a planted optimum is found, limits that bind are named, and only what was measured is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from characterized import choice

from keepkv.characterize.analyse.pareto import axes_of
from keepkv.characterize.analyse.recommend import Limit, recommend
from keepkv.characterize.record.summary import Choice
from keepkv.errors import KeepKVError

AXES = axes_of(["ratio", "tpot_p50", "score"])
FULL = choice("full", 0, ratio=1.0, tpot_p50=1.0, score=0.9)
GOOD = choice("keepkv @ 0.3", 1, ratio=0.3, tpot_p50=0.5, score=0.88)
SMALL = choice("keepkv @ 0.1", 2, ratio=0.1, tpot_p50=0.45, score=0.3)
BAD = choice("random @ 0.3", 3, ratio=0.35, tpot_p50=0.6, score=0.2)
ALL = [FULL, GOOD, SMALL, BAD]


def limits(*texts: str) -> list[Limit]:
    return [Limit.read(text) for text in texts]


def test_a_planted_optimum_is_found_with_its_neighbours_and_their_price() -> None:
    found = recommend(ALL, AXES)
    assert found.pick is GOOD.row and "knee" in found.why
    assert {one.row.choice for one in found.alternatives} == {"full", "keepkv @ 0.1"}
    price = next(one.price for one in found.alternatives if one.row.choice == "full")
    assert price["ratio"] == pytest.approx(1 / 0.3 - 1, rel=0.05)
    beaten = next(one for one in found.standings if one.name == "random @ 0.3")
    assert set(beaten.dominated_by) == {"keepkv @ 0.3", "keepkv @ 0.1"}
    assert found.volume and found.volume["keepkv"] > max(found.volume["full"], found.volume["random"]) > 0


def test_limits_come_first_and_an_objective_instead_of_the_knee() -> None:
    [objective] = axes_of(["ratio"])
    assert recommend(ALL, AXES, objective=objective).pick is SMALL.row
    assert recommend(ALL, AXES, limits("score>=0.8"), objective).pick is GOOD.row
    [best] = axes_of(["score"])
    found = recommend(ALL, AXES, limits("ratio<=0.5"), best)
    assert found.pick is GOOD.row
    assert found.why == "the largest score of the front, of the 3 of 4 that keep ratio ≤ 0.5"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("ratio<=0.05",), r"ratio ≤ 0.05 binds: keepkv @ 0.1 has 0.\d+, \d+ % beyond, and no other comes nearer"),
        (("score>=0.99", "ratio<=2"), r"score ≥ 0.99 binds: full has 0.\d+, \d+ % beyond"),
        (("ratio<=0.2", "score>=0.8"), r"binds together with the others: keepkv @ 0.3 has"),
        (("j_per_correct<=1",), "j_per_correct ≤ 1 J binds: it was not measured"),
    ],
)
def test_what_binds_is_named_with_how_much(given: tuple[str, ...], said: str) -> None:
    found = recommend(ALL, AXES, limits(*given))
    assert found.pick is None
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found.why)


def test_lost_quality_is_held_to_the_bad_end_of_its_interval() -> None:
    noisy = choice("noisy @ 0.3", 5, noise=0.3, ratio=0.3, tpot_p50=0.5, score=0.8, worst_drop=0.0)
    value = noisy.row.metrics["worst_drop"]
    bound = (value.mean + value.high) / 2
    assert recommend([noisy], AXES, limits(f"worst_drop<={bound}")).pick is None
    assert recommend([noisy], AXES, limits(f"worst_drop<={value.high + 0.01}")).pick is noisy.row


def test_what_failed_or_was_unstable_is_never_taken() -> None:
    failed = Choice(replace(GOOD.row, status="crash"), {})
    growing = Choice(replace(SMALL.row, unstable=True), SMALL.samples)
    assert recommend([FULL, failed, growing], AXES).pick is FULL.row
    assert recommend([growing], AXES).pick is None
    with pytest.raises(KeepKVError, match="nothing was measured on"):
        recommend([failed], AXES)
    with pytest.raises(KeepKVError, match="nothing was measured"):
        recommend([], AXES)


def test_the_pick_is_always_one_of_the_measured() -> None:
    for seed in range(20):
        some = [
            choice(f"m{i} @ 0.5", seed * 10 + i, noise=0.2, ratio=i / 5, tpot_p50=1 - i / 7, score=i / 9)
            for i in range(1, 6)
        ]
        found = recommend(some, AXES)
        assert any(found.pick is one.row for one in some)
        assert all(any(other.row is one.row for one in some) for other in found.alternatives)


def test_limits_as_they_are_written() -> None:
    assert str(Limit.read(" ttft_p95 <= 0.5 ")) == "ttft_p95 ≤ 0.5 s" and Limit.read("score>=1e-1").bound == 0.1
    for text in ("ttft_p95", "ttft_p95=1", "ttft_p95<=x", "tftf_p95<=1"):
        with pytest.raises(KeepKVError):
            Limit.read(text)
