"""Spans through whole models: who keeps how much, whatever the method, the batch, the schedule and the store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import keepkv
import zoo
from keepkv import Span, SpanPolicy
from matrix import METHODS, compresses
from running import batch, generate

LENGTHS = (61, 50, 41)
X, Y, LAW = Span(3, 15, name="X"), Span(15, 40, name="Y"), Span(5, 9, "protect", name="law")


def kept(cache: keepkv.Cache) -> list[torch.Tensor]:
    """(B,H,S) positions of each layer."""
    return [cache.kept_positions(layer.place.index) for layer in cache._ours]


def inside(positions: torch.Tensor, span: Span) -> torch.Tensor:
    """(B,H): tokens of a span that are held."""
    return ((positions >= span.start) & (positions < span.end)).sum(-1)


@pytest.mark.parametrize("method", METHODS)
def test_lambda_zero_is_the_method_itself(method: tuple[str, dict[str, Any]]) -> None:
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    plain = keepkv.Cache(model, method[0], 20, **method[1])
    spans = keepkv.Cache(model, method[0], 20, spans=SpanPolicy([X, Y], fair_lambda=0), **method[1])
    outs = [generate(model, inputs, cache).scores_ for cache in (plain, spans)]
    assert torch.equal(*outs) and all(map(torch.equal, kept(plain), kept(spans)))


@pytest.mark.parametrize("method", [m for m in METHODS if compresses(m.values[0])])
@pytest.mark.parametrize("scoring", ["span", "global"])
def test_protected_tokens_stay_and_totals_do_not_change(method: tuple[str, dict[str, Any]], scoring: str) -> None:
    """In every layer and head, and an allocation over layers or heads keeps as many slots as before."""
    model, inputs = zoo.model("llama"), batch(LENGTHS)
    plain = keepkv.Cache(model, method[0], 20, **method[1])
    spans = keepkv.Cache(model, method[0], 20, spans=SpanPolicy([X, Y, LAW], scoring=scoring), **method[1])
    for cache in (plain, spans):
        generate(model, inputs, cache, new=2)
    assert all(bool((inside(x, LAW) == 4).all()) for x in kept(spans))
    totals = [[sum(map(sum, heads)) for heads in cache.report().kept.values()] for cache in (plain, spans)]
    assert sum(totals[0]) == sum(totals[1])
    if method[0] != "pyramidkv":  # what the layers slope over is what is not protected
        assert totals[0] == totals[1]
