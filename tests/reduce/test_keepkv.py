"""The twenty invariants of KeepKV (arXiv 2504.09936), on plain tensors. Numbers follow the list in the docstrings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from merge_views import Kinds, add_stats, keep_every, make_view, output
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.observe import attention
from keepkv.reduce.drop import Drop
from keepkv.reduce.forms import (
    Groups,
    groups,
    zip_scale,
)
from keepkv.reduce.merge import KeepKV
from keepkv.score.content.random import Random
from keepkv.score.queries.ema import STAT, Ema

torch.set_num_threads(1)
F64 = torch.float64


def caches(count: int = 500, n: int = 64, d: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random caches: q (N,1,d), k (N,1,n,d), v (N,1,n,d), b (N,1,n) with votes of 1 to 8."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=rng, dtype=F64) for shape in ((count, 1, d), *[(count, 1, n, d)] * 2))
    return q, k, v, torch.randint(1, 9, (count, 1, n), generator=rng).to(F64).log()


def tangent_bias(g: Groups) -> Tensor:
    """b_r = L − ℓ̄ of the ``bias`` form (B,H,size): H(w̃) + Σw̃b, unchanged by a common shift of the logits."""
    return g.log_mass - g.mean_logit()


def dots(q: Tensor, k: Tensor) -> Tensor:
    return (k @ q[..., None]).squeeze(-1) / math.sqrt(q.shape[-1])


def attend(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return ((dots(q, k) + b).softmax(-1)[..., None, :] @ v).squeeze(-2)


def first(count: int, like: Tensor) -> Tensor:
    """Group 0 for the first ``count`` slots, a group of its own for each other one."""
    n = like.shape[-1]
    return torch.tensor([0] * count + list(range(1, n - count + 1))).expand(like.shape)


def merge(q: Tensor, k: Tensor, v: Tensor, b: Tensor, count: int, form: str) -> tuple[Tensor, Tensor, Tensor, Groups]:
    """The first ``count`` slots as one, in front of the others."""
    size = k.shape[2] - count + 1
    g = groups(dots(q, k) + b, b, first(count, b), size)
    keys, values = g.mean(k), g.mean(v)
    if form == "zip":
        keys, bias = keys * zip_scale(g)[0][..., None], g.log_votes
    elif form == "bias":
        bias = tangent_bias(g)
    elif form == "fixed":
        keys = torch.cat((k[:, :, :1], k[:, :, count:]), dim=2)
        bias = g.log_mass - dots(q, keys)
    else:
        bias = g.log_votes
    return keys, values, bias, g


def error_at_merge(form: str, mode: str) -> Tensor:
    """Largest absolute output error per cache at the query of the merge; ill-defined zip scales left out."""
    q, k, v, b = caches()
    before, fine = attend(q, k, v, b), torch.ones(q.shape[0], dtype=torch.bool)
    steps = [2] * 7 if mode == "sequential" else [2 if mode == "pair" else 8]
    for count in steps:
        k, v, b, g = merge(q, k, v, b, count, form)
        fine &= g.mean_logit()[:, 0, 0].abs() > 1e-3
    return (attend(q, k, v, b) - before).abs().amax((1, 2))[fine if form == "zip" else slice(None)]


def reduced(view: LayerView, keep: Tensor, **options: object) -> Slots:
    return KeepKV(**options)(view, keep, keep.double(), Random()).slots  # type: ignore[arg-type]


def test_01_a_slot_with_p_votes_is_p_slots() -> None:
    view = make_view(1, groups=2, slots=12, queries=3)
    copies = torch.randint(1, 6, (12,), generator=torch.Generator().manual_seed(0))
    s = view.slots
    voted = s.with_(log_votes=copies.to(F64).log().expand(s.positions.shape))
    repeated = Slots(*(x.repeat_interleave(copies, dim=2) for x in (s.keys, s.values, s.log_votes, s.positions)))
    torch.testing.assert_close(output(view, voted), output(view, repeated), rtol=0, atol=1e-12)
    a = attention.weights(replace(view, slots=voted), view.queries, view.query_positions)
    c = attention.weights(replace(view, slots=repeated), view.queries, view.query_positions)
    summed = torch.zeros_like(a).index_add_(-1, torch.arange(12).repeat_interleave(copies), c)
    torch.testing.assert_close(a, summed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["pair", "joint", "sequential"])
def test_02_zip_is_exact_at_the_merge_query(mode: str) -> None:
    error = error_at_merge("zip", mode)
    assert len(error) > 400 and error.max() <= 1e-10


@pytest.mark.parametrize("form", ["bias", "fixed"])
@pytest.mark.parametrize("mode", ["pair", "joint", "sequential"])
def test_03_bias_and_fixed_are_exact_at_the_merge_query(form: str, mode: str) -> None:
    assert error_at_merge(form, mode).max() <= 1e-12
    assert error_at_merge("code", mode).max() > 1e-2


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("key", ["zip", "bias", "fixed"])
def test_02_03_through_the_reduction(key: str, sinks: bool, softcap: float | None) -> None:
    """Exact through routing, grouping and selection, with logits capped and attention sinks, votes included."""
    view = make_view(
        3, rows=2, heads=3, slots=40, votes=True, softcap=softcap, sink_logits=torch.ones(3) if sinks else None
    )
    slots = reduced(view, keep_every(view, 3), key=key, threshold=None, window=1)
    assert slots.keys.dtype == slots.log_votes.dtype == F64
    error = (output(view, slots) - output(view, view.slots)).abs().max()
    assert error <= (1e-10 if key == "zip" else 1e-12)


def test_04_key_identity() -> None:
    """L − ln P = ℓ̄ − KL(w̃‖π), and L − ℓ̄ = H(w̃) + Σw̃b."""
    q, k, v, b = caches(n=8)
    g = merge(q, k, v, b, 8, "bias")[3]
    log_w, log_pi = g.weights.log(), b.log_softmax(-1)
    kl = (g.weights * (log_w - log_pi)).sum(-1, keepdim=True)
    assert (g.log_mass - g.log_votes - g.mean_logit() + kl).abs().max() <= 1e-11
    entropy = (g.weights * (b - log_w)).sum(-1, keepdim=True)
    assert (tangent_bias(g) - entropy).abs().max() <= 1e-11


def test_05_code_form_over_counts_and_count_mean_under_counts() -> None:
    q, k, v, b = caches(n=8)
    keys, _, bias, g = merge(q, k, v, b, 8, "code")
    pi = b.softmax(-1)
    kl = (g.weights * (g.weights / pi).log()).sum(-1, keepdim=True)
    excess = bias + dots(q, keys) - g.log_mass
    assert (excess - kl).abs().max() <= 1e-12 and excess.min() >= -1e-12
    reverse = (pi * (pi / g.weights).log()).sum(-1, keepdim=True)
    excess = bias + dots(q, (pi[..., None] * k).sum(2, keepdim=True)) - g.log_mass
    assert (excess + reverse).abs().max() <= 1e-12 and excess.max() <= 1e-12


def test_06_bias_form_never_exceeds_the_true_mass() -> None:
    q, k, v, b = caches(100_000, n=4, d=8)
    keys, _, bias, _ = merge(q, k, v, b, 4, "bias")
    later = q + torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    true = (dots(later, k) + b).logsumexp(-1)
    deficit = true - (bias + dots(later, keys)).squeeze(-1)
    moved = dots(later - q, k)
    bound = (moved.amax(-1) - moved.amin(-1)).square() / 8
    assert ((deficit < -1e-12) | (deficit > bound + 1e-12)).sum() == 0


def shift_error(form: str, shift: float) -> float:
    """Mean absolute log-mass error of an 8 → 1 merge when each coordinate of the query moves by ``shift``."""
    q, k, v, b = caches(n=8)
    keys, _, bias, _ = merge(q, k, v, b, 8, form)
    later = q + shift * torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    error = (bias + dots(later, keys)).squeeze(-1) - (dots(later, k) + b).logsumexp(-1)
    return float(error.abs().median())


@pytest.mark.parametrize(("form", "ratio"), [("zip", 2.0), ("fixed", 2.0), ("bias", 4.0)])
def test_07_order_of_the_error_when_the_query_moves(form: str, ratio: float) -> None:
    assert abs(shift_error(form, 1e-3) / shift_error(form, 5e-4) - ratio) <= ratio / 10


def test_08_identical_slots_merge_exactly_at_every_query() -> None:
    q, k, v, b = caches(n=12)
    k, v = (torch.cat((x[:, :, :1].expand(-1, -1, 5, -1), x[:, :, 5:]), dim=2) for x in (k, v))
    later = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    for form in ("bias", "fixed", "zip", "code"):
        keys, values, bias, g = merge(q, k, v, b, 5, form)
        assert (bias[..., 0] - b[..., :5].logsumexp(-1)).abs().max() <= 1e-12
        fine = g.mean_logit()[:, 0, 0].abs() > 1e-3
        error = (attend(later, keys, values, bias) - attend(later, k, v, b)).abs().amax((1, 2))
        assert error[fine if form == "zip" else slice(None)].max() <= 1e-12


def test_09_common_shift_of_the_scores() -> None:
    q, k, _, b = caches(n=8)
    one, other = (groups(dots(q, k) + b + shift, b, first(8, b), 1) for shift in (0.0, 5.0))
    assert (tangent_bias(one) - tangent_bias(other)).abs().max() <= 1e-12
    assert (one.weights - other.weights).abs().max() <= 1e-12
    assert (zip_scale(one)[0] - zip_scale(other)[0]).abs().median() > 1e-3


def test_10_order_of_merging() -> None:
    """Bias form: any order of pair merges gives the joint merge; zip keys depend on the order."""
    q, k, v, b = caches(n=8)
    results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"bias": [], "zip": []}
    for form, found in results.items():
        found.append(merge(q, k, v, b, 8, form)[:3])
        for order in (torch.arange(8), torch.randperm(8, generator=torch.Generator().manual_seed(2))):
            kk, vv, bb = k[:, :, order], v[:, :, order], b[..., order]
            for _ in range(7):
                kk, vv, bb, _g = merge(q, kk, vv, bb, 2, form)
            found.append((kk, vv, bb))
    for other in results["bias"][1:]:
        assert max(float((x - y).abs().max()) for x, y in zip(results["bias"][0], other, strict=True)) <= 1e-10
    assert (results["zip"][1][0] - results["zip"][2][0]).abs().max() > 1e-3


def test_11_effective_votes() -> None:
    b = torch.zeros(1, 1, 6, dtype=F64)
    equal = groups(torch.full_like(b, -3.0), b, torch.zeros_like(b, dtype=torch.long), 1)
    assert (tangent_bias(equal).exp() - 6).abs().max() <= 1e-12
    u = torch.tensor([[[50.0, 0, 0, 0, 0, 0]]], dtype=F64)
    assert (tangent_bias(groups(u, b, torch.zeros_like(b, dtype=torch.long), 1)).exp() - 1).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("key", ["zip", "code"])
def test_12_votes_and_dropped_tokens_add_up_over_a_run(key: str, dtype: torch.dtype) -> None:
    """Twelve compressions with new tokens in between; a dropped slot may itself hold many tokens."""
    reduce, dropped, seen = KeepKV(key=key, threshold=0.2, window=4), 0, 0
    held: Slots | None = None
    for turn in range(12):
        fresh = make_view(turn, slots=30, queries=6, dtype=dtype)
        fresh.slots.positions.add_(seen)
        fresh.query_positions.add_(seen)
        seen += 30
        if held is not None:
            s, o = fresh.slots, held
            fresh.slots = Slots(*(torch.cat(p, dim=2) for p in ((o.keys, s.keys), (o.values, s.values),
                                  (o.log_votes, s.log_votes), (o.positions, s.positions))))  # fmt: skip
        fresh.slots.log_votes = fresh.slots.log_votes.to(F64 if dtype == F64 else torch.float32)
        result = reduce(fresh, keep_every(fresh, 5), fresh.slots.log_votes, Random())
        dropped = dropped + (fresh.slots.log_votes.double().exp() * result.lost).sum(-1)
        assert ((result.merged + result.dropped) == (fresh.slots.valid & ~keep_every(fresh, 5)).sum(-1)).all()
        held = result.slots
        votes = (held.log_votes.double().exp() * held.valid).sum(-1)
        assert ((votes + dropped).round() == seen).all() and (votes + dropped - seen).abs().max() < 1e-2
    assert held is not None and held.log_votes.max() > math.log(4)


@pytest.mark.parametrize("key", ["fixed", "bias", "zip", "code"])
def test_13_nothing_to_merge_is_plain_eviction(key: str) -> None:
    view = make_view(4, rows=2, groups=2, queries=8, votes=True)
    add_stats(view)
    everything = view.slots.valid
    for keep, options in ((keep_every(view, 3), {"threshold": 1.1}), (everything, {"threshold": None})):
        ours = KeepKV(key=key, **options)(view, keep, keep.double(), Kinds())
        plain = Drop()(view, keep, keep.double(), Random())
        for name in ("keys", "values", "log_votes", "positions"):
            assert torch.equal(getattr(ours.slots, name), getattr(plain.slots, name))
        assert all(torch.equal(x, plain.slots.stats[kind]) for kind, x in ours.slots.stats.items())
        assert torch.equal(ours.lost, plain.lost) and ours.merged.sum() == 0
    assert torch.equal(reduced(view, everything, key=key).keys, view.slots.keys)


@pytest.mark.parametrize("key", ["fixed", "bias", "zip", "code"])
def test_14_protected_slots_are_unchanged(key: str) -> None:
    view = make_view(5, rows=2, slots=40, queries=8, votes=True)
    protected = (view.slots.positions < 4) | (view.slots.positions >= 34)
    view = replace(view, protected=protected)
    keep = keep_every(view, 4) | protected
    result = KeepKV(key=key, threshold=None, window=8)(view, keep, keep.double(), Random())
    assert (result.merged > 0).all() and result.dropped.sum() == 0
    plain = view.slots.select(keep)
    kept = protected.gather(2, plain.positions.clamp(min=0).long()) & plain.valid
    for name in ("keys", "values", "log_votes", "positions"):
        assert torch.equal(getattr(result.slots, name)[kept], getattr(plain, name)[kept])
    changed = (result.slots.log_votes != plain.log_votes) & ~kept
    assert changed.any()
    # No target at all: everything that leaves is dropped.
    view = replace(view, protected=keep)
    result = KeepKV(key=key, threshold=None)(view, keep, keep.double(), Random())
    assert result.merged.sum() == 0 and torch.equal(result.slots.keys, plain.keys)


def test_16_ema_weights_sum_to_one_and_recurrence_is_the_direct_sum() -> None:
    """Prefill of 20, then 15 decoded tokens: Σ_j (1−α)α^{t−j} a_j / (1−α^c) for each slot, c its own count."""
    score, alpha, total, first_at = Ema(alpha=0.8, window=6), 0.8, 35, 13
    whole = make_view(7, heads=2, groups=2, slots=total, queries=total)
    shares = attention.weights(whole, whole.queries, whole.query_positions).mean(2)  # (1,H,T,S)
    state: dict[str, Tensor] = {}
    held = torch.full((1, 2, 20), -math.inf, dtype=F64)
    for end in range(20, total + 1):
        begin = 0 if end == 20 else end - 1
        s = whole.slots
        view = LayerView(
            Slots(s.keys[:, :, :end], s.values[:, :, :end], s.log_votes[..., :end], s.positions[..., :end],
                  {STAT: held}),
            whole.queries[:, :, begin:end], whole.query_positions[:, begin:end], torch.tensor([end]),
            whole.scaling, state,
        )  # fmt: skip
        score.observe(view)
        direct = torch.zeros(1, 2, end, dtype=F64)
        for i in range(end):
            seen = [t for t in range(first_at, end) if t >= i]
            eta = [(1 - alpha) * alpha ** (end - 1 - t) for t in seen]
            norm = 1 - alpha ** len(seen)
            assert abs(sum(eta) / norm - 1) <= 1e-12
            direct[..., i] = sum(e / norm * shares[:, :, t, i] for e, t in zip(eta, seen, strict=True))
        assert (score(view) - direct).abs().max() <= 1e-12
        held = torch.cat((held, torch.full((1, 2, 1), -math.inf, dtype=F64)), dim=-1)


def test_17_error_bound_of_the_bias_form() -> None:
    """Θ ≤ a_r·tanh(R/4)·diam + tanh(R²/32)·‖v̄_r − u‖, R = range of ln(s/ŝ): no violation in 200 000."""
    rng, count = torch.Generator().manual_seed(0), 200_000
    m = 4
    predicted = 2 * torch.randn(count, 1, m, generator=rng, dtype=F64)
    ratio = torch.randn(count, 1, m, generator=rng, dtype=F64) * torch.rand(count, 1, 1, generator=rng, dtype=F64) * 2
    values = torch.randn(count, 1, m, 3, generator=rng, dtype=F64)
    rest = torch.randn(count, 1, 1, generator=rng, dtype=F64) * 2  # log mass of all other entries
    other = 2 * torch.randn(count, 1, 3, generator=rng, dtype=F64)  # their mean value
    zero = torch.zeros_like(predicted)
    g = groups(predicted, zero, torch.zeros_like(predicted, dtype=torch.long), 1)
    actual = predicted + ratio
    true_mass = actual.logsumexp(-1, keepdim=True)
    merged_mass = tangent_bias(g) + (g.weights * actual).sum(-1, keepdim=True)
    a, a_hat = ((x - torch.logaddexp(x, rest)).exp() for x in (true_mass, merged_mass))
    true_mean, mean = (actual.softmax(-1)[..., None] * values).sum(2), g.mean(values).squeeze(2)
    error = (a_hat * mean + (1 - a_hat) * other - a * true_mean - (1 - a) * other).norm(dim=-1)
    spread_ = (ratio.amax(-1) - ratio.amin(-1)).squeeze(-1)
    diameter = torch.cdist(values, values).amax((-1, -2)).squeeze(-1)
    bound = a.squeeze() * torch.tanh(spread_ / 4) * diameter
    bound += torch.tanh(spread_.square() / 32) * (mean - other).norm(dim=-1).squeeze(-1)
    deficit = (true_mass - merged_mass).squeeze()
    assert (error.squeeze(-1) > bound + 1e-12).sum() == 0
    assert ((deficit < -1e-12) | (deficit > spread_.square() / 8 + 1e-12)).sum() == 0


@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("key", ["fixed", "bias", "zip", "code"])
def test_18_large_logits(key: str, queries: int) -> None:
    """Logits across ±200 in float32: finite, and within 1e-4 of float64."""
    exact = make_view(8, heads=4, groups=1 if key == "zip" else 2, slots=32, queries=queries, scale=60.0)
    raw = attention.logits(exact, exact.queries, exact.query_positions)
    exact.queries *= 200 / raw[raw.isfinite()].abs().max()
    s = exact.slots
    exact = replace(exact, slots=s.with_(keys=s.keys.float().double(), values=s.values.float().double()),
                    queries=exact.queries.float().double())  # fmt: skip
    s = exact.slots
    single = replace(exact, slots=s.with_(keys=s.keys.float(), values=s.values.float(), log_votes=s.log_votes.float()),
                     queries=exact.queries.float())  # fmt: skip
    keep = keep_every(exact, 4)
    want, got = (reduced(v, keep, key=key, threshold=None, window=8) for v in (exact, single))
    for name in ("keys", "values", "log_votes"):
        x, y = getattr(got, name), getattr(want, name)
        assert x.isfinite().all() and y.isfinite().all()
        assert (x.double() - y).abs().max() <= 1e-4 * y.abs().max().clamp(min=1)


def test_19_bias_as_one_more_coordinate() -> None:
    """[q, 1]·[k, b√d] in an unmodified kernel equals the additive bias."""
    view = make_view(9, heads=3, slots=40, queries=4, votes=True, dtype=torch.float32)
    s, root = view.slots, math.sqrt(view.queries.shape[-1])
    wide_q = torch.cat((view.queries, torch.ones_like(view.queries[..., :1])), -1)
    wide_k = torch.cat((s.keys, (s.log_votes * root)[..., None]), -1)
    fused = torch.nn.functional.scaled_dot_product_attention(wide_q, wide_k, s.values, scale=view.scaling)
    assert (fused - output(view, s).squeeze(2)).abs().max() <= 1e-5


def test_20_a_run_reports_what_it_did() -> None:
    view = make_view(10, heads=3, slots=40, queries=8)
    keep = keep_every(view, 4)
    result = KeepKV(threshold=0.3)(view, keep, keep.double(), Random())
    assert (result.merged > 0).any() and (result.dropped > 0).any()
    assert torch.equal(result.dropped, result.lost.sum(-1))
    assert torch.equal(result.merged + result.dropped, (~keep).sum(-1))
    dropped_mass = (attention.weights(view, view.queries, view.query_positions).mean((2, 3)) * result.lost).sum(-1)
    assert dropped_mass.max() > 0 and (dropped_mass < 1).all() and result.slots.log_votes.max() > 0
    nothing = KeepKV(threshold=1.1)(view, keep, keep.double(), Random())
    assert nothing.merged.sum() == 0 and nothing.slots.log_votes.abs().max() == 0
