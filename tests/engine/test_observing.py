"""Scores that follow every decoded token take its attention from the pass that computed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from running import batch, generate
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv.core.slots import LayerView
from keepkv.core.when import When
from keepkv.engine.layer import Layer

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

    def watched(layer: Layer, query: Tensor, weights: Tensor | None) -> None:
        given.append(weights is not None)
        observe(layer, query, weights)

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
    monkeypatch.setattr(Layer, "_observe", lambda layer, query, weights: seen.append(weights))
    model = zoo.model("llama")
    for method in ("snapkv", "h2o"):  # the second does not compress again while decoding
        generate(model, batch((30, 17)), keepkv.Cache(model, method, 16, sinks=2, window=4), new=4)
    assert torch.tensor([x is None for x in seen]).all()
