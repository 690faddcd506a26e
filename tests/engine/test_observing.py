"""Observing: scores that follow decoding take attention from the pass that computed it; others read no key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from allocations import allocated
from running import batch, generate
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv.core.slots import LayerView
from keepkv.core.when import When
from keepkv.engine.layer import Latest, Layer
from keepkv.engine.versions import CACHE

EVERY = When(prefill="deferred", every=4)


def decoded(arch: str, method: str, store: str) -> tuple[Any, list[dict[str, Tensor]]]:
    model = zoo.model(arch)
    name, _, score = method.partition(":")
    options = {"score": score} if score else {}
    cache = keepkv.Cache(model, name, 16, sinks=2, window=4, when=EVERY, store=store, **options)
    out = generate(model, batch((30, 17)), cache, new=11)
    return out.scores_, [layer.store.view().stats for layer in cache.compressible]


@pytest.mark.parametrize("store", ["dense", "static", "int8"])
@pytest.mark.parametrize(
    "arch, method",  # grouped heads, latents, sinks
    [("llama", "h2o"), ("llama", "keepkv:ema"), ("deepseek-v3", "h2o"), ("gpt-oss", "h2o"), ("gpt-oss", "keepkv:ema")],
)
def test_the_same_statistics_as_from_the_keys(
    arch: str, method: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    observe = Layer._observe

    def watched(layer: Layer, latest: Latest, count: int) -> None:
        given.append(latest.weights is not None)
        observe(layer, latest, count)

    monkeypatch.setattr(Layer, "_observe", watched)
    logits, stats = decoded(arch, method, store)
    assert any(given)
    given.clear()
    monkeypatch.setattr(Layer, "_follows", lambda layer: False)
    again, expected = decoded(arch, method, store)
    assert given and not any(given)
    assert_close(logits, again, rtol=1e-4, atol=1e-4)
    for one, two in zip(stats, expected, strict=True):
        assert one.keys() == two.keys() and one
        for key in one:
            assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_weights_are_not_asked_for_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LayerView] = []
    monkeypatch.setattr(Layer, "_observe", lambda layer, latest, count: seen.append(latest.weights))
    model = zoo.model("llama")
    for method in ("snapkv", "h2o"):  # the second does not compress again while decoding
        generate(model, batch((30, 17)), keepkv.Cache(model, method, 16, sinks=2, window=4), new=4)
    assert torch.tensor([x is None for x in seen]).all()


@pytest.mark.parametrize("options", [{}, {"codec": "int8"}, {"store": "ragged"}], ids=["auto", "int8", "ragged"])
@pytest.mark.parametrize(
    "method", ["snapkv", "adakv", "keepkv2", "g-kv", "r-kv", "tova", "keepkv", "expected-attention"]
)
def test_remembering_a_query_costs_the_same_whatever_is_held(method: str, options: dict[str, Any]) -> None:
    """What a score remembers of a decoded token is a query: no key is gathered or decoded for it."""
    spent = []
    for tokens in (96, 768):
        model = zoo.model("llama")
        cache = keepkv.Cache(model, method, tokens // 2, when=When(every=64), **options)
        with torch.no_grad():
            model(input_ids=torch.randint(3, zoo.VOCAB, (1, tokens)), **{CACHE: cache})
            model(input_ids=torch.tensor([[5]]), **{CACHE: cache})
            layer = cache.compressible[0]
            assert cache.report().compressed and int(layer.store.lengths.sum()) > 2 * tokens // 3
            query = torch.randn(1, 4, 1, layer.store.view().keys.shape[-1])
            spent.append(allocated(lambda layer=layer, query=query: layer._observe(Latest(query, None), 1)))  # type: ignore[misc]
    assert 0 < spent[0] == spent[1]


@pytest.mark.parametrize("options", [{}, {"codec": "int8"}], ids=["ragged", "int8"])
def test_scores_that_look_at_slots_still_can(options: dict[str, Any]) -> None:
    """The same check is not blind: what needs every key gathers them, and grows."""
    spent = []
    for tokens in (96, 768):
        model = zoo.model("llama")
        cache = keepkv.Cache(model, "kvzip", tokens // 2, when=When(every=64), **options)
        with torch.no_grad():
            model(input_ids=torch.randint(3, zoo.VOCAB, (1, tokens)), **{CACHE: cache})
            model(input_ids=torch.tensor([[5]]), **{CACHE: cache})
            layer = cache.compressible[0]
            query = torch.randn(1, 4, 1, layer.store.view().keys.shape[-1])
            spent.append(allocated(lambda layer=layer, query=query: layer._observe(Latest(query, None), 1)))  # type: ignore[misc]
    assert spent[1] > 4 * spent[0]
