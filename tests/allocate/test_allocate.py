"""Allocations against loops: who keeps how much, and exactly which slots."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_views import row, rows_of, together
from torch import Tensor

from keepkv.allocate import AdaKV, Pooled, Pyramid, Uniform, keep_mask
from keepkv.allocate.select import tiers
from keepkv.core.slots import LayerView
from keepkv.errors import KeepKVError

torch.set_num_threads(1)
SIZES = st.lists(st.integers(1, 14), min_size=1, max_size=3)


def batch(sizes: list[int], seed: int, protect: bool) -> LayerView:
    """Rows of these lengths, left-padded, optionally with some slots protected."""
    views = [row(seed + n, slots=size, queries=1) for n, size in enumerate(sizes)]
    rng = torch.Generator().manual_seed(seed)
    pins = [torch.rand(v.slots.shape, generator=rng) < 0.2 if protect else None for v in views]
    return together([replace(v, protected=pin) for v, pin in zip(views, pins, strict=True)])


def some_scores(view: LayerView, seed: int, ties: bool) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 3, view.slots.shape, generator=rng).float()
    return torch.rand(view.slots.shape, generator=rng)


def ranking(view: LayerView, scores: Tensor, b: int, h: int) -> list[int]:
    """Slots of a head, most wanted first."""
    live = [s for s in range(view.slots.shape[2]) if view.slots.positions[b, h, s] >= 0]
    pinned = [s for s in live if view.protected is not None and view.protected[b, h, s]]
    return sorted(live, key=lambda s: (s not in pinned, -float(scores[b, h, s]), s))


def pins(view: LayerView, b: int, h: int) -> int:
    return 0 if view.protected is None else int((view.protected & view.slots.valid)[b, h].sum())


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 999), protect=st.booleans(), ties=st.booleans(), count=st.integers(0, 16))
def test_keep_mask(sizes: list[int], seed: int, protect: bool, ties: bool, count: int) -> None:
    view = batch(sizes, seed, protect)
    scores = some_scores(view, seed, ties)
    counts = torch.full(view.slots.shape[:2], count)
    keep = keep_mask(scores, counts, view)
    for b in range(len(sizes)):
        for h in range(2):
            wanted = max(count, pins(view, b, h))
            assert keep[b, h].nonzero().flatten().tolist() == sorted(ranking(view, scores, b, h)[:wanted])


def test_keep_mask_with_bad_scores() -> None:
    """Infinite and undefined scores, half precision: protected slots stay, empties never come in, NaN goes last."""
    view = batch([6, 4], 0, False)
    scores = torch.zeros(2, 2, 6)
    scores[..., 0], scores[..., 3], scores[..., 4], scores[..., 5] = math.inf, -math.inf, math.nan, math.inf
    protected = torch.zeros_like(view.slots.valid)
    protected[..., 4] = True
    view = replace(view, protected=protected)
    keep = keep_mask(scores.to(torch.bfloat16), torch.full((2, 2), 3), view)
    assert keep[0, 0].nonzero().flatten().tolist() == [0, 4, 5]
    assert keep[1, 0].nonzero().flatten().tolist() == [2, 4, 5]
    assert keep_mask(scores, torch.full((2, 2), 5), view)[0, 0].tolist() == [True] * 3 + [False, True, True]


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 999), protect=st.booleans(), budget=st.integers(1, 16))
def test_uniform(sizes: list[int], seed: int, protect: bool, budget: int) -> None:
    view = batch(sizes, seed, protect)
    counts = Uniform()(some_scores(view, seed, False), view, torch.full((len(sizes),), budget))
    for b, size in enumerate(sizes):
        assert counts[b].tolist() == [min(size, max(budget, pins(view, b, h))) for h in range(2)]


# --- AdaKV -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    sizes=SIZES,
    seed=st.integers(0, 999),
    protect=st.booleans(),
    ties=st.booleans(),
    budgets=st.lists(st.integers(1, 16), min_size=3, max_size=3),
    alpha=st.sampled_from([0.0, 0.2, 0.29, 0.5, 1.0]),
)
def test_adakv(sizes: list[int], seed: int, protect: bool, ties: bool, budgets: list[int], alpha: float) -> None:
    """Floors, the flat top-k and exact totals; the kept slots are those that the pool chose."""
    view = batch(sizes, seed, protect)
    scores = some_scores(view, seed, ties)
    budget = torch.tensor(budgets[: len(sizes)])
    counts = AdaKV(alpha)(scores, view, budget)
    keep = keep_mask(scores, counts, view)
    for b, size in enumerate(sizes):
        floor = [min(size, max(math.floor(alpha * budgets[b] + 1e-9), pins(view, b, h))) for h in range(2)]
        order = [ranking(view, scores, b, h) for h in range(2)]
        chosen = {(h, s) for h in range(2) for s in order[h][: floor[h]]}
        rest = sorted(
            ((h, s) for h in range(2) for s in order[h][floor[h] :]), key=lambda e: (-float(scores[b, e[0], e[1]]), e)
        )
        total = min(2 * size, max(2 * budgets[b], sum(floor)))
        chosen |= set(rest[: total - len(chosen)])
        assert counts[b].sum() == total
        assert all(counts[b, h] >= floor[h] for h in range(2))
        assert {(h, s) for h, s in keep[b].nonzero().tolist()} == chosen


def test_adakv_gives_more_to_flat_heads_and_is_uniform_at_alpha_one() -> None:
    view = batch([14], 0, False)
    scores = torch.full((1, 2, 14), 0.05)
    scores[0, 0, 0] = 1.0
    scores[0, 0, 1:] = 0.001
    assert AdaKV(0.25)(scores, view, torch.tensor([8])).tolist() == [[2, 14]]
    assert AdaKV(1.0)(scores, view, torch.tensor([8])).tolist() == [[8, 8]]
    with pytest.raises(KeepKVError):
        AdaKV(1.1)


def test_adakv_rows_do_not_meet() -> None:
    view = batch([14, 9, 5], 3, True)
    scores = some_scores(view, 3, True)
    budget = torch.tensor([6, 4, 7])
    wanted = AdaKV()(scores, view, budget)
    assert torch.equal(AdaKV()(scores[[2, 0, 1]], rows_of(view, [2, 0, 1]), budget[[2, 0, 1]]), wanted[[2, 0, 1]])


# --- layer budgets -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 40),
    budget=st.floats(1, 5000),
    beta=st.floats(1, 100),
    reserved=st.integers(0, 40),
    seen=st.none() | st.integers(1, 8000),
)
def test_pyramid_totals(layers: int, budget: float, beta: float, reserved: int, seen: int | None) -> None:
    tokens = None if seen is None else torch.tensor([max(seen, math.ceil(budget))])
    piece = Pyramid(beta=beta, reserved=reserved)
    mean = torch.tensor([budget], dtype=torch.float64)
    got = [float(piece.layer_budget(mean, layer, layers, tokens)) for layer in range(layers)]
    assert sum(got) == math.floor(layers * budget + 1e-6)
    assert all(x == int(x) for x in got)
    assert all(x >= y - 1 for x, y in pairwise(got)), "falls from layer to layer, up to rounding"
    least = reserved + 1 if budget >= reserved + 1 else math.floor(budget)
    assert min(got) >= least
    if tokens is not None:
        assert max(got) <= int(tokens)


def test_pyramid_follows_the_paper() -> None:
    """n = 100 per layer, beta = 20: 195 down to 5, and the window on top."""
    got = [float(Pyramid(reserved=32).layer_budget(torch.tensor([132.0]), layer, 5)) for layer in range(5)]
    assert got == [32 + n for n in (195, 147, 100, 53, 5)] or got == [32 + n for n in (195, 147, 100, 52, 6)]
    clipped = [
        float(Pyramid().layer_budget(torch.tensor([100.0]), layer, 5, torch.tensor([150]))) for layer in range(5)
    ]
    assert clipped == [150, 125, 100, 75, 50]
    every = [float(Pyramid().layer_budget(torch.tensor([150.0]), layer, 5, torch.tensor([150]))) for layer in range(5)]
    assert every == [150] * 5


def test_pyramid_rows_have_budgets_of_their_own() -> None:
    mean = torch.tensor([10.0, 50.0, 3.0])
    both = torch.stack([Pyramid().layer_budget(mean, layer, 7) for layer in range(7)])
    for b in range(3):
        alone = torch.stack([Pyramid().layer_budget(mean[b : b + 1], layer, 7) for layer in range(7)])
        assert torch.equal(both[:, b : b + 1], alone)
    assert both.sum(0).tolist() == [70, 350, 21]
    with pytest.raises(KeepKVError):
        Pyramid(beta=0.5)


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES, layers=st.integers(1, 3), seed=st.integers(0, 999), protect=st.booleans(), ties=st.booleans(),
    budget=st.integers(0, 16), alpha=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_layers_that_share(
    sizes: list[int], layers: int, seed: int, protect: bool, ties: bool, budget: int, alpha: float
) -> None:
    """Each head its own best share, then the best of what is left anywhere, as one loop over all would take it."""
    views = [batch(sizes, seed + 10 * n, protect) for n in range(layers)]
    scores = [some_scores(view, seed + n, ties) for n, view in enumerate(views)]
    budgets = [torch.full((len(sizes),), budget)] * layers
    counts = Pooled(alpha).across(scores, [tiers(view) for view in views], budgets)
    for b in range(len(sizes)):
        heads = [(n, h) for n in range(layers) for h in range(2)]
        wanted, rest = {}, []
        for n, h in heads:
            order = ranking(views[n], scores[n], b, h)
            safe = min(max(math.floor(alpha * budget + 1e-9), pins(views[n], b, h)), len(order))
            wanted[n, h] = safe
            rest += [(-float(scores[n][b, h, s]), n, h, s) for s in order[safe:]]
        room = max(0, budget * len(heads) - sum(wanted.values()))
        for _, n, h, _ in sorted(rest)[:room]:
            wanted[n, h] += 1
        assert {(n, h): int(counts[n][b, h]) for n, h in heads} == wanted


def test_one_layer_shares_as_adakv() -> None:
    view = batch([14, 9], 0, True)
    scores, budget = some_scores(view, 0, False), torch.tensor([6, 6])
    assert torch.equal(Pooled(0.2)(scores, view, budget), AdaKV(0.2)(scores, view, budget))
