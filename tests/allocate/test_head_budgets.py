"""Budgets of layers and heads from a profile, against the formulas written out, and by property."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from keepkv.allocate import Curves, HeadBudget, LazyLayers, PerLayer, RetrievalHeads
from keepkv.allocate.profile import MEASURED, PREFIX
from keepkv.allocate.water_filling import above
from keepkv.errors import BudgetError, CalibrationError, KeepKVError

torch.set_num_threads(1)
SCORE = st.floats(0, 1).map(lambda x: round(x, 3))


def layers(held: list[list[int]], pinned: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and tiers (1,H,S) of layers whose heads hold so many slots, of which ``pinned`` must stay."""
    size = max(map(max, held))
    tiers = []
    for heads in held:
        tier = torch.zeros(1, len(heads), size, dtype=torch.int8)
        for h, n in enumerate(heads):
            tier[0, h, :n] = 1
            tier[0, h, : min(n, pinned)] = 2
        tiers.append(tier)
    return [torch.rand(x.shape) for x in tiers], tiers


def known(profile: list[list[float]], name: str = "inf") -> list[dict[str, Tensor]]:
    return [{PREFIX + name: torch.tensor(heads, dtype=torch.float64)} for heads in profile]


def counts(
    share: Any, profile: list[list[float]], held: list[list[int]], budget: int, pinned: int = 0, name: str = "inf"
) -> list[list[int]]:
    scores, tiers = layers(held, pinned)
    found = share.across(scores, tiers, [torch.tensor([budget])] * len(held), known(profile, name))
    return [x[0].tolist() for x in found]


def ideal(profile: list[list[float]], b: int, beta: float, eps_layer: float, eps_head: float) -> list[float]:
    """c of every head as §3 of the specification writes it, before anything is rounded."""
    lifted = [s + eps_layer * s / (sum(heads) or 1) for heads in profile for s in heads]
    n, whole = len(lifted), sum(lifted) or 1
    pool = max(0.0, n * math.floor(b / beta) - n * eps_head)
    return [s / whole * pool + (b - math.floor(b / beta)) + eps_head for s in lifted]


@pytest.mark.parametrize(("eps_layer", "eps_head"), [(0.0, 0.0), (0.01, 0.5), (0.3, 2.0)])
def test_the_rule_by_hand(eps_layer: float, eps_head: float) -> None:
    """Two layers of two heads, base 128 and window 16: HeadKV's rule with ε = 0, the predecessor's with its ε."""
    profile = [[0.4, 0.1], [0.05, 0.02]]
    b = 112
    wanted = ideal(profile, b, 1.351, eps_layer, eps_head)
    if not eps_layer:  # floor 112 − 82 = 30, pool 4 · 82 = 328, S/ΣS = .4/.57 …
        assert wanted == pytest.approx([30 + 328 * s / 0.57 for s in (0.4, 0.1, 0.05, 0.02)])
    got = counts(HeadBudget("inf", 1.351, eps_layer, eps_head), profile, [[1000] * 2] * 2, 128, pinned=16)
    flat = [n - 16 for heads in got for n in heads]
    assert sum(flat) == 4 * b and all(abs(n - c) < 1 for n, c in zip(flat, wanted, strict=True))


CASE = st.lists(st.lists(st.tuples(SCORE, st.integers(1, 40)), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    case=CASE, budget=st.integers(1, 45), pinned=st.integers(0, 4), beta=st.floats(1, 8),
    how=st.sampled_from([("flat", "sum"), ("two_level", "sum"), ("two_level", "std")]),
)  # fmt: skip
def test_budgets_are_exact(
    case: list[list[tuple[float, int]]], budget: int, pinned: int, beta: float, how: tuple[str, str]
) -> None:
    """Σc is the budget, floor ≤ c ≤ what a head holds; where flat, exactly what bisection on the level finds."""
    profile, held = [[s for s, _ in heads] for heads in case], [[n for _, n in heads] for heads in case]
    flat_n = [n for x in held for n in x]
    got = [n for x in counts(HeadBudget("inf", beta, 0.01, 0.5, *how), profile, held, budget, pinned) for n in x]
    must = [min(n, pinned) for n in flat_n]
    total = max(sum(must), min(sum(flat_n), budget * len(flat_n)))
    assert sum(got) == total
    base = (total - sum(must)) // len(flat_n)
    floor = base - math.floor(base / beta + 1e-9)
    if how[0] == "flat":
        assert all(min(n, floor + m) <= c for n, c, m in zip(flat_n, got, must, strict=True))
    assert all(m <= c <= n for m, c, n in zip(must, got, flat_n, strict=True))
    if how[0] == "flat" and (base / beta) % 1 > 1e-6:
        extra = [c - floor for c in ideal(profile, base, beta, 0.01, 0.5)]
        room = [max(0, n - m - floor) for n, m in zip(flat_n, must, strict=True)]
        wanted = bisected(extra, room, total - sum(min(n, m + floor) for n, m in zip(flat_n, must, strict=True)))
        for c, n, m, w in zip(got, flat_n, must, wanted, strict=True):
            assert abs(c - min(n, m + floor) - w) < 1 + 1e-6


def bisected(weights: list[float], room: list[int], rest: int) -> list[float]:
    """min(τ·w, room) with the sum ``rest``, by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(middle * w, r) for w, r in zip(weights, room, strict=True)) < rest:
            low = middle
        else:
            high = middle
    return [min(low * w, r) for w, r in zip(weights, room, strict=True)]


@settings(max_examples=60, deadline=None)
@given(case=CASE, budget=st.integers(2, 40), more=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_a_higher_score_never_costs_more_than_the_rounding(
    case: list[list[tuple[float, int]]], budget: int, more: float, seed: int
) -> None:
    profile, held = [[s for s, _ in heads] for heads in case], [[n for _, n in heads] for heads in case]
    layer = seed % len(case)
    head = seed % len(case[layer])
    raised = [list(heads) for heads in profile]
    raised[layer][head] += more
    before, after = (counts(HeadBudget(), p, held, budget) for p in (profile, raised))
    assert after[layer][head] >= before[layer][head] - 1


@settings(max_examples=40, deadline=None)
@given(case=CASE, budget=st.integers(2, 40))
def test_limits_of_beta(case: list[list[tuple[float, int]]], budget: int) -> None:
    profile = [[s + 0.001 for s, _ in heads] for heads in case]
    wide = [[10**4] * len(heads) for heads in case]
    uniform = counts(HeadBudget(beta=1e9), profile, wide, budget)
    assert uniform == [[budget] * len(heads) for heads in case]
    every = [s for heads in profile for s in heads]
    assume(len(every) * budget < 10**4)
    proportional = counts(HeadBudget("inf", 1.0, 0.0, 0.0), profile, wide, budget)
    for got, s in zip((n for x in proportional for n in x), every, strict=True):
        assert abs(got - s / sum(every) * len(every) * budget) < 1


def test_two_levels() -> None:
    """As flat where layers share equally; else layers share first, and a head's part of what its layer got depends on
    its own layer alone."""
    held, alike = [[500, 500]] * 2, [[0.3, 0.1], [0.1, 0.3]]
    flat, two = (counts(HeadBudget("inf", 1.5, 0.0, 0.0, how), alike, held, 60) for how in ("flat", "two_level"))
    assert flat == two
    got = counts(HeadBudget("inf", 1.5, 0.0, 0.0, "two_level"), [[0.3, 0.3], [0.2, 0.0]], held, 60)
    first, second = sum(got[0]), sum(got[1])
    assert (first, second) == (2 * 20 + 120, 2 * 20 + 40) and got[0] == [80, 80]  # floor 20, pool 160 as .6 to .2
    assert got[1] == [40 - 26 + 52, 40 - 26]  # of its 40 a head: floor 40 − ⌊40/1.5⌋, the rest to the first
    spread = counts(HeadBudget("inf", 1.5, 0.0, 0.0, "two_level", "std"), [[0.3, 0.3], [0.2, 0.0]], held, 60)
    assert sum(spread[0]) == 40 and sum(spread[1]) == 200  # heads that are alike have no spread


def test_clipping_goes_to_the_others_and_small_texts_are_kept() -> None:
    profile = [[1.0, 0.0], [0.5, 0.5]]
    got = counts(HeadBudget("inf", 1.351, 0.0, 0.0), profile, [[50, 50]] * 2, 40)
    assert got[0][0] == 50 and sum(map(sum, got)) == 160 and got[0][1] == 11  # its floor, 40 − ⌊40/1.351⌋
    assert counts(HeadBudget(), profile, [[9, 9]] * 2, 40) == [[9, 9]] * 2
    assert counts(HeadBudget("inf", 2.0, 0.0, 0.0), [[0.0, 0.0]] * 2, [[50, 50]] * 2, 20) == [[20, 20]] * 2
    one = counts(HeadBudget("inf", 2.0, 0.0, 0.0), [[1.0, 0.0], [0.0, 0.0]], [[15, 50]] * 2, 20)
    assert one[0][0] == 15 and sum(map(sum, one)) == 80  # heads of score 0 take what is left evenly
    assert max(one[0][1], one[1][0], one[1][1]) <= 25


def test_rows_do_not_meet() -> None:
    scores, tiers = layers([[30, 20], [30, 20]], 2)
    other = layers([[9, 30], [4, 30]], 3)[1]
    both = [torch.cat(pair) for pair in zip(tiers, other, strict=True)]
    budgets, profile = [torch.tensor([12, 7])] * 2, known([[0.9, 0.1], [0.3, 0.2]])
    for share in (HeadBudget(), HeadBudget(integration="two_level"), RetrievalHeads("inf")):
        together = share.across([torch.cat([x, x]) for x in scores], both, budgets, profile)
        for row, tier in enumerate((tiers, other)):
            alone = share.across(scores, tier, [b[row : row + 1] for b in budgets], profile)
            assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def test_two_profiles_together_weigh_the_same() -> None:
    profile = [{PREFIX + "copy": torch.tensor([0.002, 0.0])}, {PREFIX + "copy": torch.tensor([0.0, 0.0])}]
    for held, compose in zip(profile, ([0.0, 0.0], [0.0, 0.7]), strict=True):
        held[PREFIX + "compose"] = torch.tensor(compose)
    scores, tiers = layers([[500, 500]] * 2)
    got = HeadBudget("copy+compose").across(scores, tiers, [torch.tensor([40])] * 2, profile)
    assert got[0][0, 0] == got[1][0, 1] > 60 and got[0][0, 1] == got[1][0, 0] < 13


def test_what_a_profile_cannot_say_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no profile 'full'; it has inf"):
        counts(RetrievalHeads(), [[1.0, 1.0]], [[5, 5]], 3)
    with pytest.raises(CalibrationError, match="of 3 KV heads, the layer has 2"):
        counts(HeadBudget(), [[1.0, 1.0, 1.0]], [[5, 5]], 3)
    with pytest.raises(KeepKVError, match="profile='info' is not one of"):
        HeadBudget("info")
    with pytest.raises(KeepKVError, match=r"beta=0\.5 is not"):
        HeadBudget(beta=0.5)
    assert set(MEASURED) >= {"inf", "copy", "compose"}


# --- heads and layers one after the other --------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(case=CASE, budget=st.integers(1, 45), pinned=st.integers(0, 4))
def test_retrieval_heads(case: list[list[tuple[float, int]]], budget: int, pinned: int) -> None:
    profile, held = [[s for s, _ in heads] for heads in case], [[n for _, n in heads] for heads in case]
    got = [n for x in counts(RetrievalHeads("inf"), profile, held, budget, pinned) for n in x]
    flat = [(s, n) for heads in case for s, n in heads]
    wanted = [min(n, pinned) for _, n in flat]
    left = budget * len(flat) - sum(wanted)
    for i in sorted(range(len(flat)), key=lambda i: -flat[i][0]):
        more = max(0, min(left, flat[i][1] - wanted[i]))
        wanted[i], left = wanted[i] + more, left - more
    assert got == wanted


def test_lazy_layers() -> None:
    """Layers by the attention beyond what is protected: 20 tokens each, 4 of them protected, 10 a head on average."""
    scores, tiers = layers([[20, 20]] * 3, 4)
    for x, away in zip(scores, (0.1, 0.7, 0.4), strict=True):
        x[..., :4], x[..., 4:] = (1 - away) / 4, away / 16
    got = LazyLayers().across(scores, tiers, [torch.tensor([10])] * 3)
    assert [x[0].tolist() for x in got] == [[4, 4], [20, 20], [6, 6]]
    got = LazyLayers().across(scores, tiers, [torch.tensor([30])] * 3)
    assert [x[0].tolist() for x in got] == [[20, 20]] * 3
    scores[1][...] = math.nan  # a broken row is the laziest, and the others go on
    assert LazyLayers().across(scores, tiers, [torch.tensor([10])] * 3)[2].tolist() == [[20, 20]]


# --- curves and shares ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [3, 10, 27])
def test_curves(budget: int) -> None:
    """Against loops: the row of the ratio, shares of the tokens, exact sums; and what is protected stays."""
    generator = torch.Generator().manual_seed(budget)
    ratio = torch.arange(1, 100)[:, None] / 100
    tables = [(ratio + 0.2 * (torch.rand(99, 2, generator=generator) - 0.5)).clamp(0, 1) for _ in range(2)]
    scores, tiers = layers([[40, 40]] * 2, 2)
    got = Curves().across(scores, tiers, [torch.tensor([budget])] * 2, [{PREFIX + "curve": x} for x in tables])
    index = min(98, max(0, round((1 - budget / 40) * 100) - 1))
    wanted = torch.cat([(1 - x[index]) * 40 for x in tables]).clamp(min=2)
    flat = torch.cat(got, dim=1)[0]
    assert int(flat.sum()) == 4 * budget and bool((flat >= 2).all())
    scale = float((wanted - 2).sum()) / (4 * (budget - 2))
    assert bool(((flat - 2) * scale - (wanted - 2)).abs().max() < 1.01 * max(1.0, scale))


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(0, 9), min_size=1, max_size=12).filter(any),
    budget=st.floats(1, 900), reserved=st.integers(0, 20), seen=st.none() | st.integers(1, 2000),
)  # fmt: skip
def test_shares_of_layers(shares: list[float], budget: float, reserved: int, seen: int | None) -> None:
    n, mean = len(shares), torch.tensor([budget], dtype=torch.float64)
    assume(seen is None or budget <= seen)
    rows = None if seen is None else torch.tensor([seen])
    got = [int(PerLayer(shares, reserved).layer_budget(mean, i, n, rows)) for i in range(n)]
    assert sum(got) == math.floor(n * budget + 1e-6)
    assert all(x >= min(reserved, math.floor(budget)) - 1 for x in got)
    assert seen is None or all(x <= seen + 1 for x in got)
    top = shares.index(max(shares))
    assert all(got[top] >= x - 1 for x in got)


def test_shares_by_hand_and_what_is_refused() -> None:
    def each(share: PerLayer, budget: float, seen: int) -> list[int]:
        mean, rows = torch.tensor([budget]), torch.tensor([seen])
        return [int(share.layer_budget(mean, i, 3, rows)) for i in range(3)]

    assert each(PerLayer((2, 1, 1)), 100, 1000) == [150, 75, 75]
    assert each(PerLayer((2, 1, 1)), 100, 120) == [120, 90, 90]
    assert each(PerLayer((1, 0, 0), 20), 100, 120) == [120, 90, 90]  # what the first cannot use
    assert each(PerLayer(), 100, 120) == [100, 100, 100]
    with pytest.raises(BudgetError, match="shares of 2 layers, and 3 are compressed"):
        each(PerLayer((1, 2)), 100, 1000)
    for wrong in ((0, 0), (1, -1), (1, "a"), (math.inf, 1)):
        with pytest.raises(KeepKVError, match="give a number of at least 0 for each layer"):
            PerLayer(wrong)  # type: ignore[arg-type]


def test_above_keeps_its_bounds() -> None:
    floor, high = torch.tensor([[3, 3, 3]]), torch.tensor([[2, 10, 10]])
    got = above(floor, torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([14]), high)
    assert got.tolist() == [[2, 9, 3]]
    assert above(floor, torch.zeros(1, 3), torch.tensor([99]), high).tolist() == [[2, 10, 10]]
