"""Merging reductions against loops in float64, padding, order, and the queries they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_views import Kinds, add_stats, combined, keep_every, make_view, output, padded, window_rows
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.core.stats import Stat
from keepkv.errors import CacheStateError
from keepkv.kernels.assign import nearest_key
from keepkv.methods import METHODS
from keepkv.observe.window import remember
from keepkv.reduce.base import Reduce, Reduced
from keepkv.reduce.cam import _DRAW, CaM
from keepkv.reduce.d2o import D2O
from keepkv.reduce.d2o import STATE as D2O_STATE
from keepkv.reduce.merge import KeepKV
from keepkv.score.content.random import Random
from keepkv.score.queries.ema import STAT
from keepkv.score.queries.h2o import H2O

torch.set_num_threads(1)
F64 = torch.float64
FEW = settings(max_examples=25, deadline=None)
ALL: list[Reduce] = [
    KeepKV("fixed"), KeepKV("bias"), KeepKV("zip", threshold=0.3), KeepKV("code", threshold=None),
    CaM(span=4, window=4), CaM(span=3, limit=4), D2O(), D2O(weights="code"),
]  # fmt: skip
seeds = st.integers(0, 10_000)


def run(reduce: Reduce, view: LayerView, keep: Tensor) -> Reduced:
    scores = Random()(replace(view, seed=99)) + 1.0
    return reduce(view, keep, scores, Kinds())


def routes(view: LayerView, keep: Tensor, h: int) -> dict[int, tuple[int, float]]:
    """Leaving slot of row 0, head h → (target, cosine), by loops."""
    found = {}
    k = view.slots.keys[0, h]
    may = [i for i in range(len(k)) if keep[0, h, i] and (view.protected is None or not view.protected[0, h, i])]
    for i in range(len(k)):
        if view.slots.valid[0, h, i] and not keep[0, h, i] and may:
            cosines = [float(k[i] @ k[j] / (k[i].norm() * k[j].norm())) for j in may]
            best = max(range(len(may)), key=lambda n: cosines[n])
            found[i] = (may[best], cosines[best])
    return found


def masses(
    view: LayerView, h: int, size: int, alpha: float, raw: bool
) -> tuple[list[float], Callable[[Tensor, int], float]]:
    """Mean mass per slot of row 0, head h, by loops, and the mean mass of any key that stands at a position."""
    s, g = view.slots, view.query_groups
    queries = window_rows(view, size, alpha)[0]

    def logit(q: Tensor, k: Tensor) -> float:
        x = float(q @ k) * view.scaling
        return view.softcap * math.tanh(x / view.softcap) if view.softcap else x

    def mean(key: Tensor, position: int, vote: float, raw: bool) -> float:
        total = weight = 0.0
        for eta, q, at in queries:
            if position > at:
                continue
            weight += eta
            for head in range(h * g, (h + 1) * g):
                visible = [i for i in range(s.shape[2]) if 0 <= s.positions[0, h, i] <= at]
                z = sum(math.exp(logit(q[head], s.keys[0, h, i]) + float(s.log_votes[0, h, i])) for i in visible)
                total += eta / g * math.exp(logit(q[head], key) + vote) / (1.0 if raw else z)
        return total / weight

    own = [
        mean(s.keys[0, h, i], int(s.positions[0, h, i]), float(s.log_votes[0, h, i]), raw) if s.valid[0, h, i] else 0.0
        for i in range(s.shape[2])
    ]
    return own, lambda key, position: mean(key, position, 0.0, raw)


@pytest.mark.parametrize("threshold", [None, 0.35])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("key", ["fixed", "bias", "zip", "code"])
def test_keepkv_equals_its_loop_reference(key: str, softcap: float | None, threshold: float | None) -> None:
    view = make_view(11, heads=2, groups=2, slots=18, queries=6, votes=True, softcap=softcap)
    view = replace(view, protected=(view.slots.positions < 2) | (view.slots.positions >= 15))
    add_stats(view)
    keep = keep_every(view, 3) | view.protected
    got = run(KeepKV(key, threshold=threshold, window=4, alpha=0.7), view, keep)
    s, cap = view.slots, softcap
    for h in range(2):
        own, mass_of = masses(view, h, 4, 0.7, raw=key == "zip")
        into = {i: j for i, (j, c) in routes(view, keep, h).items() if threshold is None or c > threshold}
        assert got.merged[0, h] == len(into) and got.dropped[0, h] == (~keep[0, h]).sum() - len(into)
        for column, c in enumerate(
            keep[0, h].nonzero().flatten().tolist(), start=got.slots.shape[2] - int(keep[0, h].sum())
        ):
            members = [c] + [i for i, j in into.items() if j == c]
            m = torch.tensor([own[i] for i in members], dtype=F64)
            w = m / m.sum()
            want_key, want_bias, want_value = s.keys[0, h, c], s.log_votes[0, h, c], s.values[0, h, c]
            if len(members) > 1:
                votes = s.log_votes[0, h, members].exp().sum().log()
                mean = w @ s.keys[0, h, members]
                want_value = w @ s.values[0, h, members]
                if key == "fixed":
                    want_bias = want_bias + (m.sum() / m[0]).log()
                elif key == "bias":
                    want_key, want_bias = mean, math.log(float(m.sum()) / mass_of(mean, int(s.positions[0, h, c])))
                elif key == "code":
                    want_key, want_bias = mean, votes
                else:
                    target, parts = m.sum().log() - votes, m.log() - s.log_votes[0, h, members]
                    if cap:
                        target, parts = torch.atanh(target / cap) * cap, torch.atanh(parts / cap) * cap
                    want_key, want_bias = target / (w @ parts) * mean, votes
            r = got.slots
            torch.testing.assert_close(r.keys[0, h, column], want_key, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(r.values[0, h, column], want_value, rtol=1e-10, atol=1e-12)
            assert abs(float(r.log_votes[0, h, column]) - float(want_bias)) <= 1e-11
            for kind, x in s.stats.items():
                assert abs(float(r.stats[kind][0, h, column] - combined(kind, x[0, h, members]))) <= 1e-12, kind


@pytest.mark.parametrize("limit", [None, 5])
def test_cam_equals_its_loop_reference(limit: int | None) -> None:
    view = make_view(12, heads=2, groups=2, slots=30, queries=6, layer=3)
    view = replace(view, seed=5, protected=view.slots.positions < 2)
    keep = keep_every(view, 3) | view.protected
    reduce = CaM(span=4, limit=limit, window=5)
    scores = (Random()(replace(view, seed=99)) * 16).floor()  # with ties
    got = reduce(view, keep, scores, Random())
    draw = Random()(replace(view, seed=5 ^ _DRAW))
    values, s = view.slots.values.clone(), view.slots
    merges = 0
    for h in range(2):
        own, _ = masses(view, h, 5, 1.0, raw=False)
        leaving = [i for i in range(30) if not keep[0, h, i]]
        chosen = sorted(leaving, key=lambda i: (-float(scores[0, h, i]), -i))[:limit]
        added, share = torch.zeros_like(values[0, h]), torch.zeros(30, dtype=F64)
        for i in chosen:
            targets = [j for j in range(i + 1, 30) if keep[0, h, j] and not view.protected[0, h, j]][:4]
            if targets and float(draw[0, h, i]) < min(1.0, own[i] / (sum(own[j] for j in targets) / len(targets))):
                merges += 1
                for j in targets:
                    added[j] += s.values[0, h, i] / len(targets)
                    share[j] += 1 / len(targets)
        values[0, h] += added / share.clamp(min=1)[:, None]
    want = s.with_(values=values).select(keep)
    assert merges > 3 and int(got.merged.sum()) == merges
    assert torch.equal(got.slots.keys, want.keys) and torch.equal(got.slots.log_votes, want.log_votes)
    torch.testing.assert_close(got.slots.values, want.values, rtol=0, atol=1e-13)


def test_cam_stays_bounded_where_a_whole_prompt_leaves_at_once() -> None:
    view = make_view(13, slots=600, queries=32, dtype=torch.float32)
    result = run(CaM(limit=None), view, keep_every(view, 60))
    assert result.merged.min() > 200
    assert result.slots.values.norm(dim=-1).max() <= 2 * view.slots.values.norm(dim=-1).max()


@pytest.mark.parametrize("weights", ["paper", "code"])
def test_d2o_equals_its_loop_reference_over_two_compressions(weights: str) -> None:
    state: dict[str, Tensor] = {}
    tau: dict[int, float] = {}
    for turn in range(2):
        view = make_view(14 + turn, heads=2, slots=24, state=state)
        view = replace(view, protected=view.slots.positions < 2)
        keep = keep_every(view, 3) | view.protected
        got = run(D2O(weights=weights), view, keep)
        s, keys, values = view.slots, view.slots.keys.clone(), view.slots.values.clone()
        for h in range(2):
            found = routes(view, keep, h)
            mean = sum(u for _, u in found.values()) / len(found)
            tau[h] = mean if turn == 0 else 0.5 * tau[h] + 0.5 * mean
            assert abs(float(state[D2O_STATE][0, h]) - tau[h]) <= 1e-12
            for c in {j for j, _ in found.values()}:
                arrive = [(i, u) for i, (j, u) in found.items() if j == c and u >= tau[h]]
                for old, new in ((s.keys, keys), (s.values, values)):
                    if arrive and weights == "paper":
                        total = sum(math.exp(u) for _, u in arrive) + math.e
                        new[0, h, c] = (
                            sum(math.exp(u) / total * old[0, h, i] for i, u in arrive) + math.e / total * old[0, h, c]
                        )
                    elif arrive:
                        new[0, h, c] = (sum(u * old[0, h, i] for i, u in arrive) + old[0, h, c]) / (len(arrive) + 1)
            assert got.merged[0, h] == sum(u >= tau[h] for _, u in found.values()) > 0
        want = s.with_(keys=keys, values=values).select(keep)
        torch.testing.assert_close(got.slots.keys, want.keys, rtol=0, atol=1e-13)
        torch.testing.assert_close(got.slots.values, want.values, rtol=0, atol=1e-13)
        assert torch.equal(got.slots.log_votes, want.log_votes)


def test_a_row_without_a_threshold_yet_compresses_as_for_the_first_time() -> None:
    """``row_starts`` says what stands for the threshold of a row that has none, where rows of caches are joined."""
    view = make_view(13, rows=2, heads=2, slots=24)
    keep = keep_every(view, 3)
    first = run(D2O(), view, keep)
    start = {name: torch.full((2, 2), x) for name, x in D2O.row_starts.items()}
    again = run(D2O(), replace(view, state=start), keep)
    assert torch.equal(first.slots.keys, again.slots.keys) and set(view.state) == set(D2O.row_starts) == set(start)


@given(seed=seeds, empties=st.integers(0, 9), pad=st.integers(0, 5), which=st.sampled_from(range(len(ALL))))
@FEW
def test_a_padded_row_gives_what_it_gives_alone(seed: int, empties: int, pad: int, which: int) -> None:
    view = make_view(seed, heads=2, groups=2, slots=20, queries=7, votes=True)
    add_stats(view)
    view = replace(view, protected=view.slots.positions < 2)
    wide = padded(view, empties, pad)
    alone, batched = (run(ALL[which], v, keep_every(v, 3) | v.protected) for v in (view, wide))
    assert torch.equal(alone.merged, batched.merged) and torch.equal(alone.dropped, batched.dropped)
    assert torch.equal(alone.lost, batched.lost[..., empties:]) and not batched.lost[..., :empties].any()
    assert torch.equal(alone.slots.positions, batched.slots.positions)
    for name in ("keys", "values", "log_votes"):
        torch.testing.assert_close(getattr(alone.slots, name), getattr(batched.slots, name), rtol=1e-10, atol=1e-11)
    for kind, x in alone.slots.stats.items():
        torch.testing.assert_close(x, batched.slots.stats[kind], rtol=1e-12, atol=1e-12)


@given(seed=seeds, which=st.sampled_from([0, 1, 2, 3, 6]))
@FEW
def test_the_order_of_slots_does_not_matter(seed: int, which: int) -> None:
    """One head with its slots in another order: each kept slot ends up the same."""
    view = make_view(seed, heads=1, groups=2, slots=20, queries=4, votes=True)
    view.query_positions.fill_(19)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    s, keep = view.slots, keep_every(view, 4)
    shuffled = replace(
        view, slots=Slots(s.keys[:, :, order], s.values[:, :, order], s.log_votes[..., order], s.positions[..., order])
    )
    one, other = run(ALL[which], view, keep).slots, run(ALL[which], shuffled, keep[..., order]).slots
    back = other.positions[0, 0].argsort()
    assert torch.equal(one.positions, other.positions[..., back])
    for name in ("keys", "values", "log_votes"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name)[:, :, back], rtol=1e-8, atol=1e-10)


@given(seed=seeds, key=st.sampled_from(["fixed", "bias"]))
@FEW
def test_merging_twice_keeps_the_mass_of_all(seed: int, key: str) -> None:
    """Biases are honoured when a compressed cache is compressed again: still exact at the query of both merges."""
    view = make_view(seed, heads=2, slots=36)
    once = run(KeepKV(key, window=1, threshold=None), view, keep_every(view, 2)).slots
    again = replace(view, slots=once)
    twice = run(KeepKV(key, window=1, threshold=None), again, keep_every(again, 6)).slots
    assert twice.shape[2] < once.shape[2] < 36
    torch.testing.assert_close(output(view, twice), output(view, view.slots), rtol=0, atol=1e-11)


@pytest.mark.parametrize("which", range(len(ALL)))
def test_inputs_are_left_alone_and_results_repeat(which: int) -> None:
    view = make_view(15, rows=2, groups=2, slots=40, queries=8, votes=True, dtype=torch.float32)
    before = [
        x.clone()
        for x in (view.slots.keys, view.slots.values, view.slots.log_votes, view.slots.positions, view.queries)
    ]
    first = run(ALL[which], view, keep_every(view, 4))
    view.state.clear()
    second = run(ALL[which], view, keep_every(view, 4))
    after = [view.slots.keys, view.slots.values, view.slots.log_votes, view.slots.positions, view.queries]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    for name in ("keys", "values", "log_votes", "positions"):
        assert torch.equal(getattr(first.slots, name), getattr(second.slots, name))
    assert first.slots.keys.dtype == torch.float32 and first.slots.log_votes.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["fixed", "bias", "zip", "code"])
def test_low_precision_caches(key: str, dtype: torch.dtype) -> None:
    """The bias comes from the rounded key, so rounding moves no mass: one moved key costs no more than its values."""
    view = make_view(16, heads=4, slots=40, dtype=dtype)
    view.slots.log_votes = view.slots.log_votes.float()
    slots = run(KeepKV(key, threshold=None, window=1), view, keep_every(view, 4)).slots
    assert slots.keys.dtype == slots.values.dtype == dtype and slots.log_votes.dtype == torch.float32
    assert all(x.isfinite().all() for x in (slots.keys, slots.values, slots.log_votes))
    if key in ("fixed", "bias"):
        exact = slots.with_(keys=slots.keys.double())
        merged = run(KeepKV(key, threshold=None, window=1), replace(view, slots=view.slots.with_(
            keys=view.slots.keys.double(), values=view.slots.values.double()), queries=view.queries.double()),
            keep_every(view, 4)).slots  # fmt: skip
        wide = replace(view, queries=view.queries.double())
        assert (output(wide, exact) - output(wide, merged)).abs().max() <= 2 * torch.finfo(dtype).eps


def test_only_cosines_above_the_threshold_merge() -> None:
    view = make_view(22, heads=1, slots=30)
    keep = keep_every(view, 3)
    cosines = nearest_key(view.slots.keys, ~keep, keep)[1]
    for threshold in cosines[~keep].tolist():
        assert torch.equal(run(KeepKV(threshold=threshold), view, keep).lost, ~keep & (cosines <= threshold))


def test_routing_in_tiles_equals_routing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(18, rows=2, heads=3, slots=50)
    keep = keep_every(view, 4)
    whole = nearest_key(view.slots.keys, ~keep, keep)
    monkeypatch.setattr("keepkv.kernels.assign.reference._TILE", 200)
    monkeypatch.setattr("keepkv.kernels.groups._TILE", 500)
    monkeypatch.setattr("keepkv.observe.masses._TILE", 2000)
    tiled = nearest_key(view.slots.keys, ~keep, keep)
    assert torch.equal(whole[0], tiled[0])
    torch.testing.assert_close(whole[1], tiled[1], rtol=0, atol=1e-14)
    small = run(KeepKV("bias"), view, keep).slots
    monkeypatch.undo()
    torch.testing.assert_close(small.log_votes, run(KeepKV("bias"), view, keep).slots.log_votes, rtol=0, atol=1e-12)


def test_queries_come_from_the_window_or_the_latest_forward_or_are_missed() -> None:
    view = make_view(19, slots=30, queries=8)
    keep = keep_every(view, 3)
    want = run(KeepKV(threshold=None), view, keep).slots
    remember(view, 8, "merge_window")
    blind = replace(view, queries=view.queries[:, :, :0], query_positions=view.query_positions[:, :0])
    assert torch.equal(run(KeepKV(threshold=None), blind, keep).slots.log_votes, want.log_votes)
    blind = replace(blind, state={})
    for reduce in (KeepKV(threshold=None), CaM()):
        with pytest.raises(CacheStateError, match="queries"):
            run(reduce, blind, keep)
    assert run(KeepKV(threshold=None), blind, view.slots.valid).merged.sum() == 0  # nothing leaves: nothing is needed
    with pytest.raises(CacheStateError, match="row"):
        run(
            KeepKV(threshold=None),
            replace(view, query_positions=torch.full_like(view.query_positions, -1), state={}),
            keep,
        )


@pytest.mark.parametrize("key", ["fixed", "bias", "zip", "code"])
def test_methods_are_built_from_names_or_pieces(key: str) -> None:
    method = METHODS.build("keepkv", key=key, score=H2O(), window=8)
    assert method.reduce.merges and method.name == "keepkv" and method.window == 8
    assert method.score.stats == {"mass": Stat(0.0, "sum")} and method.score.observes and not method.score.needs_rope
    view = make_view(20, slots=30, queries=6)
    view.slots.stats["mass"] = torch.zeros(1, 2, 30, dtype=F64)
    method.score.observe(view)
    assert view.state["merge_window"].shape[2] == 8 and view.slots.stats["mass"].sum() > 0
    scores = method.score(view)
    result = method.reduce(replace(view, queries=view.queries[:, :, :0]), keep_every(view, 3), scores, method.score)
    assert (result.merged + result.dropped == 20).all()
    for name in ("cam", "d2o"):
        assert METHODS.build(name, score="random").reduce.merges
    assert METHODS.build("keepkv", score="ema").score.stats == {STAT: Stat(-math.inf, "logsumexp")}


def test_a_score_that_remembers_less_does_not_shorten_the_window() -> None:
    view = make_view(21, slots=30, queries=10)
    want = run(KeepKV(window=8), view, keep_every(view, 3)).slots.log_votes
    for score in ("tova", "snapkv", "ema", "knorm"):
        method = METHODS.build("keepkv", score=score, window=8)
        stats = {name: view.slots.log_votes.clone() for name in method.score.stats}
        seen = replace(view, state={}, slots=view.slots.with_(stats=stats))
        method.score.observe(seen)
        blind = replace(view, state=seen.state, queries=view.queries[:, :, :0], query_positions=torch.empty(1, 0))
        got = run(method.reduce, blind, keep_every(view, 3)).slots.log_votes
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
