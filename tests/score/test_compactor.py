"""Compactor's score against loops in float64, over any forwards, and what it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from running import batch, generate
from score_views import F64, part_of_queries, row, rows_of, together
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView
from keepkv.errors import KeepKVError
from keepkv.observe.sketched_leverage import gaussian, sketched_leverage
from keepkv.score.content.compactor import NEVER, STAT, Compactor

torch.set_num_threads(1)
ROPE = Rope(torch.tensor([1.0, 0.3, 0.05]))
SMALL = Compactor(blending=0.7, chunk=5, sketch=3, sinks=2, window=3)


def view_of(seed: int, tokens: int = 21, rope: Rope | None = ROPE) -> LayerView:
    """A prompt of which every token is still a query."""
    return fresh(replace(row(seed, slots=tokens, queries=tokens), rope=rope))


def fresh(view: LayerView) -> LayerView:
    stats = {STAT: torch.full(view.slots.shape, NEVER)}
    return replace(view, slots=view.slots.with_(stats=stats), state={}, memo={})


def scored(score: Compactor, view: LayerView) -> Tensor:
    view = fresh(view)
    score.observe(view)
    return score(view)


def naive(score: Compactor, view: LayerView, b: int = 0) -> dict[tuple[int, int], float]:
    """Scores of one row by head and position, by loops over the published definition."""
    s, g, seen = view.slots, view.query_groups, int(view.seen[b])
    last = seen - score.window
    phi = gaussian(view, score.sketch).double() if score.sketch else None
    leverages, received = {}, {}
    for h in range(s.shape[1]):
        at = {int(p): i for i, p in enumerate(s.positions[b, h].tolist()) if score.sinks <= p < last}
        key = {p: s.keys[b, h, i].double() for p, i in at.items()}
        value = {p: float(s.values[b, h, i].double().norm()) for p, i in at.items()}
        votes = {p: math.exp(float(s.log_votes[b, h, i])) for p, i in at.items()}
        content = {p: k if view.rope is None else view.rope.unrotate(k, torch.tensor(p)) for p, k in key.items()}
        mean = sum(votes[p] * k for p, k in content.items()) / sum(votes.values())
        x = {p: (k - mean) if phi is None else (k - mean) @ phi[h] for p, k in content.items()}
        gram = sum(votes[p] * torch.outer(v, v) for p, v in x.items())
        inverse = torch.linalg.inv(gram + score.ridge * torch.eye(len(gram), dtype=F64))
        total = dict.fromkeys(key, 0.0)
        for t, p in enumerate(view.query_positions[b].tolist()):
            block = [j for j in key if (j - score.sinks) // score.chunk == (p - score.sinks) // score.chunk]
            for q in view.queries[b, h * g : (h + 1) * g, t].double():
                if score.sinks <= p < last:
                    scale = view.scaling if score.scaled else 1.0
                    u = torch.tensor([float(q @ key[j]) * scale + math.log(votes[j]) for j in block], dtype=F64)
                    for j, share in zip(block, u.softmax(0).tolist(), strict=True):
                        total[j] += share / g
        weighted = {p: total[p] * value[p] for p in total}
        for p in sorted(key):
            leverages[h, p] = float(x[p] @ inverse @ x[p])
            received[h, p] = sum(weighted.get(p + d, 0.0) for d in (-1, 0, 1)) / 3

    def z(of: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
        values = torch.tensor(list(of.values()), dtype=F64)
        return dict(zip(of, ((values - values.mean()) / values.std()).tolist(), strict=True))

    first, second = z(leverages), z(received)
    assert score.blending is not None
    return {at: score.blending * first[at] + second[at] for at in first}


@pytest.mark.parametrize("rope", [ROPE, None])
@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"sketch": 0}, {"chunk": 16, "sketch": 12}, {"sinks": 0}])
def test_the_score_equals_a_loop(options: dict[str, Any], rope: Rope | None) -> None:
    """Rows of blocks that are full and not, one that is a single block, and one that is shorter than what is pinned."""
    score = replace(SMALL, **options)
    view = together([view_of(n, tokens, rope) for n, tokens in enumerate((21, 20, 9))])
    got, s = scored(score, view), view.slots
    for b in range(3):
        want = naive(score, view, b)
        for h in range(2):
            for i, p in enumerate(s.positions[b, h].tolist()):
                expected = want.get((h, p), max(want.values()))
                assert p < 0 or math.isclose(got[b, h, i], expected, rel_tol=1e-4, abs_tol=1e-4)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 30), cuts=st.sets(st.integers(1, 29), max_size=4))
def test_where_forwards_end_makes_no_difference(tokens: int, cuts: set[int]) -> None:
    view = view_of(tokens, tokens)
    want = scored(SMALL, view)
    state: dict[str, Tensor] = {}
    held = torch.full(view.slots.shape, NEVER)
    for start, stop in pairwise([0, *sorted(c for c in cuts if c < tokens), tokens]):
        piece = replace(part_of_queries(view, start, stop), state=state)
        piece.slots.stats[STAT] = held[..., :stop]
        SMALL.observe(piece)
    assert_close(SMALL(piece), want, rtol=1e-5, atol=1e-5)
    gone = replace(piece, queries=piece.queries[:, :, :0], query_positions=piece.query_positions[:, :0])
    assert torch.equal(SMALL(gone), SMALL(piece))
    assert state["window"].shape[2] == SMALL.chunk + SMALL.window  # all that is remembered


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(1, 21), min_size=2, max_size=4))
def test_a_row_scores_as_it_does_alone(seed: int, sizes: list[int]) -> None:
    views = [view_of(seed + n, size) for n, size in enumerate(sizes)]
    view = together(views)
    got = scored(SMALL, view)
    for b, alone in enumerate(views):
        size = alone.slots.shape[2]
        assert_close(got[b : b + 1, :, got.shape[2] - size :], scored(SMALL, alone), rtol=1e-5, atol=1e-5)
    order = list(reversed(range(len(views))))
    assert_close(scored(SMALL, rows_of(view, order)), got[order], rtol=1e-5, atol=1e-5)


def test_blocks_that_a_compression_came_across() -> None:
    """What a part of a block gave counts until the whole of it is there, and in the next turn, where its queries are
    gone; what has no query at all is average in its attention."""
    view = view_of(5, 20)  # behind 2 sinks and before 3 of the window: 5 + 5 + 5
    first = part_of_queries(view, 0, 14)
    SMALL.observe(first)
    SMALL(first)
    banked = first.memo[STAT]
    assert (banked[..., 2:11] >= 0).all() and (banked[..., :2] == NEVER).all() and (banked[..., 11:] == NEVER).all()
    for name, state in (("goes on", first.state), ("another turn", {})):
        second = replace(part_of_queries(view, 14), state=state)
        second.slots.stats[STAT] = torch.cat((banked, torch.full((1, 2, 6), NEVER)), dim=-1)
        SMALL.observe(second)
        SMALL(second)
        whole = fresh(view)
        SMALL.observe(whole)
        SMALL(whole)
        got, want = second.memo[STAT], whole.memo[STAT]
        if name == "goes on":
            assert_close(got, want, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got[..., 2:11], banked[..., 2:11])  # its queries are gone
            assert (got[..., 11] == NEVER).all() and (got[..., 14:17] >= 0).all()
    unknown = fresh(view)
    unknown.queries, unknown.query_positions = view.queries[:, :, :0], view.query_positions[:, :0]
    inside = SMALL.inside(unknown)
    only = sketched_leverage(unknown, inside, SMALL.sketch, SMALL.ridge)[inside]
    want = 0.7 * (only - only.mean()) / only.std()
    assert_close(SMALL(unknown)[inside].double(), want, rtol=1e-5, atol=1e-6)


def test_votes_are_duplicates_in_leverage_and_targets() -> None:
    view = view_of(7)
    votes = torch.zeros_like(view.slots.log_votes)
    votes[..., 6] = math.log(3.0)
    one = replace(view, slots=view.slots.with_(log_votes=votes))
    plain = view.slots.with_(log_votes=torch.zeros_like(votes))
    extra = plain.map(lambda x: x[:, :, 6:7])
    three = replace(view, slots=plain.join(extra).join(extra))
    leverages, masses = [], []
    for v in (one, three):
        v = fresh(v)
        leverages.append(sketched_leverage(v, SMALL.inside(v), 3, 0.01))
        SMALL.observe(v)
        SMALL(v)
        masses.append(v.memo[STAT])
    assert_close(leverages[0], leverages[1][..., :21], rtol=1e-4, atol=1e-6)
    masses[1][..., 6] += masses[1][..., 21:].sum(-1)
    assert_close(masses[0], masses[1][..., :21], rtol=1e-4, atol=1e-6)


def test_the_sketch_follows_from_seed_layer_and_head() -> None:
    view = view_of(8)
    phi = gaussian(view, 4000)
    assert phi.shape == (2, 8, 4000) and torch.equal(phi, gaussian(view, 4000))
    assert not torch.equal(phi[0], phi[1])
    assert_close(phi @ phi.mT, torch.eye(8).expand(2, 8, 8), rtol=0, atol=0.1)  # inner products survive
    for other in (replace(view, seed=1), replace(view, layer=1)):
        assert not torch.equal(gaussian(other, 4000), phi)


def test_a_blending_that_is_not_given_is_the_share_that_leaves() -> None:
    view = together([view_of(9), view_of(10, 12)])
    free = replace(SMALL, blending=None)
    assert_close(scored(free, view), scored(replace(SMALL, blending=0.35), view))
    got = scored(free, replace(view, budget=torch.tensor([7, 3])))
    assert_close(got[0], scored(replace(SMALL, blending=2 / 3), view)[0])
    assert_close(got[1], scored(replace(SMALL, blending=3 / 4), view)[1])


@pytest.mark.parametrize("keys", [torch.zeros(1, 2, 21, 8), torch.ones(1, 2, 21, 8), 1e15 * torch.randn(1, 2, 21, 8)])
def test_keys_that_say_nothing_are_finite(keys: Tensor) -> None:
    view = view_of(11)
    for dtype in (torch.float32, torch.bfloat16):
        slots = view.slots.with_(keys=keys.to(dtype), values=view.slots.values.to(dtype))
        got = scored(SMALL, replace(view, slots=slots))
        assert got.dtype == torch.float32 and torch.isfinite(got).all()


@pytest.mark.parametrize(
    "wrong", [{"blending": -0.1}, {"blending": math.inf}, {"chunk": 0}, {"sketch": -1}, {"ridge": 0.0}, {"sinks": -1},
              {"window": -1}],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        Compactor(**wrong)


def test_the_budget_reaches_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    blending = Compactor._blending

    def watch(self: Compactor, view: LayerView) -> Tensor:
        seen.append(blending(self, view))
        return seen[-1]

    monkeypatch.setattr(Compactor, "_blending", watch)
    cache = keepkv.Cache(zoo.model("llama"), "compactor", 0.25, sinks=2, window=4)
    generate(zoo.model("llama"), batch((40, 60)), cache, new=1)
    assert cache.report().compressed
    assert_close(seen[0], torch.tensor([0.75, 0.75]))
