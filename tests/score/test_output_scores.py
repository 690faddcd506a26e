"""Scores that look at what a slot adds to the output, against loops in float64: DropKV, ReST-KV, CriticalKV, CapKV."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from score_views import loop_weights, row, together
from torch import Tensor

from keepkv.allocate import AdaKV
from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView
from keepkv.errors import KeepKVError
from keepkv.methods.apply import compress
from keepkv.methods.base import Method
from keepkv.observe.outputs import projected_lengths, squared_distances
from keepkv.score import Cap, Critical, CurDKV, DropKV, FunctionScore, KNorm, ReSTKV, Score, SnapKV
from keepkv.score.queries.critical import CHOSEN

F64 = torch.float64
ROPE = Rope(torch.tensor([1.0, 0.3, 0.05]))
WEIGHT = torch.randn(4, 10, 7, generator=torch.Generator().manual_seed(0), dtype=F64)


def views(**options: object) -> LayerView:
    """Two rows, one of them padded, G = 2, votes."""
    return replace(together([row(3, **options), row(4, slots=11, queries=5)]), output=WEIGHT.float(), rope=ROPE)


def scored(score: Score, view: LayerView) -> Tensor:
    view = replace(view, state={})
    score.observe(view)
    return score(view)


def live(view: LayerView, b: int) -> list[int]:
    return [s for s in range(view.slots.shape[2]) if view.slots.positions[b, 0, s] >= 0]


def late(view: LayerView, b: int, size: int) -> list[int]:
    return [t for t in range(view.queries.shape[2]) if view.query_positions[b, t] >= 0][-size:]


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
def test_dropkv(project: bool, options: dict[str, object]) -> None:
    """The output is computed again without each slot: its softmax over the others, attention sinks included."""
    view = views(**options)
    got, a = scored(DropKV(4, project), view), loop_weights(view)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        for s in live(view, b):
            total = 0.0
            for head, t in ((g, t) for g in (2 * h, 2 * h + 1) for t in late(view, b, 4)):
                values = view.slots.values[b, h]
                full = a[b, head, t] @ values
                rest = a[b, head, t].clone()
                rest[s] = 0.0
                without = rest / (1 - a[b, head, t, s]) @ values
                move = full - without
                total += float(((move @ WEIGHT[head] if project else move) ** 2).sum()) / 2
            assert math.isclose(got[b, h, s], total, rel_tol=2e-4, abs_tol=1e-9)


@pytest.mark.parametrize("project", [False, True])
def test_dropkv_of_a_slot_that_has_nearly_all_the_attention(project: bool) -> None:
    """In float32 the output is then the slot's value to the last bit, and the move must not be a rounding error."""
    exact = replace(row(5, slots=8, queries=3, scale=25.0, dtype=F64), output=WEIGHT)
    a = loop_weights(exact)
    assert a.amax() > 1 - 1e-7
    rough = replace(
        exact, queries=exact.queries.float(), output=WEIGHT.float(), slots=exact.slots.map(lambda x: x.float())
    )
    rough.slots.positions = exact.slots.positions
    got, wanted = (scored(DropKV(3, project), view).double() for view in (rough, exact))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    alone = row(6, slots=1, queries=1)
    assert math.isclose(
        scored(DropKV(1), alone)[0, 0, 0], float(alone.slots.values[0, 0, 0].square().sum()), rel_tol=1e-5
    )


def test_restkv() -> None:
    view = views()
    got, a = scored(ReSTKV(4, 3, 0.3), view), loop_weights(view)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        asked, slots = late(view, b, 4), live(view, b)
        early = [s for s in slots if view.slots.positions[b, h, s] < view.query_positions[b, asked[0]]]
        total = dict.fromkeys(slots, 0.0)
        for head in (2 * h, 2 * h + 1):
            mean = a[b, head, asked[0]].clone()
            for t in asked[1:]:
                mean = 0.3 * a[b, head, t] + 0.7 * mean
            centre = sum((mean[s] * view.slots.values[b, h, s] for s in early), torch.zeros(10, dtype=F64))
            effect = {
                s: float(mean[s] / (1 - mean[s]) * ((view.slots.values[b, h, s] - centre) @ WEIGHT[head]).norm())
                for s in slots
            }
            for n, s in enumerate(early):
                near = [effect[early[m]] if 0 <= m < len(early) else 0.0 for m in (n - 1, n, n + 1)]
                total[s] += sum(near) / 3 / 2
            for s in set(slots) - set(early):
                total[s] += effect[s] / 2
        torch.testing.assert_close(got[b, h, slots].double(), torch.tensor([total[s] for s in slots], dtype=F64),
                                   rtol=1e-4, atol=1e-6)  # fmt: skip


def test_lengths_and_distances_behind_the_projection() -> None:
    view = views()
    got = projected_lengths(view)
    for b, h, s in ((b, h, s) for b in range(2) for h in range(2) for s in range(14)):
        value = view.slots.values[b, h, s].double()
        wanted = sum(float((value @ WEIGHT[head]).abs().sum()) for head in (2 * h, 2 * h + 1)) / 2
        assert math.isclose(got[b, h, s], wanted, rel_tol=1e-5)
    points = torch.randn(2, 2, 2, 3, 10, dtype=F64)
    metric = torch.stack([w @ w.T for w in WEIGHT]).view(2, 2, 10, 10)
    values = view.slots.values.double()
    away = squared_distances(values, points, metric)
    for h, g, t, s in ((h, g, t, s) for h in range(2) for g in range(2) for t in range(3) for s in range(14)):
        wanted = float((((values[1, h, s] - points[1, h, g, t]) @ WEIGHT[2 * h + g]) ** 2).sum())
        assert math.isclose(away[1, h, g, t, s], wanted, rel_tol=1e-9)


def test_lengths_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    view = views()
    wanted = projected_lengths(view)
    monkeypatch.setattr("keepkv.observe.attention.TILE", 1)
    assert torch.allclose(projected_lengths(view), wanted, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), budget=st.integers(2, 11), first=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_criticalkv_is_two_stages(seed: int, budget: int, first: float) -> None:
    """With protected slots, as a loop over two sorts."""
    inner, view = SnapKV(4, 1), replace(row(seed), output=WEIGHT.float(), budget=torch.tensor([budget]))
    protected = torch.zeros(1, 2, 14, dtype=torch.bool)
    protected[..., -2:] = True
    view = replace(view, protected=protected)
    got, own, norms = scored(Critical(inner, first), view), scored(inner, view), projected_lengths(view)
    for h in range(2):
        order = sorted(range(14), key=lambda s: (-int(protected[0, h, s]), -float(own[0, h, s]), s))
        stage = set(order[: max(1, int(first * budget)) if first else 0])
        for s in range(14):
            wanted = CHOSEN if s in stage else (float(own[0, h, s]) + 1e-4) * float(norms[0, h, s])
            assert math.isclose(got[0, h, s], wanted, rel_tol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), budget=st.integers(3, 11))
def test_critical_adakv_keeps_as_many_as_adakv(seed: int, budget: int) -> None:
    """The other score alone says how many slots each head keeps; in the two stages of a head these are chosen."""
    view, wanted = replace(row(seed), output=WEIGHT.float()), torch.tensor([budget])
    inner = SnapKV(4, 1)
    plain = compress(Method(inner, AdaKV(0.2), sinks=0), [replace(view, state={})], [wanted])[0]
    both = compress(Method(Critical(inner, adaptive=0.2), AdaKV(0.2), sinks=0), [replace(view, state={})], [wanted])[0]
    assert torch.equal(plain.slots.lengths, both.slots.lengths)
    for h in range(2):
        count = int(plain.slots.lengths[0, h])
        own = scored(Critical(inner), replace(view, budget=torch.tensor([count])))[0, h]
        sure = set(scored(inner, view)[0, h].topk(int(0.2 * budget)).indices.tolist())  # of the safeguard
        best = own.topk(count).indices.tolist()
        kept = set(both.slots.positions[0, h][both.slots.positions[0, h] >= 0].tolist())
        assert sure <= kept and (sure > set(best) or (kept >= sure and len(kept & set(best)) >= count - len(sure)))


def test_cap() -> None:
    view = replace(views(), scaling=1.0)
    score = Cap(tau=2.0, horizon=8, n_sink=2)
    view = replace(view, state={})
    # All queries of the row are at hand in this view: as many as slots.
    view = replace(together([row(3, queries=14), row(4, slots=11, queries=11)]), rope=ROPE)
    got = scored(score, view)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        counted = [s for s in live(view, b) if view.slots.positions[b, h, s] >= 2]
        seen, total = int(view.seen[b]), dict.fromkeys(counted, 0.0)
        for head in (2 * h, 2 * h + 1):
            asked = [t for t in range(14) if view.query_positions[b, t] >= 2]
            before = [
                ROPE.unrotate(view.queries[b, head, t].double()[None], view.query_positions[b, t][None])[0]
                for t in asked
            ]
            mean = torch.stack(before).mean(0)
            turned = torch.stack([ROPE.rotate(mean[None], torch.tensor([seen + n]))[0] for n in range(8)]).mean(0)
            along = {
                s: 2.0 * float(torch.nn.functional.cosine_similarity(turned, view.slots.keys[b, h, s].double(), dim=0))
                for s in counted
            }
            weight = {s: math.exp(x - max(along.values())) for s, x in along.items()}
            capacity = torch.eye(10, dtype=F64)
            for s in counted:
                v, votes = view.slots.values[b, h, s].double(), math.exp(float(view.slots.log_votes[b, h, s]))
                capacity += votes * (weight[s] + 1e-6) * torch.outer(v, v)
            for s in counted:
                v = view.slots.values[b, h, s].double()
                total[s] += weight[s] * float(v @ torch.linalg.solve(capacity, v)) / 2
        wanted = torch.tensor([total[s] for s in counted], dtype=F64)
        torch.testing.assert_close(got[b, h, counted].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "score", [DropKV(4), DropKV(4, True), ReSTKV(4), Critical(SnapKV(4)), Critical(CurDKV()), Cap(horizon=8)]
)
def test_a_row_scores_as_it_does_alone(score: Score) -> None:
    alone = [row(n, slots=size, queries=min(size, 6)) for n, size in ((1, 14), (2, 9), (3, 4))]
    budget, whole = torch.tensor([5, 4, 3]), together(alone)
    got = scored(score, replace(whole, output=WEIGHT.float(), rope=ROPE, budget=budget))
    assert got[whole.slots.valid].isfinite().all()
    for b, view in enumerate(alone):
        mine = scored(score, replace(view, output=WEIGHT.float(), rope=ROPE, budget=budget[b : b + 1]))
        torch.testing.assert_close(got[b : b + 1, :, 14 - view.slots.shape[2] :], mine, rtol=1e-4, atol=1e-6)


def test_critical_refuses_scores_below_zero() -> None:
    with pytest.raises(KeepKVError, match="'knorm' gives some below 0"):
        Critical(KNorm())
    undeclared = FunctionScore(lambda view: -torch.ones(view.slots.shape))
    with pytest.raises(KeepKVError, match="gave some below 0, though it is not declared as signed"):
        scored(Critical(undeclared), replace(views(), budget=torch.tensor([5, 5])))


def test_what_critical_needs_and_passes_on() -> None:
    assert Critical(CurDKV()).needs_output and not Critical(CurDKV()).observes
    assert Critical(SnapKV(4)).observes and Critical(SnapKV(4)).remembers == SnapKV(4).remembers
    assert DropKV(4, True).needs_output and not DropKV(4).needs_output
