"""Intervals of runs: they cover what they should, and pairs narrow them."""

from __future__ import annotations

import random

import pytest
import torch

from keepkv.characterize.record.resample import Samples, difference, quantile


def samples(values: list[float], statistic: str = "mean", seed: int = 0) -> Samples:
    return Samples(tuple(values), tuple((seed, 0, i) for i in range(len(values))), statistic)


def test_quantiles_are_those_of_torch() -> None:
    x = torch.randn(5, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.3, 0.5, 0.95, 1.0):
        torch.testing.assert_close(quantile(x, q), x.quantile(q, dim=-1))


def covered(statistic: str, stays: float, plain: bool = False) -> float:
    """The share of intervals that hold the truth, 0. stays: how much of a request's trouble the next one has."""
    found = 0
    for trial in range(300):
        rng, values, state = random.Random(trial), [], 0.0
        for _ in range(120):
            state = stays * state + rng.gauss(0, 1)
            values.append(state)
        # With a run for each sample, single samples are drawn: the plain bootstrap.
        keys = tuple((i, 0, 0) if plain else (0, 0, i) for i in range(120))
        one = Samples(tuple(values), keys, statistic).estimate()
        found += one.low <= 0.0 <= one.high
    return found / 300


@pytest.mark.parametrize("statistic", ["mean", "p50"])
def test_nineteen_of_twenty_intervals_cover_the_truth(statistic: str) -> None:
    assert 0.92 <= covered(statistic, stays=0.0) <= 0.97


def test_stretches_cover_what_single_samples_miss() -> None:
    assert covered("mean", stays=0.6, plain=True) + 0.1 < covered("mean", stays=0.6)


def test_pairs_narrow_a_difference() -> None:
    rng = random.Random(0)
    items = [rng.gauss(0, 1) for _ in range(80)]  # how hard an item is matters more than the method
    one = samples([x + 0.1 + rng.gauss(0, 0.05) for x in items])
    other = samples([x + rng.gauss(0, 0.05) for x in items])
    low, high = difference(one, other)
    assert 0.05 < low < 0.1 < high < 0.15
    apart = Samples(other.values, tuple((9, *key[1:]) for key in other.keys))
    wide = difference(one, apart)
    assert wide[1] - wide[0] > 4 * (high - low) and wide[0] < 0 < wide[1]


def test_only_what_both_have_is_compared() -> None:
    one, other = samples([1.0, 2.0, 3.0, 50.0]), samples([1.0, 2.0, 3.0])
    assert difference(one, other) == (0.0, 0.0)


def test_one_sample_has_no_interval_and_several_seeds_are_resampled() -> None:
    alone = samples([3.0]).estimate()
    assert (alone.mean, alone.low, alone.high) == (3.0, None, None)
    seeds = Samples((1.0, 2.0, 3.0, 4.0), tuple((i, 0, 0) for i in range(4))).estimate()
    assert 1.0 <= seeds.low < 2.5 < seeds.high <= 4.0
    assert difference(samples([1.0]), samples([2.0])) is None
