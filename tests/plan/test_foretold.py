"""Bytes of caches, said beforehand: those of the receipt, over architectures, methods, stores and codecs."""

from __future__ import annotations

from functools import cache
from typing import Any

import matrix
import pytest
import torch
import zoo

import keepkv
from keepkv.core.budget import Budget
from keepkv.engine.state import Settings
from keepkv.engine.versions import CACHE
from keepkv.methods import make_method
from keepkv.plan.estimate import Choice, Compressed, Full
from keepkv.plan.network import Network
from keepkv.store import CODECS, Held, choose

CONTEXT = 80
METHODS = [("snapkv", matrix.SMALL), ("keepkv", matrix.SMALL), ("full", {})]
MORE = [("pyramidkv", matrix.SMALL), ("h2o", matrix.SMALL), ("snapkv", {**matrix.SMALL, "when": keepkv.When(every=4)})]
CASES = matrix.sampled(len(METHODS), list(zoo.ZOO), [pytest.param(m, id=m[0]) for m in METHODS])
CASES += [pytest.param("gemma3", m, id=f"gemma3-{m[0]}-{len(m[1])}") for m in MORE]
CASES += matrix.sampled(24, matrix.STORE_ARCHITECTURES, matrix.store_variants())


@cache
def network(arch: str) -> Network:
    return Network(zoo.model(arch).config, torch.float32)


def estimate(arch: str, method: tuple[str, dict[str, Any]], budget: Any) -> Compressed:
    options = dict(method[1])
    store, codec, more, own = (
        options.pop(name, x)
        for name, x in (("store", None), ("codec", "none"), ("store_options", {}), ("codec_options", {}))
    )
    chosen = make_method(method[0], options)
    settings = Settings(chosen, Budget.of(budget))
    layout, codec = choose(store or chosen.store, codec, chosen.allocate.ragged)
    held = Held(settings.stats, chosen.reduce.merges, CODECS.build(codec, **own), settings.room)
    known = matrix.calibration(method, zoo.model(arch)) if codec in matrix.CALIBRATED else None
    choice = Choice(settings, layout, more, held, () if known is None else (known,))
    return Compressed(network(arch), zoo.model(arch).config, choice, CONTEXT)


def read(arch: str, method: tuple[str, dict[str, Any]], budget: Any, batch: int) -> keepkv.Cache:
    made = matrix.cache(arch, method, budget)
    ids = torch.randint(2, zoo.VOCAB, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        zoo.model(arch)(input_ids=ids, **{CACHE: made})
        if method[0] != "full":
            made.compress()  # and what the score remembers is let go, as before the first token of a reply
        if made.layout == "static":
            zoo.model(arch)(input_ids=ids[:, :1], **{CACHE: made})  # which moves slots into their buffers
    return made


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_a_cache_weighs_what_was_said(arch: str, method: tuple[str, dict[str, Any]]) -> None:
    for batch in (1, 2):
        made = read(arch, method, 0.3, batch)
        compare(made, estimate(arch, method, 0.3).held(CONTEXT, batch), Full(network(arch)).held(CONTEXT, batch))


def compare(made: keepkv.Cache, found: int, full: int) -> None:
    receipt = made.report()
    if "exact_first" in made.store_options:  # as many are counted as may be exact, and of these some were dropped
        assert 0.9 * found <= receipt.bytes <= 1.01 * found
    elif made.layout == "ragged" or made.compressible[0].store.groups[0]:  # tiles and groups are counted at their most
        assert receipt.bytes <= found
    elif made.settings.method.reduce.merges:  # so are votes: a layer in which nothing merged has none
        votes = sum(4 * n for layer in receipt.kept.values() for row in layer for n in row)
        assert found - votes <= receipt.bytes <= found
    else:
        assert receipt.bytes == found
    if made.layout != "static":
        assert receipt.full_bytes == full


@pytest.mark.parametrize("budget", [24, 0.11, "24KiB"])
def test_budgets_of_every_kind(budget: Any) -> None:
    method = ("snapkv", matrix.SMALL)
    found = estimate("llama", method, budget).held(CONTEXT, 1)
    assert found == read("llama", method, budget, 1).report().bytes
    if isinstance(budget, str):
        assert found <= Budget.of(budget).bytes < 1.2 * found


def test_a_budget_that_cannot_hold_what_is_always_kept() -> None:
    with pytest.raises(keepkv.KeepKVError, match="always keeps"):
        estimate("llama", ("snapkv", matrix.SMALL), "1KiB").held(CONTEXT, 1)


@pytest.mark.parametrize("arch", zoo.ZOO)
def test_weights(arch: str) -> None:
    model = zoo.model(arch)
    assert network(arch).weights == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
