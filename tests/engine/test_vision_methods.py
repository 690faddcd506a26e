"""Every method on models that see: tokens of the plain cache at budget 1, and rows of a batch as they are alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import METHODS, calibration, compresses, sampled
from torch import Tensor

import keepkv
from helpers import vision_zoo as zoo
from keepkv.core.tokens import KIND, TEXT
from keepkv.engine.passes.again import look_again
from keepkv.engine.places import text_places
from keepkv.engine.versions import CACHE
from keepkv.engine.view import view_of

FAMILIES = ["qwen2-vl", "llava", "qwen3-vl", "internvl", "llava-onevision", "llava-next-video"]
BUDGET = 20
Method = tuple[str, dict[str, Any]]


def made(model: Any, method: Method, budget: Any) -> keepkv.Cache:
    """A cache that compresses when it is told to."""
    cache = keepkv.Cache(model, method[0], budget, calibration=calibration(method, model), **method[1])
    return cache.copy(when=keepkv.When("deferred"))


def read(model: Any, cache: keepkv.Cache, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (B,4,V) of four tokens behind a prompt that was compressed."""
    with torch.no_grad():
        mask = inputs["attention_mask"]
        # As ``generate`` has them: a model with M-RoPE finds its own, others would count padding.
        places = {} if "mm_token_type_ids" in inputs else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        model(**inputs, **places, **{CACHE: cache}, logits_to_keep=1)
        look_again(model, cache, inputs["input_ids"], inputs["attention_mask"])
        cache.compress()
        cache.compressing = False
        found, ids = [], torch.full((len(inputs["input_ids"]), 1), 7)
        for _ in range(4):
            mask = cache.attention_mask(1)
            places = text_places(cache, mask, 1)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=places, **{CACHE: cache}).logits[:, -1]
            found.append(logits)
            ids = logits.argmax(-1, keepdim=True)
    return torch.stack(found, 1)


@pytest.mark.parametrize(("name", "method"), sampled(len(FAMILIES), FAMILIES, METHODS))
def test_every_method_serves_what_has_images(name: str, method: Method) -> None:
    model = zoo.model(name)
    rows = [zoo.prompt(name, 3, "titt"), zoo.prompt(name, 4, "tit")]
    together = zoo.batch(name, rows)
    plain = read(model, made(model, ("full", {}), 1.0), together)
    torch.testing.assert_close(read(model, made(model, method, 1.0), together), plain, atol=1e-5, rtol=1e-4)
    if not compresses(method):
        return
    cache = made(model, method, BUDGET)
    found = read(model, cache, together)
    report = cache.report()
    assert report.compressed and bool(found.isfinite().all())
    for i, row in enumerate(rows):
        alone = read(model, made(model, method, BUDGET), row)
        torch.testing.assert_close(alone[0], found[i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_vision_is_known_after_three_compressions(name: str) -> None:
    """Heads that hold different tokens each know which of theirs are vision, and where these stood."""
    model, inputs = zoo.model(name), zoo.prompt(name, 5, "titit")
    cache = keepkv.Cache(model, "adakv", 0.8, score="keydiff", window=2, sinks=1).copy(when=keepkv.When("deferred"))
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, logits_to_keep=1)
    told = cache.shared.positions.known
    assert told is not None
    before = told.of(torch.arange(len(ids))[None])[0]
    for budget in (0.8, 0.6, 0.4):
        cache.compress(budget=budget)
        for layer in cache.compressible:
            view = view_of(layer)
            assert view.tokens is not None
            held = view.slots.valid
            at = view.slots.positions[held].long()
            assert torch.equal(view.tokens.of(view.slots.positions)[held], before[at])
            assert torch.equal(before[at][:, KIND] != TEXT, ids[at] == zoo.IMAGE)
    assert len({int(n) for layer in cache.compressible for n in layer.store.lengths[0]}) > 1
