"""How spans share a budget, on plain numbers and plain tensors, against loops and by property."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from score_views import row, rows_of, together
from torch import Tensor

from keepkv.allocate.water_filling import largest_remainder, share, water_fill
from keepkv.core.intervals import FAR, Intervals
from keepkv.core.slots import LayerView
from keepkv.errors import SpanError
from keepkv.score import KNorm
from keepkv.spans import RowSpans, Span, SpanPolicy
from keepkv.spans.select import keep_by_span, needed, trim

GROUP = st.tuples(st.integers(0, 40), st.floats(0.1, 8), st.integers(0, 40), st.integers(0, 40))


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@settings(max_examples=150, deadline=None)
@given(st.lists(GROUP, min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 10**6), st.booleans())
def test_shares_sum_exactly_within_their_bounds(
    groups: list[tuple[int, float, int, int]], part: float, seed: int, edge: bool
) -> None:
    """Whatever the sizes, weights and bounds; also for nothing to share, and for room for everything."""
    high = torch.tensor([m for m, *_ in groups])
    low = torch.tensor([min(m, a) for m, _, a, _ in groups])
    wanted = torch.tensor([min(m, max(a, b)) for m, _, a, b in groups])
    weights = tensor(*(w * m for m, w, *_ in groups))
    least, most = int(low.sum()), int(high.sum())
    total = torch.tensor([least, most][seed % 2] if edge else round(least + part * (most - least)))
    own = largest_remainder(water_fill(total, tensor(*[1.0] * len(groups)), low, high), total, high)
    for fair in (1.0, part, 0.0):
        got = share(total, weights, low, wanted, high, own, fair)
        assert int(got.sum()) == int(total)
        assert bool((got >= low).all()) and bool((got <= high).all())
        if int(wanted.sum()) <= int(total):
            assert bool((got >= wanted).all())
        if fair == 0 and bool((own >= wanted).all()):
            assert torch.equal(got, own)


def test_shares_by_hand() -> None:
    def shares(total: int, weights: Tensor, low: list[int], high: list[int]) -> list[int]:
        bounds = torch.tensor(low), torch.tensor(low), torch.tensor(high)
        return share(torch.tensor(total), weights, *bounds, None, 1.0).tolist()

    assert shares(10, tensor(30, 70), [0, 0], [30, 70]) == [3, 7]
    assert shares(10, tensor(2 * 30, 70), [0, 0], [30, 70]) == [5, 5]  # 4.6 and 5.4
    assert shares(10, tensor(30, 70), [6, 0], [30, 70]) == [6, 4]
    assert shares(10, tensor(30, 70), [0, 0], [30, 4]) == [6, 4]
    assert shares(2, tensor(1, 1, 1), [0, 0, 0], [1, 1, 1]) == [1, 1, 0]  # ties go to the earlier
    assert shares(0, tensor(5, 5), [0, 0], [5, 5]) == [0, 0] and shares(10, tensor(5, 5), [0, 0], [5, 5]) == [5, 5]
    blended = share(torch.tensor(10), tensor(50, 50), *torch.tensor([[0, 0], [0, 0], [50, 50]]), tensor(0, 10), 0.5)
    assert blended.tolist() == [3, 7]  # halfway from 0, 10 to 5, 5, and the tie to the earlier


@pytest.mark.parametrize("size", [(9, 4), (12, 1), (2, 11)])
@pytest.mark.parametrize("budget", [1, 3, 7, 13])
def test_two_spans_over_everything_follow_the_quota_rule(size: tuple[int, int], budget: int) -> None:
    """⌊b·n₁/n⌋ for the earlier, the rest for the later, up to rounding."""
    view, spans = row(0, slots=13), held([Span(0, size[0]), Span(size[0], 13)])
    keep = fair_keep(view, spans, budget)
    counts = keep[..., : size[0]].sum(-1), keep[..., size[0] :].sum(-1)
    assert bool((counts[0] + counts[1] == budget).all())
    assert bool(((counts[0] - budget * size[0] // 13) <= 1).all() and (counts[0] >= budget * size[0] // 13).all())


# --- one head of a layer ---------------------------------------------------------------------------------------------


def held(spans: list[Span] | list[list[Span]], rows: int = 1, prompt: int | None = None, **policy: object) -> RowSpans:
    """Spans of ``rows`` rows, whose prompts have ``prompt`` tokens."""
    made = RowSpans(SpanPolicy(spans, **policy))  # type: ignore[arg-type]
    made.begin(rows, torch.device("cpu"))
    made.prompt = None if prompt is None else torch.full((rows,), prompt)
    return made


def protect(view: LayerView, spans: RowSpans, pins: Tensor | None = None) -> LayerView:
    protected = spans.protects(view.slots.positions) & view.slots.valid
    return replace(view, protected=protected if pins is None else protected | pins)


def fair_keep(view: LayerView, spans: RowSpans, budget: int, scores: Tensor | None = None) -> Tensor:
    """(B,H,S): what is kept of a view whose tokens of protected spans are protected."""
    scores = torch.rand(view.slots.shape, generator=torch.Generator().manual_seed(3)) if scores is None else scores
    counts = torch.full(view.slots.shape[:2], budget).minimum(view.slots.lengths)
    return keep_by_span(scores, counts, view, spans, scores)


def drawn_spans(draw: st.DrawFn, length: int) -> list[Span]:
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2, max_size=6)))
    made = []
    for a, b in pairwise(cuts):
        mode = draw(st.sampled_from(["fair", "protect", "default", None]))
        if mode is not None:
            fair = mode == "fair"
            weight, least = (draw(st.floats(0.2, 5)), draw(st.integers(0, b - a))) if fair else (1.0, 0)
            made.append(Span(a, b, mode, weight, least))
    return made


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_keep_by_span_as_loops(data: st.DataObject) -> None:
    """Rows of unequal length, ties, evicted slots, pins, generated tokens: the best of each group by its share."""
    sizes = data.draw(st.lists(st.integers(2, 14), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 99))
    rng = torch.Generator().manual_seed(seed)
    view = together([row(seed + n, slots=size, queries=1) for n, size in enumerate(sizes)])
    gone = torch.rand(view.slots.shape, generator=rng) < 0.2
    view = replace(view, slots=view.slots.with_(positions=view.slots.positions.masked_fill(gone, -1)))
    lists = [drawn_spans(data.draw, size) for size in sizes]
    spans = held(
        lists, len(sizes), prompt=data.draw(st.integers(1, 14)), fair_lambda=data.draw(st.sampled_from([1, 0.5]))
    )
    pins = (torch.rand(view.slots.shape, generator=rng) < 0.15) & view.slots.valid
    view = protect(view, spans, pins)
    assert view.protected is not None
    scores = torch.randint(0, 4, view.slots.shape, generator=rng).float()
    counts = torch.full(view.slots.shape[:2], data.draw(st.integers(1, 14)))
    counts = counts.minimum(view.slots.lengths).maximum(view.protected.sum(-1))
    keep = keep_by_span(scores, counts, view, spans, scores)
    assert torch.equal(keep.sum(-1), counts)
    assert bool((keep | ~view.protected).all()) and not bool((keep & ~view.slots.valid).any())
    group = spans.group_of(view.slots.positions)
    always = spans.protects(view.slots.positions)
    for b, h in ((b, h) for b in range(len(sizes)) for h in range(2)):
        for g in range(int(group.max()) + 1):
            mine = [
                s
                for s in range(keep.shape[2])
                if view.slots.valid[b, h, s] and not always[b, h, s] and group[b, h, s] == g
            ]
            best = sorted(mine, key=lambda s: (not pins[b, h, s], -float(scores[b, h, s]), s))
            chosen = [s for s in mine if keep[b, h, s]]
            assert sorted(best[: len(chosen)]) == chosen


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tokens_of_each_group_are_counted_right(data: st.DataObject) -> None:
    """Fair spans cut by protected ones, in a prompt partly read, and what is generated after it."""
    spans = drawn_spans(data.draw, 20) + [Span(4, 7, "protect"), Span(6, 9, "protect")]
    prompt, seen = data.draw(st.integers(1, 24)), data.draw(st.integers(0, 24))
    rows = held(spans, prompt=prompt)
    positions = torch.arange(seen)[None, None]
    free = ~rows.protects(positions)
    counted = torch.zeros(rows.groups.weights.shape[-1], dtype=torch.int64)
    counted.scatter_add_(0, rows.group_of(positions)[0, 0], free[0, 0].long())
    assert rows.tokens(torch.tensor([seen]))[0].tolist() == counted.tolist()
    assert int(rows.protected_tokens(torch.tensor([seen]))) == int((~free).sum())


@settings(max_examples=60, deadline=None)
@given(
    cut=st.integers(1, 13),
    a=st.integers(0, 12),
    seed=st.integers(0, 99),
    budget=st.integers(1, 14),
    sinks=st.booleans(),
)
def test_rates_of_fair_spans_differ_by_rounding_only(cut: int, a: int, seed: int, budget: int, sinks: bool) -> None:
    """|K_X − K_Y| ≤ 1/n_X + 1/n_Y in every head; sinks inside a span are part of its share."""
    assume(a < cut)
    view = row(seed, slots=14, queries=1)
    pins = view.slots.positions < 2 if sinks else torch.zeros_like(view.slots.valid)
    assume(not sinks or (a == 0 and cut >= 2 and budget * cut >= 2 * 14))  # or the bound is active
    keep = fair_keep(
        protect(view, held([Span(a, cut), Span(cut, 14)]), pins), held([Span(a, cut), Span(cut, 14)]), budget
    )
    rates = keep[..., a:cut].sum(-1) / (cut - a), keep[..., cut:].sum(-1) / (14 - cut)
    assert bool(((rates[0] - rates[1]).abs() <= 1 / (cut - a) + 1 / (14 - cut) + 1e-6).all())


def test_protected_tokens_survive_ties_and_bad_scores() -> None:
    spans = held([Span(3, 6, "protect"), Span(0, 8), Span(8, 14)])
    view = protect(row(0), spans)
    for bad in (0.0, -math.inf, math.nan):
        scores = torch.zeros(view.slots.shape, dtype=torch.bfloat16)
        scores[..., 3:6] = bad
        keep = fair_keep(view, spans, 5, scores)
        assert bool(keep[..., 3:6].all()) and bool((keep.sum(-1) == 5).all())
        everything_bad = fair_keep(view, spans, 5, torch.full(view.slots.shape, bad))
        assert bool(everything_bad[..., 3:6].all()) and bool((everything_bad.sum(-1) == 5).all())


def test_what_spans_need_and_what_trimming_leaves() -> None:
    spans = held([Span(3, 8, "protect"), Span(8, 14, min_keep=4)])
    pins = row(0).slots.positions < 2
    view = protect(row(0), spans, pins)
    assert needed(view, spans).tolist() == [2 + 5 + 4]
    scores = view.slots.positions.float()
    left = trim(scores, torch.tensor([4]), view, pins)
    assert left[0, 0].nonzero().flatten().tolist() == [0, 1, 6, 7]  # sinks, then protected tokens by score
    assert trim(scores, torch.tensor([20]), view, pins).equal(view.protected)  # type: ignore[arg-type]


def test_where_min_keep_does_not_fit_it_shrinks_in_proportion() -> None:
    spans = held([Span(0, 7, min_keep=6), Span(7, 14, min_keep=3)])
    counts = fair_keep(row(0), spans, 6)
    assert counts[0, 0, :7].sum() == 4 and counts[0, 0, 7:].sum() == 2


def test_swapping_two_spans_swaps_what_is_kept_of_them() -> None:
    """With a score that does not know positions."""
    view = row(4, slots=14)
    first, second = slice(0, 8), slice(8, 14)
    moved = torch.cat((view.slots.keys[:, :, second], view.slots.keys[:, :, first]), dim=2)
    other = replace(view, slots=view.slots.with_(keys=moved))
    for budget in (4, 7, 11):
        keep = fair_keep(view, held([Span(0, 8), Span(8, 14)]), budget, KNorm()(view))
        swapped = fair_keep(other, held([Span(0, 6), Span(6, 14)]), budget, KNorm()(other))
        assert torch.equal(keep[..., first], swapped[..., 6:]) and torch.equal(keep[..., second], swapped[..., :6])


def test_rows_follow_their_spans() -> None:
    lists = [[Span(0, 4), Span(5, 9, "protect")], [Span(2, 14)]]
    view = together([row(1), row(2)])
    spans = held(lists, 2)
    keep = fair_keep(protect(view, spans), spans, 6)
    spans.index(torch.tensor([1, 0, 1]))
    again = rows_of(view, [1, 0, 1])
    scores = torch.rand(view.slots.shape, generator=torch.Generator().manual_seed(3))[[1, 0, 1]]
    assert torch.equal(fair_keep(protect(again, spans), spans, 6, scores), keep[[1, 0, 1]])


def test_intervals() -> None:
    some = Intervals.of([[(2, 4), (4, 9)], [(5, 6)]], torch.device("cpu"))
    positions = torch.tensor([[-1, 1, 2, 4, 8, 9], [-1, 4, 5, 6, 7, 100]])
    assert some.find(positions).tolist() == [[-1, -1, 0, 1, 1, -1], [-1, -1, 0, -1, -1, -1]]
    assert some.until(positions)[0].tolist() == [FAR, FAR, 4, 9, 9, FAR]
    assert some.before(torch.tensor([5, 100])).tolist() == [[2, 1], [1, 0]]


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([Span(0, 5), Span(4, 9)], "overlap"),
        ([(0, 5)], "keepkv.Span"),
        ("0:5", "keepkv.Span"),
        ([[Span(0, 5)], Span(0, 5)], "per row"),
    ],
)
def test_wrong_spans_are_refused(spans: object, said: str) -> None:
    with pytest.raises(SpanError, match=said):
        SpanPolicy.of(spans)


@pytest.mark.parametrize(
    "options",
    [
        {"start": 3, "end": 3},
        {"start": -1, "end": 3},
        {"start": 0, "end": 2.5},
        {"mode": "whitelist"},
        {"weight": 0},
        {"weight": math.inf},
        {"min_keep": 6},
        {"mode": "protect", "min_keep": 2},
        {"mode": "default", "weight": 2.0},
    ],
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SpanError):
        Span(**{"start": 0, "end": 5, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"fair_lambda": 1.5}, {"on_overflow": "ignore"}, {"scoring": "local"}])
def test_wrong_policies_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SpanError, match=next(iter(options))):
        SpanPolicy([Span(0, 5)], **options)  # type: ignore[arg-type]
