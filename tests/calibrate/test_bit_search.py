"""Bits by layer: no arm exceeds its target, and each does what it says."""

from __future__ import annotations

import random

import pytest

from keepkv.calibrate.arms import Arm, best
from keepkv.calibrate.bit_search import average, exchanged, greedy, searched, uniform
from keepkv.kernels.codes import BITS

ERRORS = [{2: 9.0, 4: 1.0, 8: 0.0}, {2: 3.0, 4: 2.0, 8: 0.0}, {2: 0.5, 4: 0.1, 8: 0.0}, {2: 20.0, 4: 12.0, 8: 0.0}]


@pytest.mark.parametrize("target", [2, 2.4, 3, 3.35, 4, 5.5, 8])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1, 2, 5]])
def test_no_arm_exceeds_the_target(target: float, sizes: list[int]) -> None:
    rng, first = random.Random(0), greedy(ERRORS, sizes, target)
    for bits in (uniform(sizes, target), first):
        assert set(bits) <= set(BITS) and average(bits, sizes) <= target
    for _ in range(200):
        first = exchanged(first, sizes, target, rng)
        assert set(first) <= set(BITS) and average(first, sizes) <= target


def test_greedy_spends_where_errors_fall_most() -> None:
    assert greedy(ERRORS, [1, 1, 1, 1], 4) == (4, 2, 2, 8)
    assert greedy(ERRORS, [1, 1, 1, 100], 2.1) == (4, 8, 4, 2)
    assert greedy(ERRORS, [1, 1, 1, 1], 8) == (8, 8, 8, 8)


def test_the_search_finds_what_greedy_misses_and_the_same_for_a_seed() -> None:
    def error(bits: tuple[int, ...], count: int) -> float:
        return abs(sum(b * k for b, k in zip(bits, (1, 2, 3, 4), strict=True)) - 50) + 1 / count

    sizes, start = [1] * 4, (8, 4, 2, 2)
    found = [searched(start, sizes, 4, error, 48, 60, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] and average(found[0], sizes) <= 4 and error(found[0], 48) < error(start, 48)
    assert searched((8,) * 4, sizes, 8, error, 48, 60, 0) == (8,) * 4  # nothing to exchange


def test_another_arm_is_written_only_if_texts_agree_that_it_is_better() -> None:
    def arms(**divergence: list[float]) -> dict[str, Arm]:
        return {name: Arm((4,), 4.0, found) for name, found in divergence.items()}

    level = [1.0, 2.0, 3.0]
    assert best(arms(uniform=level, greedy=level, searched=level)) == "greedy"
    assert best(arms(uniform=[2.0] * 3, greedy=level, searched=[0.9, 1.9, 2.95])) == "searched"
    assert best(arms(uniform=[0.5, 1.5, 2.5], greedy=level, searched=[0.9, 1.9, 2.95])) == "uniform"
    assert best(arms(uniform=level, greedy=level, searched=[0.1, 2.2, 2.9])) == "greedy"
