"""Scores made for decoding, G-KV and R-KV: closed forms over several compressions, redundancy, and rows of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from running import batch, generate, row
from score_views import loop_weights, part_of_queries, together
from score_views import row as one_row
from torch import Tensor
from torch.nn.functional import max_pool1d

import keepkv
from keepkv import Span
from keepkv.core.slots import LayerView
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.observe import redundancy as redundant
from keepkv.observe.redundancy import redundancy
from keepkv.score.decoding.gkv import GKV, NEVER, STAT
from keepkv.score.decoding.rkv import RKV

torch.set_num_threads(1)
F64, W = torch.float64, 4


def view_of(seed: int, slots: int = 18, queries: int = W, **options: Any) -> LayerView:
    """One row whose slots were never scored."""
    view = one_row(seed, slots=slots, queries=queries, **options)
    stats = {STAT: torch.full(view.slots.shape, NEVER, dtype=F64)}
    return replace(view, slots=view.slots.with_(stats=stats), state={})


def local_of(view: LayerView) -> Tensor:
    """Ŝ (H,S−W) by loops: mean over the last W queries of the larger of two query heads, as a share of its peak."""
    a = loop_weights(view)[0, :, -W:, :-W]  # (H*G,W,S−W)
    s = torch.stack([a[2 * h : 2 * h + 2].amax(0).mean(0) for h in range(len(a) // 2)])
    return s / s.amax(-1, keepdim=True)


def charges_of(keys: Tensor, threshold: float = 0.5) -> Tensor:
    """(S,) redundancy of keys (S,D), all pairs in float64."""
    k = keys.double()
    c = (k @ k.T) / (k.norm(dim=-1)[:, None] * k.norm(dim=-1))
    c.fill_diagonal_(0.0)
    for j in range(len(k)):
        near = [i for i in range(len(k)) if i != j and c[i, j] > threshold]
        if near:
            c[near[-1], j] = 0.0
    return (c.sum(1) / len(k)).softmax(0)


# --- redundancy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1 << 20, 40])
def test_redundancy_against_all_pairs(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redundant, "TILE", tile)
    monkeypatch.setattr(redundant, "ROWS", 2)
    views = [one_row(1, slots=17), one_row(2, slots=9), one_row(3, slots=1, queries=1)]
    got = redundancy(together(views), 0.3)
    for b, view in enumerate(views):
        size = view.slots.shape[2]
        assert (got[b, :, : 17 - size] == 0).all()
        for h in range(2):
            wanted = charges_of(view.slots.keys[0, h], 0.3)
            torch.testing.assert_close(got[b, h, 17 - size :], wanted, rtol=1e-9, atol=1e-12)
    scaled = views[0].slots.keys * torch.rand(17, 1, dtype=F64).add(0.1)
    again = redundancy(replace(views[0], slots=views[0].slots.with_(keys=scaled)), 0.3)
    torch.testing.assert_close(again, redundancy(views[0], 0.3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_three_equal_keys_the_newest_goes_free(dtype: torch.dtype) -> None:
    """Charged for 2, 1 and 0 pairs, old to new; of two neither is charged."""
    view = one_row(4, slots=5, queries=1)
    for count, charged in ((3, [2, 1, 0]), (2, [0, 0])):
        keys = torch.zeros(1, 2, 5, 8, dtype=dtype)
        keys[:, :, :count, 0] = 3.0
        for i in range(count, 5):
            keys[:, :, i, i] = 1.0
        got = redundancy(replace(view, slots=view.slots.with_(keys=keys)))
        wanted = torch.tensor([*charged, *[0] * (5 - count)], dtype=got.dtype).div(5).softmax(0)
        torch.testing.assert_close(got, wanted.expand(1, 2, 5), rtol=1e-5, atol=1e-6)


# --- G-KV --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
def test_first_scores_are_local_and_grouped_heads_are_taken_by_their_maximum(options: dict[str, Any]) -> None:
    view = view_of(5, **options)
    for mode in ("max", "mean", "sum"):
        got = GKV(window=W, mode=mode, lam=1.0)(view)[0]
        torch.testing.assert_close(got[:, :-W], local_of(view), rtol=1e-6, atol=1e-9)
        assert torch.equal(got[:, -W:], torch.ones(2, W, dtype=F64))
    assert (view.slots.stats[STAT] == NEVER).all(), "the view was modified"


@pytest.mark.parametrize("mode", ["max", "mean", "sum"])
@pytest.mark.parametrize("alpha", [0.8, 0.0])
def test_what_is_remembered_over_several_compressions(mode: str, alpha: float) -> None:
    """Tokens kept throughout: the decayed running maximum, mean or sum of Ŝ; alpha = 0 is the local score."""
    whole, score = view_of(6, slots=30, queries=30), GKV(window=W, alpha=alpha, mode=mode, lam=1.0)
    held = torch.arange(18)  # tokens in the cache
    stats = torch.full((1, 2, 18), NEVER, dtype=F64)
    history: list[dict[int, Tensor]] = []  # Ŝ of each compression by token
    for end in (18, 22, 26, 30):
        new = torch.arange(int(held[-1]) + 1, end)
        held = torch.cat((held, new))
        stats = torch.cat((stats, stats.new_full((1, 2, len(new)), NEVER)), -1)
        seen = part_of_queries(whole, end - W, end)
        s = seen.slots.map(lambda x: x[:, :, held])  # noqa: B023
        view = replace(seen, slots=s.with_(stats={STAT: stats}), state={})
        history.append(dict(zip(held[:-W].tolist(), local_of(view).unbind(-1), strict=True)))
        got, left = score(view)[0], view.memo[STAT]
        for j, token in enumerate(held[:-W].tolist()):
            past = [h[token] for h in history if token in h]
            ages = range(len(past) - 1, -1, -1)
            if mode == "max":
                wanted = torch.stack([alpha**n * x for n, x in zip(ages, past, strict=True)]).amax(0)
            elif mode == "sum":
                wanted = sum((alpha**n * x for n, x in zip(ages, past, strict=True)), torch.zeros(2, dtype=F64))
            else:
                wanted = past[0]
                for x in past[1:]:
                    wanted = alpha * wanted + (1 - alpha) * x
            torch.testing.assert_close(got[:, j], wanted, rtol=1e-6, atol=1e-9)
            assert torch.equal(left[0, :, j], got[:, j])
        assert (left[..., -W:] == NEVER).all()
        keep = torch.tensor([t % 5 != len(history) or t >= end - W for t in held.tolist()])
        held, stats = held[keep], left[..., keep]
    assert any(len([h for h in history if t in h]) == 4 for t in held.tolist())


def test_redundancy_is_mixed_in_behind_what_is_remembered() -> None:
    view = view_of(7)
    plain, mixed = GKV(window=W, lam=1.0)(view), GKV(window=W, lam=0.3)(view)
    assert torch.equal(view.memo[STAT][..., :-W], plain[..., :-W])
    share = redundancy(view)[..., :-W]
    wanted = 0.3 * plain[..., :-W] - 0.7 * share / share.amax(-1, keepdim=True)
    torch.testing.assert_close(mixed[..., :-W], wanted, rtol=1e-6, atol=1e-9)
    assert (mixed[..., -W:] == mixed.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("score", [GKV(window=W), RKV(window=W, kernel=3)], ids=["g-kv", "r-kv"])
def test_padded_rows_score_as_alone(score: Any) -> None:
    views = [view_of(8), view_of(9, slots=11), view_of(10, slots=5), view_of(11, slots=3, queries=3)]
    got = score(together(views))
    for b, view in enumerate(views):
        assert got[b].isfinite().all()
        torch.testing.assert_close(got[b, :, 18 - view.slots.shape[2] :], score(view)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("every", [3, 5])
def test_a_row_that_fits_is_not_scored(every: int) -> None:
    """What is stored for each row of a batch, and what it generates, is what it gives alone: a row that is not over
    its budget yet takes no part in the compressions of the others."""
    model, inputs = zoo.model("llama"), batch((40, 8))

    def run(feed: dict[str, Tensor]) -> tuple[Any, keepkv.Cache]:
        cache = keepkv.Cache(model, "g-kv", 16, window=W, sinks=2, when=keepkv.When(every=every))
        return generate(model, feed, cache, new=24).scores_, cache

    scores, cache = run(inputs)
    for i in range(2):
        alone, own = run(row(inputs, i))
        assert torch.allclose(alone[0], scores[i], atol=1e-5)
        for one, both in zip(own.compressible, cache.compressible, strict=True):
            a, b = one.store.view(), both.store.view()
            size = a.shape[2]
            assert torch.equal(a.positions[0], b.positions[i, :, -size:])
            torch.testing.assert_close(a.stats[STAT][0], b.stats[STAT][i, :, -size:], rtol=1e-4, atol=1e-5)
            assert (a.stats[STAT] > 0).any() and (a.stats[STAT][..., -1] == NEVER).all()


@pytest.mark.parametrize("method", ["g-kv", "r-kv"])
def test_a_protected_prompt_stays(method: str) -> None:
    model, when = zoo.model("llama"), keepkv.When(every=3)
    cache = keepkv.Cache(model, method, 24, window=W, when=when, spans=[Span(0, 12, "protect")])
    generate(model, row(batch(), 0), cache, new=20)
    assert cache.report().compressions > 3 * len(cache.compressible)
    for layer in range(len(cache.compressible)):
        kept = cache.kept_positions(layer)[0]
        assert all(set(range(12)) <= set(head.tolist()) for head in kept)
        assert (kept.diff(dim=-1) > 0).all()


# --- R-KV --------------------------------------------------------------------------------------------------------


def test_r_kv_equals_the_formula_of_its_code() -> None:
    """Largest logit of the group, window columns cut off, softmax, mean, max_pool1d; less redundancy."""
    view = one_row(12, slots=20, queries=8)
    view = replace(view, slots=view.slots.with_(log_votes=torch.zeros_like(view.slots.log_votes)), state={})
    grouped = view.queries[:, :, -W:].view(1, 2, 2, W, 8)
    logits = (grouped @ view.slots.keys[:, :, None].mT * view.scaling).amax(2)[..., :-W]
    attention = max_pool1d(logits.softmax(-1).mean(-2), 5, stride=1, padding=2)
    share = torch.stack([charges_of(k) for k in view.slots.keys[0]])[None, :, :-W]
    got = RKV(window=W, kernel=5, lam=0.2)(view)
    torch.testing.assert_close(got[..., :-W], 0.2 * attention - 0.8 * share, rtol=1e-6, atol=1e-9)
    score = RKV(window=W, kernel=5, lam=0.2)
    score.observe(view)
    late = replace(view, queries=view.queries[:, :, :0], query_positions=view.query_positions[:, :0])
    torch.testing.assert_close(score(late), got)


@pytest.mark.parametrize("method", ["g-kv", "r-kv", "kvzip"])
def test_no_graph_is_kept_where_gradients_are_on(method: str) -> None:
    cache = keepkv.Cache(zoo.model("llama"), method, 14, **({} if method == "kvzip" else {"window": W}))
    zoo.model("llama")(**row(batch(), 0), **{CACHE: cache})
    assert cache.report().compressed
    assert not any(x.requires_grad for layer in cache.compressible for x in layer.store.tensors().values())


@pytest.mark.parametrize("options", [{"window": 0}, {"alpha": 1.5}, {"mode": "median"}, {"lam": -0.1}])
def test_what_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError):
        GKV(**options)
    with pytest.raises(KeepKVError):
        RKV(kernel=4)
