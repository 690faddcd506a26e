"""KVSlimmer and SelKV, and the scores that they go by, against loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_views import Kinds, add_stats, combined, keep_every, make_view, padded
from score_views import loop_weights, part_of_queries, row, together
from torch import Tensor

from keepkv.core.rope import Rope
from keepkv.core.slots import LayerView
from keepkv.errors import CacheStateError, KeepKVError
from keepkv.methods import METHODS
from keepkv.observe import attention
from keepkv.observe.masses import log_masses, recent
from keepkv.reduce.base import Reduced
from keepkv.reduce.drop import Drop
from keepkv.reduce.kvslimmer import KVSlimmer
from keepkv.reduce.selkv import SelKV
from keepkv.score.content.keydiff import KeyDiff
from keepkv.score.content.random import Random
from keepkv.score.queries.block_mates import STAT, BlockMates, mates
from keepkv.score.queries.pairs import Pairs

torch.set_num_threads(1)
F64 = torch.float64
MATES = BlockMates(Random())


def typical(seed: int, slots: int = 30, votes: bool = True, **options: object) -> tuple[LayerView, Tensor]:
    """Two heads with other slots kept in each; the first two and the last three are protected."""
    view = make_view(seed, heads=2, groups=2, slots=slots, queries=4, votes=votes, **options)
    view = replace(view, protected=(view.slots.positions < 2) | (view.slots.positions >= slots - 3))
    return view, keep_every(view, 4) | view.protected


def free_of(view: LayerView, keep: Tensor, h: int) -> list[int]:
    assert view.protected is not None
    return [i for i in range(keep.shape[2]) if keep[0, h, i] and not view.protected[0, h, i]]


def column(got: Reduced, h: int, position: int) -> int:
    found: list[int] = got.slots.positions[0, h].tolist()
    return found.index(position)


# --- KVSlimmer -------------------------------------------------------------------------------------------------------


def slim(view: LayerView, keep: Tensor) -> Reduced:
    return KVSlimmer(4)(view, keep, keep.float(), Kinds())


def mean_attention(view: LayerView) -> Tensor:
    """(B,H,S): each slot's mean over the queries that see it, and over query heads, as a share of the head's."""
    s, attn = view.slots, loop_weights(view)
    seen = s.positions[0, 0][None] <= view.query_positions[0][:, None]
    mass = (attn.unflatten(1, (s.shape[1], -1)).mean(2) * seen).sum(2) / seen.sum(0)
    return mass / mass.sum(-1, keepdim=True)


def curvature(view: LayerView, h: int, members: list[int]) -> Tensor:
    """(n,n) of the members of a run, by the formula of each entry."""
    alpha, v = mean_attention(view)[0, h], view.slots.values[0, h]
    mean = sum(float(a) * x for a, x in zip(alpha, v, strict=True))
    d = [float((x - mean).abs().sum()) for x in v]
    made = torch.zeros(len(members), len(members), dtype=F64)
    for m, i in enumerate(members):
        for n, j in enumerate(members):
            a, b = float(alpha[i]), float(alpha[j])
            made[m, n] = a * (1 - 2 * a) * d[i] if i == j else -a * b * (d[i] + d[j])
    return made


def runs_of(view: LayerView, keep: Tensor, h: int) -> dict[int, list[int]]:
    """By the kept slot that it becomes, each run; what leaves behind the last such slot is of that one's."""
    may = free_of(view, keep, h)
    runs: dict[int, list[int]] = {}
    for e in (i for i in range(keep.shape[2]) if not keep[0, h, i]):
        runs.setdefault(next((c for c in may if c > e), may[-1]), []).append(e)
    return runs


@pytest.mark.parametrize("axes", [0, 1, 3])
def test_kvslimmer_equals_a_loop(axes: int) -> None:
    """Keys without a rotary place, with one, and with three, as under M-RoPE."""
    view, keep = typical(1)
    add_stats(view)
    keep[0, 0, 26], keep[0, 1, 20:27] = True, False  # the last run of one head has nothing behind it
    axis = torch.tensor([0, 1, 2]) if axes == 3 else None
    rope = Rope(torch.tensor([1.0, 0.3, 0.05]), interleaved=True, axis=axis) if axes else None
    view, s, checked = replace(view, rope=rope), view.slots, 0
    got = slim(view, keep)
    for h in range(2):
        runs = runs_of(view, keep, h)
        assert max(map(len, runs.values())) > 1 and any(e > c for c, gone in runs.items() for e in gone) == (h == 1)
        for c, gone in runs.items():
            members = [c, *gone]
            w = curvature(view, h, members).sum(0).clamp(min=0)
            assert w.sum() > 0
            p = s.log_votes[0, h, members].exp()
            keys = [s.keys[0, h, i][None] for i in members]
            if rope is not None:
                place = [torch.full((1, 3) if axes == 3 else (1,), i) for i in members]
                keys = [rope.rotate(rope.unrotate(x, at), place[0]) for x, at in zip(keys, place, strict=True)]
            at = column(got, h, c)
            close(got.slots.keys[0, h, at], (w / w.sum()) @ torch.cat(keys), 1e-5 if axes else 1e-12)
            close(got.slots.values[0, h, at], (p / p.sum()) @ s.values[0, h, members])
            assert float(got.slots.log_votes[0, h, at]) == pytest.approx(math.log(float(p.sum())), abs=1e-12)
            for kind, x in s.stats.items():
                close(got.slots.stats[kind][0, h, at], combined(kind, x[0, h, members]))
            checked += 1
    assert checked > 6 and torch.equal(got.merged, (~keep).sum(-1)) and not got.lost.any()


def close(got: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_curvature_is_the_second_derivative_of_attention() -> None:
    """Of o = softmax(ℓ)·v by ℓ: α_i(1 − 2α_i)(v_i − o), and −α_iα_j((v_i − o) + (v_j − o))."""
    v, at = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64)
    found = torch.autograd.functional.hessian(lambda x: x.softmax(0) @ v, at)
    a = at.softmax(0)
    d = v - a @ v
    want = -a[:, None] * a * (d[:, None] + d)
    want.fill_diagonal_(0).diagonal().add_(a * (1 - 2 * a) * d)
    close(found, want)


def test_a_merged_key_is_where_the_quadratic_is_least() -> None:
    view, keep = typical(2, votes=False)
    got = slim(view, keep)
    for c, gone in runs_of(view, keep, 0).items():
        members, k = [c, *gone], view.slots.keys[0, 0]
        h = curvature(view, 0, members)
        if not bool((h.sum(0) > 0).all()):
            continue  # no least: the quadratic opens downwards somewhere
        away = got.slots.keys[0, 0, column(got, 0, c)] - k[members]
        close(h.sum(0) @ away, torch.zeros(k.shape[1], dtype=F64))


def test_counts_with_a_mean_are_the_published_sum_of_values() -> None:
    """Σ e^ℓ·V / Σ p·e^ℓ, V the sums of values, as the released code attends."""
    view, keep = typical(3, votes=False)
    slots = slim(view, keep).slots
    query = torch.randn(1, 4, 1, 16, dtype=F64)
    ours = attention.weights(replace(view, slots=slots), query, torch.tensor([[99]])) @ slots.values[:, :, None]
    p = slots.log_votes.exp()
    e = (query.view(1, 2, 2, 16) @ slots.keys.mT * view.scaling).exp() * slots.valid[:, :, None]
    theirs = (e @ (slots.values * p[..., None])) / (e @ p[..., None])
    close(ours[:, :, :, 0], theirs)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_kvslimmer_keeps_every_token_counted(seed: int) -> None:
    view, keep = typical(seed)
    keep &= (torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.6) | view.protected
    keep[:, :, 9] = True
    got = slim(view, keep)
    total = (got.slots.log_votes.exp() * got.slots.valid).sum(-1)
    torch.testing.assert_close(total, view.slots.log_votes.exp().sum(-1), rtol=1e-12, atol=0)
    assert torch.equal(got.slots.lengths, keep.sum(-1)) and got.slots.keys.isfinite().all()


def test_kvslimmer_without_curvature_takes_the_mean_by_votes() -> None:
    view, keep = typical(4)
    view.slots.values.zero_()  # d = 0
    got = slim(view, keep)
    for c, gone in runs_of(view, keep, 0).items():
        p = view.slots.log_votes[0, 0, [c, *gone]].exp()
        close(got.slots.keys[0, 0, column(got, 0, c)], (p / p.sum()) @ view.slots.keys[0, 0, [c, *gone]])


def test_kvslimmer_without_room_drops() -> None:
    view, _ = typical(5)
    assert view.protected is not None
    got, want = slim(view, view.protected), Drop()(view, view.protected, view.protected.float(), Random())
    assert torch.equal(got.slots.keys, want.slots.keys) and torch.equal(got.dropped, want.dropped)


def test_pairs_equal_a_loop_and_padding_makes_no_difference() -> None:
    views = [row(6), row(7, slots=11)]
    batch, score = together(views), Pairs(4, tilt=7.0)
    score.observe(batch)
    got = score(batch)
    for n, view in enumerate(views):
        s, size = view.slots, view.slots.shape[2]
        attn = loop_weights(view)[0, :, -4:].sum(1).view(2, 2, size).mean(1)
        p = s.log_votes[0].exp()
        for h in range(2):
            for i in range(size):
                j = min(i + 1, size - 1)
                a, b = (float(x[h, i] + (x[h, j] if j > i else 0)) for x in (attn, p))
                want = a * b / 7.0 ** (i / size)
                assert float(got[n, h, i - size]) == pytest.approx(want, rel=1e-6)


# --- SelKV -----------------------------------------------------------------------------------------------------------


def noted(view: LayerView) -> LayerView:
    """The view with the statistics of mates, after all of its queries were observed."""
    view = replace(view, slots=view.slots.with_(stats={STAT: torch.zeros(view.slots.shape)}), state={})
    MATES.observe(view)
    return view


def loop_mates(view: LayerView) -> list[list[list[int]]]:
    """By KV head and query: distances of the earlier tokens of its block, the most attended first."""
    s, g = view.slots, view.query_groups
    found = []
    for h in range(s.shape[1]):
        of_head = []
        for t, now in enumerate(view.query_positions[0].tolist()):
            block = [i for i, p in enumerate(s.positions[0, h].tolist()) if 0 <= p < now and p // 32 == now // 32]
            total = torch.zeros(len(block), dtype=F64)
            for q in view.queries[0, h * g : (h + 1) * g, t].double():
                u = s.keys[0, h, block].double() @ q * view.scaling + s.log_votes[0, h, block].double()
                total += u.softmax(-1)
            order = sorted(range(len(block)), key=lambda i: -float(total[i]))
            of_head.append([now - int(s.positions[0, h, block[i]]) for i in order])
        found.append(of_head)
    return found


def all_queries(seed: int, slots: int = 80, votes: bool = False) -> LayerView:
    return make_view(seed, heads=2, groups=2, slots=slots, queries=slots, votes=votes)


def test_mates_equal_a_loop() -> None:
    view = noted(all_queries(1, slots=140, votes=True))
    want, got = loop_mates(view), torch.stack(mates(view.slots.stats[STAT]), -1)
    for h in range(2):
        for t in range(140):
            assert [x for x in got[0, h, t].tolist() if x] == want[h][t][:4]
            assert len(want[h][t]) == t % 32


def test_mates_are_the_same_in_chunks_step_by_step_and_padded() -> None:
    view = all_queries(2)
    whole = noted(view).slots.stats[STAT]
    parts = replace(view, slots=view.slots.with_(stats={STAT: torch.zeros(view.slots.shape)}))
    for start, stop in ((0, 41), (41, 78), (78, 79), (79, 80)):
        now = part_of_queries(parts, start, stop)
        MATES.observe(now)
        parts.slots.stats[STAT][:, :, :stop] = now.slots.stats[STAT]
    assert torch.equal(parts.slots.stats[STAT], whole)
    wide = noted(padded(view, 5, 5)).slots.stats[STAT]
    assert torch.equal(wide[..., 5:], whole) and not wide[..., :5].any()


@pytest.mark.parametrize("strength", [0.5, 1.0, 0.0])
def test_selkv_equals_a_loop(strength: float) -> None:
    view = noted(all_queries(3))
    view = replace(view, protected=(view.slots.positions < 2) | (view.slots.positions >= 70))
    keep = keep_every(view, 3) | view.protected
    view.slots.log_votes[0, 0, ::5] = 0.7  # merged before
    s, order = view.slots, loop_mates(noted(all_queries(3)))
    mass = log_masses(view, recent(view, 8, 1.0))[0].exp()
    got = SelKV(strength, 8)(view, keep, keep.float(), MATES)
    merged, closed, alone = torch.zeros_like(keep), 0, 0
    for h in range(2):
        may, came = free_of(view, keep, h), {}
        for e in (i for i in range(80) if not keep[0, h, i]):
            i = next((e - d for d in order[h][e][:4] if e - d in may), None)
            if i is None:
                alone += 1
                continue
            cosine = float(torch.cosine_similarity(s.values[0, h, e], s.values[0, h, i], dim=0))
            if cosine <= 0:
                closed += 1
                continue
            came.setdefault(i, []).append((e, cosine))
            merged[0, h, e] = True
        assert max(map(len, came.values())) > 1
        for i in (i for i in range(80) if keep[0, h, i]):
            w = torch.tensor([1.0, *(g for _, g in came.get(i, []))], dtype=F64)
            members = [i, *(e for e, _ in came.get(i, []))]
            w = w * mass[0, h, members]
            at = column(got, h, i)
            close(got.slots.values[0, h, at], (w / w.sum()) @ s.values[0, h, members])
            bias = float(s.log_votes[0, h, i]) + strength * math.log(float(w.sum() / w[0]))
            assert float(got.slots.log_votes[0, h, at]) == pytest.approx(bias, abs=1e-12)
            assert torch.equal(got.slots.keys[0, h, at], s.keys[0, h, i])
            assert torch.equal(got.slots.stats[STAT][0, h, at], s.stats[STAT][0, h, i])
    assert closed > 3 and alone > 3
    assert torch.equal(got.merged, merged.sum(-1)) and torch.equal(got.lost, ~keep & ~merged)


def test_selkv_keeps_the_mass_of_what_enters_at_one_query() -> None:
    """With strength 1, equal values and one query: the output of kept and merged slots stays as it was."""
    view = all_queries(4, slots=30)
    view.slots.values.copy_(view.slots.values[:, :1, :1].expand_as(view.slots.values))
    view = noted(replace(view, queries=view.queries[:, ::2].repeat_interleave(2, 1)))
    keep = keep_every(view, 2)
    keep[:, :, 0] = True  # so that every token attended to one
    last = replace(view, queries=view.queries[:, :, -1:], query_positions=view.query_positions[:, -1:])
    got = SelKV(1.0, 1)(last, keep, keep.float(), MATES)
    assert not got.lost.any() and got.merged.min() > 9
    u = [attention.logits(replace(last, slots=x), last.queries, last.query_positions) for x in (view.slots, got.slots)]
    close(*(x.logsumexp(-1) for x in u))


def test_selkv_needs_mates() -> None:
    view, keep = typical(5)
    with pytest.raises(CacheStateError, match="wrap the score in BlockMates"):
        SelKV()(view, keep, keep.float(), KeyDiff())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_selkv_leaves_low_precision_caches_alone(dtype: torch.dtype) -> None:
    view = make_view(6, heads=2, slots=60, queries=60, dtype=dtype)
    view.slots.log_votes = view.slots.log_votes.float()
    view.slots.keys *= 30
    view = noted(view)
    before, keep = view.slots.map(torch.clone), keep_every(view, 3)
    got = SelKV()(view, keep, keep.float(), MATES)
    assert got.merged.min() > 0 and got.slots.values.dtype == dtype and got.slots.log_votes.dtype == torch.float32
    assert got.slots.values.isfinite().all() and got.slots.log_votes.isfinite().all()
    for name in ("keys", "values", "log_votes"):
        assert torch.equal(getattr(before, name), getattr(view.slots, name))


@pytest.mark.parametrize(("name", "options"), [("selkv", {"strength": 1.5}), ("kvslimmer", {"tilt": 0.5})])
def test_wrong_options_of_neighbours_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(KeepKVError, match=next(iter(options))):
        METHODS.build(name, **options)
