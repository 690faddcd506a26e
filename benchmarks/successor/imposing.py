"""Caches that hold what ``oracle.py`` says: slots, values and votes that are given, or rounded to int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fidelity import Reference, compare
from plan import FEW
from torch import Tensor

from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.state import slot_bytes
from keepkv.evaluation.asking import Encoded, read
from keepkv.evaluation.setup import Setup, Unit
from keepkv.evaluation.unit import compressed, look_again, make_cache
from keepkv.methods import METHODS
from keepkv.store import STORES
from keepkv.store.packed import RESIDUAL

FLOATS = {"float32": 4, "bfloat16": 2}  # bytes of a number in the cache that int8 is compared with
Record = dict[str, Any]


def impose(cache: Cache, votes: Tensor, values: Tensor | None = None) -> Cache:
    """A copy of ``cache`` that holds the slots with ``votes`` (L,H,S) alone."""
    twin = cache.copy()
    layers: Any = twin.layers
    for i, layer in enumerate(layers):
        slots = layer.store.view()
        if values is not None:
            slots = slots.with_(values=values[i][None].to(slots.values.dtype), log_votes=votes[i][None].log().float())
        layer.store.load(slots.select(votes[i][None] > 0))
        layer.compressed = True
    return twin


def compress_to(model: Any, setup: Setup, unit: Unit, item: Encoded, budgets: Sequence[Any]) -> Iterator[Cache]:
    """The context within each of ``budgets`` by the unit's method."""
    cache = make_cache(model, setup, unit.variant, 1.0, unit.draw, When("deferred"))
    read(model, cache, [item.context])
    look_again(model, cache, [item.context])
    for budget in budgets:
        yield compressed(cache, unit, budget)


def choice_of(model: Any, setup: Setup, unit: Unit, item: Encoded) -> dict[float, Tensor]:
    """(L,H,S) bool by budget: the slots that the unit's method keeps."""
    found, budgets = {}, [*FEW, *(budget / 2 for budget in FEW)]
    for budget, twin in zip(budgets, compress_to(model, setup, unit, item, budgets), strict=True):
        places = [twin.kept_positions(i)[0].long() for i in range(len(twin.layers))]
        kept = [torch.zeros(len(x), len(item.context) + 1).scatter_(-1, x + 1, 1.0)[:, 1:].bool() for x in places]
        found[budget] = torch.stack(kept)
    return found


def packed(model: Any, setup: Setup, unit: Unit, item: Encoded, full: Reference) -> Iterator[Record]:
    """int8: as many slots as have the bytes that each budget means in a cache of larger numbers."""
    whole = Cache(model, METHODS.build(unit.variant.method, **unit.variant.options), 1.0)
    mask = read(model, whole, [item.context])
    first: Any = whole.layers[0]
    heads, width = first.store.view().keys.shape[1::2]
    extra = slot_bytes(first)[1] // heads
    for name, size in FLOATS.items():
        plain, small = 2 * width * size, 2 * (width + size) + extra
        rest = (len(item.context) * budget * plain - RESIDUAL * (plain + extra) for budget in FEW)
        slots = [RESIDUAL + int(max(0.0, left) / small) for left in rest]
        for budget, twin in zip(FEW, compress_to(model, setup, unit, item, slots), strict=True):
            layers: Any = twin.layers
            for layer in layers:
                store = STORES.build("int8", stats=layer.store.stats)
                store.load(layer.store.view())
                layer.store.load(store.view())
            rows = compare(model, twin, mask, 1, full, budget)
            yield from ({"method": f"{unit.variant.label}, int8 of {name}", "budget": budget} | row for row in rows)
