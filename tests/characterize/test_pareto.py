"""Fronts: nothing on one is beaten, chance is not taken for a difference, and shapes are those of a naive reference."""

from __future__ import annotations

import random
from itertools import product

import pytest
from characterized import choice
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv.characterize.analyse.pareto import Axis, axes_of, pareto
from keepkv.characterize.analyse.shape import hypervolume, knee, normalised
from keepkv.characterize.record.resample import Samples
from keepkv.errors import KeepKVError

AXES = [Axis("ratio", "min"), Axis("score", "max")]
POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8)


def exact(values: dict[str, float]) -> dict[str, Samples]:
    """Samples without any spread."""
    return {name: Samples((float(x),) * 3, tuple((0, 0, i) for i in range(3))) for name, x in values.items()}


def candidates(points: list[tuple[int, int]]) -> dict[str, dict[str, Samples]]:
    return {str(i): exact({"ratio": a, "score": b}) for i, (a, b) in enumerate(points)}


@settings(max_examples=60, deadline=None)
@given(POINTS)
def test_the_front_of_exact_numbers_is_the_naive_one(points: list[tuple[int, int]]) -> None:
    found = pareto(candidates(points), AXES)
    naive = [not any(c <= a and d >= b and (c, d) != (a, b) for c, d in points) for a, b in points]
    assert [one.on_front for one in found] == naive and any(naive)


@settings(max_examples=40, deadline=None)
@given(POINTS, st.randoms(use_true_random=False))
def test_the_order_does_not_matter_and_duplicates_are_tied(points: list[tuple[int, int]], rng: random.Random) -> None:
    held = candidates([*points, points[0]])
    names = [*held]
    rng.shuffle(names)
    one = {x.name: (x.on_front, set(x.dominated_by)) for x in pareto(held, AXES)}
    other = {x.name: (x.on_front, set(x.dominated_by)) for x in pareto({name: held[name] for name in names}, AXES)}
    assert one == other
    twin = str(len(points))
    assert one["0"][0] == one[twin][0] and twin not in one["0"][1]
    assert twin in next(x for x in pareto(held, AXES) if x.name == "0").tied_with


def test_chance_is_a_tie_and_a_difference_beyond_it_is_not() -> None:
    noisy = {
        name: choice(name, seed, noise=1.0, tpot_p50=mean).samples
        for name, mean, seed in (("a", 5.0, 1), ("b", 5.2, 2))
    }
    axis = [Axis("tpot_p50", "min")]
    by_name = {one.name: one for one in pareto(noisy, axis)}
    better, worse = sorted(noisy, key=lambda name: noisy[name]["tpot_p50"].point)
    assert by_name[worse].on_front and by_name[worse].tied_with == (better,)
    clear = {"a": choice("a", 1, noise=0.1, tpot_p50=5.0).samples, "b": choice("b", 2, noise=0.1, tpot_p50=5.2).samples}
    assert [one.on_front for one in pareto(clear, axis)] == [True, False]


def test_pairs_see_what_separate_draws_miss() -> None:
    rng = random.Random(0)
    items = [rng.gauss(0, 1) for _ in range(60)]
    keys = tuple((0, 0, i) for i in range(60))
    held = {
        "a": {"score": Samples(tuple(items), keys)},
        "b": {"score": Samples(tuple(x - 0.05 + rng.gauss(0, 0.01) for x in items), keys)},
    }
    axis = [Axis("score", "max")]
    assert pareto(held, axis)[1].dominated_by == ("a",)
    assert pareto(held, axis, paired=False)[1].tied_with == ("a",)


def test_what_was_not_measured_is_left_out() -> None:
    held = {"a": exact({"ratio": 1}), "b": exact({"ratio": 2, "score": 0})}
    one, other = pareto(held, AXES)
    assert one.missing == ("score",) and not one.on_front and other.on_front


def test_axes_by_their_names() -> None:
    assert axes_of(["ratio", "score", "max:tpot_p50"]) == [*AXES, Axis("tpot_p50", "max")]
    for text, said in (("ratios", "ratio"), ("length_ratio", "say which way"), ("best:ratio", "say which way")):
        with pytest.raises(KeepKVError, match=said):
            axes_of([text])
    with pytest.raises(KeepKVError, match="no axes"):
        axes_of([])


def test_hypervolumes_that_are_known() -> None:
    assert hypervolume([(1, 1)], (2, 2)) == 1
    assert hypervolume([(0, 1), (1, 0)], (2, 2)) == 3
    assert hypervolume([(0, 0, 0)], (1, 2, 3)) == 6
    assert hypervolume([(0, 0, 1), (0, 1, 0), (1, 0, 0)], (2, 2, 2)) == 7
    assert hypervolume([(2, 0), (5, 5)], (2, 2)) == hypervolume([], (2, 2)) == 0
    assert hypervolume([(1, 1), (1, 1)], (2, 2)) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=5))
def test_hypervolumes_count_unit_cubes(points: list[tuple[int, int, int]]) -> None:
    cubes = sum(
        any(all(x <= c for x, c in zip(point, cube, strict=True)) for point in points)
        for cube in product(range(4), repeat=3)
    )
    assert hypervolume(points, (4, 4, 4)) == cubes


def test_the_knee_of_a_known_curve() -> None:
    curve = [(x, 1 / x) for x in (0.2, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0)]
    # After both axes run from 0 to 1 the hyperbola is nearest to the corner where x = 1.
    assert curve[knee(curve)] == (1.0, 1.0)
    assert knee([(0, 1), (1, 0)]) == 0 and knee([(3, 3)]) == 0
    a, b = (0.0, 1.0), (1.0, 0.0)
    distances = [(b[0] - a[0]) * (a[1] - y) - (a[0] - x) * (b[1] - a[1]) for x, y in normalised(curve)]
    assert distances.index(max(distances)) == knee(curve)
