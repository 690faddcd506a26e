"""Scores within spans, on plain tensors: who votes on whom, whatever the chunks and the padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from score_views import doubled, loop_weights, part_of_queries, row, rows_of, together
from torch import Tensor

from keepkv.core.intervals import Intervals
from keepkv.core.slots import LayerView
from keepkv.observe.window import remember_in_spans, span_window
from keepkv.score import H2O, TOVA, KNorm, Score, SnapKV, Streaming
from keepkv.score.queries.remembering import Remembering

SIZE = 16
SPANS = Intervals.of([[(1, 6), (7, 14)]], torch.device("cpu"))
FIRST, SECOND, REST = slice(1, 6), slice(7, 14), [0, 6, 14, 15]
SCORES: list[Score] = [
    SnapKV(window=4, kernel=3),
    SnapKV(window=4, kernel=5, pooling="max"),
    SnapKV(window=1, kernel=5),
    TOVA(),
    H2O(),
    H2O(normalize="mean"),
    Remembering(SnapKV(window=4), 2),
]


def prompt(seed: int, score: Score, **options: Any) -> LayerView:
    """One row of ``SIZE`` tokens, all of them queries of one forward, with what the score keeps per slot."""
    view = row(seed, slots=SIZE, queries=SIZE, spans=SPANS, **options)
    stats = {name: torch.full(view.slots.shape, x.start) for name, x in (score.stats | score.span_stats).items()}
    return replace(view, slots=view.slots.with_(stats=stats))


def watch(score: Score, view: LayerView) -> None:
    if score.observes:
        score.observe(view)
        score.observe_spans(view)


def scored(score: Score, view: LayerView) -> Tensor:
    watch(score, view)
    return score.span_scores(view, score(view))


def name(score: Score) -> str:
    return str(score)


@pytest.mark.parametrize("score", SCORES, ids=name)
def test_what_follows_a_span_has_no_say_in_it(score: Score) -> None:
    """Other tokens behind the first span change nothing in it; without spans they would."""
    view, other = prompt(1, score), prompt(2, score)
    keys = torch.cat((view.slots.keys[:, :, :6], other.slots.keys[:, :, 6:]), dim=2)
    queries = torch.cat((view.queries[:, :, :6], other.queries[:, :, 6:]), dim=2)
    changed = replace(
        view,
        slots=view.slots.with_(keys=keys, stats={n: x.clone() for n, x in view.slots.stats.items()}),
        queries=queries,
        state={},
    )
    a, b = scored(score, view), scored(score, changed)
    assert torch.equal(a[..., FIRST], b[..., FIRST])
    assert not torch.allclose(a[..., SECOND], b[..., SECOND])
    assert not torch.allclose(score(view)[..., FIRST], score(changed)[..., FIRST])
    assert torch.equal(a[..., REST], score(view)[..., REST])  # what is in no span is scored as ever


@pytest.mark.parametrize("score", SCORES, ids=name)
@pytest.mark.parametrize("cuts", [[0, 3, 5, 9, 16], [0, 6, 7, 14, 15, 16], list(range(17))])
def test_chunks_score_as_one_forward(score: Score, cuts: list[int]) -> None:
    view = prompt(1, score)
    whole = scored(
        score, replace(view, slots=view.slots.with_(stats={n: x.clone() for n, x in view.slots.stats.items()}))
    )
    state: dict[str, Tensor] = {}
    for start, stop in pairwise(cuts):
        part = replace(part_of_queries(view, start, stop), state=state)
        watch(score, part)
        for n, x in view.slots.stats.items():
            x[:, :, :stop] = part.slots.stats[n]
    late = replace(view, queries=view.queries[:, :, :0], query_positions=view.query_positions[:, :0], state=state)
    assert torch.allclose(score.span_scores(late, score(late)), whole, atol=1e-6)


@pytest.mark.parametrize("score", SCORES, ids=name)
def test_rows_of_a_batch_score_as_alone(score: Score) -> None:
    """Padding on the left, other spans in other rows or none at all; and state follows the rows."""
    lists = [[(1, 6), (7, 14)], [(0, 3)], []]
    views = [prompt(1, score), part_of_queries(prompt(2, score), 0, 9), part_of_queries(prompt(3, score), 0, 12)]
    alone = []
    for view, mine in zip(views, lists, strict=True):
        own = replace(view, spans=Intervals.of([[*mine]], torch.device("cpu")), state={})
        fresh = own.slots.with_(stats={n: x.clone() for n, x in own.slots.stats.items()})
        own = replace(own, slots=fresh)
        if mine:
            alone.append(scored(score, own))
        else:
            score.observe(own)
            alone.append(score(own))
    batch = replace(together(views), spans=Intervals.of(lists, torch.device("cpu")), state={})
    got = scored(score, batch)
    for i, one in enumerate(alone):
        assert torch.allclose(got[i : i + 1, :, SIZE - one.shape[2] :], one, atol=1e-5)
    order = [2, 0, 1]
    turned = replace(rows_of(batch, order), spans=Intervals.of([lists[i] for i in order], torch.device("cpu")))
    assert torch.allclose(score.span_scores(turned, score(turned)), got[order], atol=1e-6)


def test_snapkv_by_loops() -> None:
    """Window of 5 over two spans: 2 and 3 queries. Pooled inside, the largest score for the window's own slots."""
    score = SnapKV(window=5, kernel=3)
    view = prompt(1, score)
    got, given = scored(score, view), loop_weights(view)
    for start, end, voters in ((1, 6, [4, 5]), (7, 14, [11, 12, 13])):
        for head in range(2):
            mean = {s: float(given[0, 2 * head : 2 * head + 2, voters, s].mean()) for s in range(start, voters[0])}
            pooled = {s: sum(mean.get(s + o, 0.0) for o in (-1, 0, 1)) / 3 for s in mean}
            for s in range(start, end):
                assert abs(float(got[0, head, s]) - pooled.get(s, max(pooled.values()))) < 1e-6


def test_tova_and_h2o_by_loops() -> None:
    given = loop_weights(prompt(1, TOVA()))
    tova, h2o = scored(TOVA(), prompt(1, TOVA())), scored(H2O(normalize="mean"), prompt(1, H2O()))
    for start, end in ((1, 6), (7, 14)):
        for s in range(start, end):
            assert torch.allclose(tova[0, :, s].double(), given[0, :, end - 1, s].mean(), atol=1e-6)
            mass = given[0, :, s:end, s].sum(-1).view(2, 2).mean(-1) / (end - s)
            assert torch.allclose(h2o[0, :, s].double(), mass, atol=1e-6)


def test_a_window_for_more_spans_than_queries() -> None:
    """Each span has one vote at least; a span that has not begun has none."""
    spans = Intervals.of([[(0, 3), (3, 5), (5, 9), (12, 14), (20, 30)]], torch.device("cpu"))
    view = replace(prompt(1, TOVA()), spans=spans)
    assert span_window(view, 2)[1].tolist() == [[2, 4, 8, 13, -1]]
    assert span_window(view, 9)[1].tolist() == [[2, 3, 4, 7, 8, 12, 13, -1, -1]]
    remember_in_spans(view, 2)
    queries, positions = span_window(view, 2)
    assert torch.equal(queries[:, :, :4], view.queries[:, :, positions[0, :4]])


def test_a_span_whose_queries_nobody_remembers_is_scored_as_ever() -> None:
    score = SnapKV(window=4)
    view = prompt(1, score)
    late = replace(view, queries=view.queries[:, :, -2:], query_positions=view.query_positions[:, -2:])
    assert torch.equal(score.span_scores(late, score(late)), score(late))


def test_scores_that_no_query_decides_stay_as_they_are() -> None:
    for score in (KNorm(), Streaming()):
        view = prompt(1, score)
        own = score(view)
        assert score.scores_within_spans and score.span_scores(view, own) is own


def test_votes_count_within_spans() -> None:
    """A slot stored twice receives together what one slot with twice the votes receives."""
    view = doubled(prompt(1, TOVA()), 3)
    once = doubled(prompt(1, TOVA()), 3, keep_votes=True)
    copies, single = scored(TOVA(), view), scored(TOVA(), once)
    assert torch.allclose(copies[..., 3], single[..., 3], atol=1e-6)  # matched by position: both copies together
