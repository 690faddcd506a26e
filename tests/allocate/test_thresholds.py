"""Budgets from a threshold, and from composite tokens, against loops; thresholds in caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from running import batch, generate, row
from score_views import row as one_row
from score_views import together
from torch import Tensor

import keepkv
from keepkv.allocate import AdaKV, Composite, Threshold
from keepkv.core.slots import LayerView
from keepkv.engine.versions import CACHE


def views(seed: int) -> LayerView:
    view = together([one_row(seed), one_row(seed + 1, slots=9)])
    must = torch.rand(view.slots.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    view.protected = must & view.slots.valid
    return view


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), limit=st.floats(-1, 1), budget=st.integers(1, 16))
def test_threshold_counts_what_passes_within_the_budget(seed: int, limit: float, budget: int) -> None:
    view = views(seed)
    scores = torch.randn(view.slots.shape, generator=torch.Generator().manual_seed(seed))
    asked = torch.tensor([budget, budget])
    got, within = Threshold(threshold=limit)(scores, view, asked), AdaKV(0.0)(scores, view, asked)
    for b in range(2):
        for h in range(2):
            live = [s for s in range(14) if view.slots.valid[b, h, s]]
            passed = sum(bool(view.protected[b, h, s]) or float(scores[b, h, s]) >= limit for s in live)  # type: ignore[index]
            wanted = min(passed, int(within[b, h])) if budget < int(view.seen[b]) else int(within[b, h])
            assert int(got[b, h]) == wanted


def composite(scores: list[Tensor], tiers: list[Tensor], budgets: list[int]) -> list[int]:
    """Counts per layer of one row, by taking composite tokens one after another."""
    heads = [x.shape[0] for x in scores]
    left, taken, ranked = sum(b * h for b, h in zip(budgets, heads, strict=True)), [0] * len(scores), []
    for layer, (score, tier) in enumerate(zip(scores, tiers, strict=True)):
        best = []
        for one, kind in zip(score.tolist(), tier.tolist(), strict=True):
            best.append(
                sorted((float("inf") if k == 2 else x for x, k in zip(one, kind, strict=True) if k), reverse=True)
            )
        for r in range(min(map(len, best))):
            ranked.append((sum(x[r] for x in best) / len(best), layer))
    for _, layer in sorted(ranked, key=lambda x: -x[0]):
        if left < heads[layer]:
            break
        left, taken[layer] = left - heads[layer], taken[layer] + 1
    return taken


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), budgets=st.lists(st.integers(3, 12), min_size=3, max_size=3))
def test_composite_tokens_share_the_budget_of_all_layers(seed: int, budgets: list[int]) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = [torch.randn(1, heads, slots, generator=rng) for heads, slots in ((2, 12), (2, 12), (2, 9))]
    tiers = [torch.ones_like(x, dtype=torch.long) for x in scores]
    for tier in tiers:
        tier[..., :2] = 2
    found = Composite().across(scores, tiers, [torch.tensor([b]) for b in budgets])
    wanted = composite([x[0] for x in scores], [x[0] for x in tiers], budgets)
    assert [x.tolist() for x in found] == [[[n, n]] for n in wanted]
    assert sum(wanted) == min(sum(budgets), 33)


def test_every_head_of_a_layer_keeps_as_many_and_not_the_same() -> None:
    model, inputs = zoo.model("llama"), batch((41, 23))
    cache = keepkv.Cache(model, "kvcompose", 14, when=keepkv.When("deferred"), sinks=2)
    generate(model, inputs, cache, new=2)
    kept = cache.report().kept
    assert all(len(set(heads)) == 1 for layer in kept.values() for heads in layer)
    assert len({layer[0][0] for layer in kept.values()}) > 1
    first = cache.kept_positions(0)[0]
    assert not torch.equal(first[0], first[1])


def kept(cache: keepkv.Cache) -> list[list[list[int]]]:
    """Positions by layer and head of the first row."""
    return [[[p for p in head if p >= 0] for head in cache.kept_positions(i.info.index)[0].tolist()]
            for i in cache.compressible]  # fmt: skip


@pytest.mark.parametrize("every", [None, 1, 4])
def test_a_token_leaves_once_it_is_older_than_the_window(every: int | None) -> None:
    """What is kept is what a loop over tokens keeps, prompt and reply, whatever share of the budget it is."""
    model, ids = zoo.model("llama"), row(batch(), 0)["input_ids"]
    options: dict[str, Any] = {"score": "knorm", "threshold": -2.2, "window": 6, "sinks": 2}
    for budget in (0.99, 58):
        cache = keepkv.Cache(model, "dms", budget, when=keepkv.When(every=every), **options)
        generate(model, {"input_ids": ids}, cache, new=9)
        plain = keepkv.Cache(model, "full")
        with torch.no_grad():
            model(ids, **{CACHE: plain})
        norms = -plain.compressible[0].store.view().keys[0].norm(dim=-1)  # (H,61)
        # Eight tokens of the reply are fed, and a compression that falls due waits for the next.
        seen = 61 if every is None else 61 + 7 // every * every
        for head in range(2):
            wanted = [p for p in range(61) if p < 2 or p >= seen - 6 or float(norms[head, p]) >= -2.2]
            assert [p for p in kept(cache)[0][head] if p < 61] == wanted and 8 < len(wanted) < 58
    assert cache.report().ratio < 0.99


def test_a_budget_that_holds_every_token_keeps_them() -> None:
    model, inputs = zoo.model("llama"), row(batch(), 0)
    for budget in (1.0, 80):
        cache = keepkv.Cache(model, "dms", budget, score="knorm", threshold=1e9, window=4)
        generate(model, inputs, cache, new=4)
        assert not cache.report().compressed


def test_a_smaller_budget_is_a_bound() -> None:
    model, inputs = zoo.model("llama"), row(batch(), 0)
    cache = keepkv.Cache(model, "dms", 20, score="knorm", threshold=-1e9, window=4)
    generate(model, inputs, cache, new=1)
    assert [sum(map(sum, layer)) for layer in cache.report().kept.values()] == [40, 40, 40]
