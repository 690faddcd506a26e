"""Attention Matching, GRKV and residual slots against loops in float64, and what they promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_views import Kinds, add_stats, combined, keep_every, make_view, padded
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.errors import CacheStateError, KeepKVError
from keepkv.methods import METHODS
from keepkv.observe import attention
from keepkv.observe.masses import log_masses, log_masses_of, recent
from keepkv.reduce.base import Reduce, Reduced
from keepkv.reduce.drop import Drop
from keepkv.reduce.grkv import GRKV
from keepkv.reduce.matching import Matching
from keepkv.reduce.residual import Residual
from keepkv.score.content.random import Random
from keepkv.score.queries import matching as score

torch.set_num_threads(1)
F64 = torch.float64
FEW = settings(max_examples=25, deadline=None)
ALL: list[Reduce] = [
    Matching(), Matching(prior="zero", iterations=20), GRKV(), Residual(0.3), Residual(0.3, bias="mass", window=4),
]  # fmt: skip
MODELS = [{}, {"softcap": 3.0}, {"sink_logits": torch.tensor([0.5, -1.0, 0.0, 1.0], dtype=F64)}]


def scores_of(view: LayerView) -> Tensor:
    return Random()(replace(view, seed=99)) + 1.0


def run(reduce: Reduce, view: LayerView, keep: Tensor) -> Reduced:
    return reduce(view, keep, scores_of(view), Kinds())


def typical(seed: int = 0, **options: object) -> tuple[LayerView, Tensor]:
    """Two KV heads with two query heads each, votes, two protected slots; a third of the slots is kept, by head."""
    view = make_view(seed, **{"heads": 2, "groups": 2, "slots": 30, "queries": 12, "votes": True, **options})
    view = replace(view, protected=view.slots.positions < 2)
    return view, keep_every(view, 3) | view.protected


def attend(view: LayerView, h: int, slots: Slots, columns: list[int]) -> tuple[Tensor, Tensor]:
    """Attention of all queries and query heads on some slots of row 0, head h, by loops: (N,columns), and ln Z (N,)."""
    rows, totals = [], []
    for head in range(h * view.query_groups, (h + 1) * view.query_groups):
        for t, at in enumerate(view.query_positions[0].tolist()):
            u = []
            for i in columns:
                x = float(view.queries[0, head, t] @ slots.keys[0, h, i]) * view.scaling
                x = view.softcap * math.tanh(x / view.softcap) if view.softcap else x
                seen = 0 <= int(slots.positions[0, h, i]) <= at
                u.append(x + float(slots.log_votes[0, h, i]) if seen else -math.inf)
            z = sum(math.exp(x) for x in u) + (
                math.exp(float(view.sink_logits[head])) if view.sink_logits is not None else 0.0
            )
            rows.append([math.exp(x) / z if z else 0.0 for x in u])
            totals.append(math.log(z) if z else 0.0)
    return torch.tensor(rows, dtype=F64), torch.tensor(totals, dtype=F64)


def outputs(view: LayerView, slots: Slots) -> Tensor:
    """(B,H,G,T,Dv) of the view's queries at their own positions."""
    return attention.weights(replace(view, slots=slots), view.queries, view.query_positions) @ slots.values[:, :, None]


def columns_of(slots: Slots, h: int) -> list[int]:
    return slots.valid[0, h].nonzero().flatten().tolist()


@pytest.mark.parametrize("pool", ["rms", "max"])
def test_the_score_equals_a_loop(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view, _ = typical(1)
    got = score.Matching(queries=12, pool=pool)(view)
    for h in range(2):
        a, _ = attend(view, h, view.slots, list(range(30)))
        seeing = torch.tensor([[i <= t for i in range(30)] for t in range(18, 30)] * 2)
        for i in range(30):
            seen = a[seeing[:, i], i]
            want = seen.square().mean().sqrt() if pool == "rms" else seen.max()
            assert abs(float(got[0, h, i]) - float(want)) <= 1e-12
    monkeypatch.setattr("keepkv.observe.attention.TILE", 100)
    torch.testing.assert_close(score.Matching(queries=12, pool=pool)(view), got, rtol=0, atol=1e-14)
    wide = score.Matching(queries=12, pool=pool)(padded(view, 5, 4))
    torch.testing.assert_close(wide[..., 5:], got, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prior", ["kept", "zero"])
@pytest.mark.parametrize("model", MODELS)
def test_matching_equals_a_loop(model: dict[str, object], prior: str) -> None:
    view, keep = typical(4, **model)
    reduce = Matching(iterations=20_000, bound=1.0, ridge=0.05, prior=prior)
    got, kept = run(reduce, view, keep), run(Drop(), view, keep)
    assert torch.equal(got.slots.keys, kept.slots.keys) and torch.equal(got.slots.positions, kept.slots.positions)
    assert torch.equal(got.lost, kept.lost) and torch.equal(got.dropped, kept.dropped)
    for h in range(2):
        columns = columns_of(kept.slots, h)
        free = kept.slots.positions[0, h, columns] >= 2
        beta = (got.slots.log_votes - kept.slots.log_votes)[0, h, columns]
        w = beta.exp()
        full, z = attend(view, h, view.slots, list(range(30)))
        share, z_kept = attend(view, h, kept.slots, columns)
        a = share * (z_kept - z).exp()[:, None]  # e^u / Z over all
        mass = full.sum(1)  # 1, but for sinks of the model
        gradient = a.T @ (a @ w - mass)
        low, high = free & (beta <= -1 + 1e-6), free & (beta >= 1 - 1e-6)
        assert (w[~free] == 1).all() and (beta[free].abs() <= 1 + 1e-9).all()
        assert (gradient[free & ~low & ~high].abs() <= 1e-5).all()
        assert (gradient[low] >= -1e-5).all() and (gradient[high] <= 1e-5).all()
        hat, _ = attend(view, h, got.slots, columns)
        values, old = got.slots.values[0, h, columns], kept.slots.values[0, h, columns]
        assert torch.equal(values[~free], old[~free])
        some = hat[:, free]
        start = old[free] if prior == "kept" else torch.zeros_like(old[free])
        missing = full @ view.slots.values[0, h] - hat[:, ~free] @ old[~free] - some @ start
        penalty = 0.05 * some.square().sum(1).mean()
        normal = some.T @ some + penalty * torch.eye(some.shape[1], dtype=F64)
        torch.testing.assert_close(values[free], start + normal.inverse() @ some.T @ missing, rtol=0, atol=1e-9)


@given(seed=st.integers(0, 10_000))
@FEW
def test_matching_restores_mass_and_output_of_its_queries(seed: int) -> None:
    view = make_view(seed, heads=2, groups=2, slots=60, queries=40)
    keep = keep_every(view, 4)
    plain, fitted = run(Drop(), view, keep).slots, run(Matching(), view, keep).slots

    def errors(slots: Slots) -> tuple[Tensor, Tensor]:
        u, full = (
            attention.logits(replace(view, slots=x), view.queries, view.query_positions) for x in (slots, view.slots)
        )
        mass = (u.logsumexp(-1) - full.logsumexp(-1)).exp() - 1
        missing = outputs(view, slots) - outputs(view, view.slots)
        return mass.square().mean((2, 3)), missing.square().sum(-1).mean((2, 3))

    (mass, output), (old_mass, old_output) = errors(fitted), errors(plain)
    assert (mass < 0.4 * old_mass).all()
    assert (output < 0.5 * old_output).all()


@pytest.mark.parametrize("caps", [(0.1, 0.025), (10.0, 10.0), (0.1, 0.0)])
@pytest.mark.parametrize("model", MODELS)
def test_grkv_equals_a_loop(model: dict[str, object], caps: tuple[float, float]) -> None:
    view, keep = typical(5, slots=18, queries=5, dim=4, **model)
    got = run(GRKV(window=5, penalty=0.02, value_cap=caps[0], key_cap=caps[1], steps=400), view, keep)
    kept = run(Drop(), view, keep).slots
    assert torch.equal(got.slots.log_votes, kept.log_votes)

    def short(x: Tensor, change: Tensor, cap: float) -> Tensor:
        return change if change.norm() <= cap * x.norm() else change * float(cap * x.norm() / change.norm())

    for h in range(2):
        columns = columns_of(kept, h)
        free = [n for n, c in enumerate(columns) if kept.positions[0, h, c] >= 2]
        a = attend(view, h, kept, columns)[0]
        values, keys = kept.values[0, h, columns].clone(), kept.keys[0, h, columns].clone()
        want = attend(view, h, view.slots, list(range(18)))[0] @ view.slots.values[0, h]
        first = values.clone()
        gram = a[:, free] @ a[:, free].T + 0.02 * torch.eye(len(a), dtype=F64)
        change = a[:, free].T @ gram.inverse() @ (want - a @ values)
        for n, dv in zip(free, change, strict=True):
            values[n] += short(first[n], dv, caps[0])
        out = a @ values
        queries = view.queries[0, 2 * h : 2 * h + 2].flatten(0, 1)
        jacobian = torch.zeros(len(a), values.shape[1], len(free), 4, dtype=F64)
        for t in range(len(a)):
            for column, n in enumerate(free):
                x = float(queries[t] @ keys[n]) * view.scaling
                slope = 1 - math.tanh(x / view.softcap) ** 2 if view.softcap else 1.0
                jacobian[t, :, column] = torch.outer(a[t, n] * (values[n] - out[t]), slope * view.scaling * queries[t])
        j = jacobian.flatten(2).flatten(0, 1)
        normal = j.T @ j + 0.02 * torch.eye(j.shape[1], dtype=F64)
        moved = keys.clone()
        for n, dk in zip(free, (normal.inverse() @ j.T @ (want - out).flatten()).view(-1, 4), strict=True):
            moved[n] += short(keys[n], dk, caps[1])
        turned = kept.with_(keys=kept.keys.clone())
        turned.keys[0, h, columns] = moved
        after = attend(view, h, turned, columns)[0] @ values
        errors = [float((want - x).square().sum()) for x in (a @ first, out, after)]
        best = errors.index(min(errors)) if caps[1] else 1
        torch.testing.assert_close(got.slots.values[0, h, columns], values if best else first, rtol=0, atol=1e-9)
        torch.testing.assert_close(got.slots.keys[0, h, columns], moved if best == 2 else keys, rtol=0, atol=1e-7)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1.0, 4.0]))
@FEW
def test_grkv_never_fits_its_queries_worse(seed: int, scale: float) -> None:
    view = make_view(seed, heads=3, groups=2, slots=50, queries=32, scale=scale)
    keep = keep_every(view, 5)
    plain, fitted = run(Drop(), view, keep).slots, run(GRKV(), view, keep).slots
    errors = [(outputs(view, x) - outputs(view, view.slots)).square().sum((2, 3, 4)) for x in (plain, fitted)]
    assert (errors[1] < errors[0]).all()
    for name, cap in (("values", 0.1), ("keys", 0.025)):
        old, new = getattr(plain, name)[plain.valid], getattr(fitted, name)[plain.valid]
        assert ((new - old).norm(dim=-1) <= cap * old.norm(dim=-1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("bias", ["count", "mass"])
@pytest.mark.parametrize("model", MODELS)
def test_residual_slots_equal_explicit_blocks(model: dict[str, object], bias: str) -> None:
    view, keep = typical(6, slots=40, queries=8, **model)
    keep[0, 1, 30:] = True  # heads of different lengths
    add_stats(view)
    got, s, scores = run(Residual(0.4, bias=bias, window=4, alpha=0.7), view, keep), view.slots, scores_of(view)
    past = recent(view, 4, 0.7)
    u, log_z = log_masses(view, past)
    for h in range(2):
        kept = keep[0, h].nonzero().flatten().tolist()
        count = math.floor(0.4 * len(kept))
        weak = sorted((i for i in kept if i >= 2), key=lambda i: (float(scores[0, h, i]), -i))[:count]
        pool = sorted([i for i in range(40) if i not in kept or i in weak])
        blocks = [[i for n, i in enumerate(pool) if n * count // len(pool) == c] for c in range(count)]
        assert {len(x) for x in blocks} <= {len(pool) // count, len(pool) // count + 1}
        want = sorted([i for i in kept if i not in weak] + [x[-1] for x in blocks])
        r = got.slots
        columns = columns_of(r, h)
        assert r.positions[0, h, columns].tolist() == want and len(want) == len(kept)
        assert got.merged[0, h] == 40 - len(kept) and got.dropped[0, h] == 0 and not got.lost.any()
        for column, i in zip(columns, want, strict=True):
            members = next((x for x in blocks if x[-1] == i), [i])
            log = s.log_votes[0, h, members] if bias == "count" else u[0, h, members]
            w = log.softmax(0)
            key, value, votes = w @ s.keys[0, h, members], w @ s.values[0, h, members], s.log_votes[0, h, i]
            if members != [i]:
                votes = log.logsumexp(0)
                if bias == "mass":
                    one = torch.full((1, 2, 1), i)
                    votes = votes - log_masses_of(view, past, log_z, key.expand(1, 2, 1, -1), one)[0, h, 0]
            torch.testing.assert_close(r.keys[0, h, column], key, rtol=0, atol=1e-12)
            torch.testing.assert_close(r.values[0, h, column], value, rtol=0, atol=1e-12)
            torch.testing.assert_close(r.log_votes[0, h, column], votes, rtol=0, atol=1e-10)
            for kind, x in s.stats.items():  # the anchor is the last of a block
                wanted = combined(kind, x[0, h, members].flip(0))
                assert abs(float(r.stats[kind][0, h, column] - wanted)) <= 1e-12, kind


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), bias=st.sampled_from(["count", "mass"]))
@FEW
def test_residual_slots_meet_the_budget_and_keep_every_vote(seed: int, share: float, bias: str) -> None:
    view, keep = typical(seed)
    keep |= torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = run(Residual(share, bias=bias), view, keep)
    assert torch.equal(got.slots.lengths, keep.sum(-1))
    assert torch.equal(got.merged + got.dropped, (~keep).sum(-1))
    for h in range(2):
        positions = got.slots.positions[0, h, got.slots.valid[0, h]]
        assert (positions[1:] > positions[:-1]).all()  # sorted, and no two alike
    if bias == "count":
        votes = (got.slots.log_votes.exp() * got.slots.valid).sum(-1)
        gone = (view.slots.log_votes.exp() * got.lost).sum(-1)
        torch.testing.assert_close(votes + gone, view.slots.log_votes.exp().sum(-1), rtol=1e-12, atol=0)


def test_no_residual_slots_is_plain_eviction() -> None:
    view, keep = typical(7)
    for reduce in (Residual(0.0), Residual(0.01, bias="mass")):
        got, want = run(reduce, view, keep), run(Drop(), view, keep)
        for name in ("keys", "values", "log_votes", "positions"):
            assert torch.equal(getattr(got.slots, name), getattr(want.slots, name))
        assert torch.equal(got.lost, want.lost) and torch.equal(got.dropped, want.dropped)


@given(seed=st.integers(0, 10_000), empties=st.integers(0, 9), pad=st.integers(0, 5), which=st.integers(0, 4))
@FEW
def test_a_padded_row_gives_what_it_gives_alone(seed: int, empties: int, pad: int, which: int) -> None:
    view, _ = typical(seed, slots=20, queries=7)
    wide = padded(view, empties, pad)
    alone, batched = (run(ALL[which], v, keep_every(v, 3) | (v.slots.valid & v.protected)) for v in (view, wide))
    assert torch.equal(alone.merged, batched.merged) and torch.equal(alone.dropped, batched.dropped)
    assert torch.equal(alone.lost, batched.lost[..., empties:]) and not batched.lost[..., :empties].any()
    assert torch.equal(alone.slots.positions, batched.slots.positions)
    for name in ("keys", "values", "log_votes"):
        torch.testing.assert_close(getattr(alone.slots, name), getattr(batched.slots, name), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("which", range(len(ALL)))
def test_heads_that_give_up_nothing_and_protected_slots_stay(which: int) -> None:
    view, keep = typical(8, dtype=torch.float32)
    keep[0, 1] = True
    got, want = run(ALL[which], view, keep).slots, run(Drop(), view, keep).slots
    still = want.valid & (want.positions < 2)
    still[0, 1] = want.valid[0, 1]
    assert torch.equal(got.positions[still], want.positions[still])
    for name in ("keys", "values", "log_votes"):
        assert torch.equal(getattr(got, name)[still], getattr(want, name)[still])
        assert name == "keys" or which == 2 or not torch.equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("which", range(len(ALL)))
def test_inputs_are_left_alone_and_results_repeat(which: int) -> None:
    view, keep = typical(9, rows=2, slots=40, dtype=torch.float32)
    names, before = ("keys", "values", "log_votes", "positions"), view.slots.map(torch.clone)
    first, second = run(ALL[which], view, keep).slots, run(ALL[which], view, keep).slots
    assert all(torch.equal(getattr(before, name), getattr(view.slots, name)) for name in names) and not view.state
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)
    assert first.keys.dtype == first.values.dtype == first.log_votes.dtype == torch.float32


@pytest.mark.parametrize("which", range(len(ALL)))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(which: int, dtype: torch.dtype) -> None:
    for scale in (1.0, 60.0, 1e-4):
        view, keep = typical(10, heads=4, slots=40, queries=20, scale=scale, dtype=dtype)
        view.slots.log_votes = view.slots.log_votes.float()
        view = replace(view, queries=view.queries.clamp(-200, 200), protected=view.slots.positions < 1)
        view.slots.keys[:, 0, 0] *= 20  # one head sees nothing but a protected slot
        slots = run(ALL[which], view, keep).slots
        assert slots.keys.dtype == slots.values.dtype == dtype and slots.log_votes.dtype == torch.float32
        assert all(x[slots.valid].isfinite().all() for x in (slots.keys, slots.values, slots.log_votes))


@pytest.mark.parametrize("which", [0, 2])
def test_heads_in_tiles_equal_heads_at_once(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    view, keep = typical(11, rows=2, heads=4, sink_logits=torch.randn(8, dtype=F64))
    whole = run(ALL[which], view, keep).slots
    monkeypatch.setattr("keepkv.reduce.fit._TILE", 300)
    tiled = run(ALL[which], view, keep).slots
    for name in ("keys", "values", "log_votes"):
        torch.testing.assert_close(getattr(whole, name), getattr(tiled, name), rtol=1e-8, atol=1e-9)


def test_queries_are_missed_where_none_are_known() -> None:
    view, keep = typical(12)
    blind = replace(view, queries=view.queries[:, :, :0], query_positions=view.query_positions[:, :0])
    for reduce in (Matching(), GRKV(), Residual(0.3, bias="mass")):
        with pytest.raises(CacheStateError, match="queries"):
            run(reduce, blind, keep)
        assert not run(reduce, blind, view.slots.valid).lost.any()  # nothing leaves: nothing is needed
    assert run(Residual(0.3), blind, keep).merged.sum() > 0


def test_methods_remember_the_queries_they_need() -> None:
    for name, options, state in [
        ("attention-matching", {"queries": 9}, "sample"), ("grkv", {"queries": 9, "window": 4}, "merge_window"),
        ("grkv", {"score": "keydiff", "queries": 9}, "merge_window"),
        ("reskv", {"bias": "mass", "score": "keydiff", "window": 9}, "merge_window"),
    ]:  # fmt: skip
        method = METHODS.build(name, **options)
        view, keep = typical(13, queries=12)
        method.score.observe(view)
        assert view.state[state].shape[2] == 9 and method.reduce.merges and method.name == name
        blind = replace(view, queries=view.queries[:, :, :0], query_positions=view.query_positions[:, :0])
        result = method.reduce(blind, keep, method.score(view), method.score)
        assert (result.merged + result.dropped == (~keep).sum(-1)).all()


def test_senseless_options_are_refused() -> None:
    for piece, name, value in [
        (Matching, "prior", "mean"), (Matching, "ridge", 0.0), (Matching, "queries", 0), (GRKV, "penalty", 0.0),
        (GRKV, "key_cap", -1.0), (Residual, "share", 1.5), (Residual, "bias", "votes"), (Residual, "window", 0),
        (score.Matching, "pool", "mean"), (score.Matching, "queries", 0),
    ]:  # fmt: skip
        with pytest.raises(KeepKVError):
            piece(**{name: value})
