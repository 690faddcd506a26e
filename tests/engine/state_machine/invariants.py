"""What is true of a cache after every step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from histories import History, tokens
from torch import Tensor
from worlds import BUDGET, World

import keepkv
from keepkv.engine.layer import Layer
from keepkv.store.base import Held, Store
from keepkv.store.canary import Canary

HOST = 64  # bytes of a layer that are numbers of the host, which a receipt counts and nobody allocates


def check(cache: keepkv.Cache, histories: list[History]) -> None:
    """Everything below."""
    assert cache.seen.tolist() == [len(tokens(x)) for x in histories], "seen"
    assert cache.get_seq_length() >= max((len(tokens(x)) for x in histories), default=0)
    for layer in cache.compressible:
        _check_slots(layer, cache.seen)
    if not any(isinstance(layer.store, Canary) for layer in cache.compressible):  # whose hashes weigh something too
        _check_bytes(cache)


def _check_slots(layer: Layer, seen: Tensor) -> None:
    if not layer.is_initialized:
        return
    slots = layer.store.view()
    valid = slots.valid
    assert torch.equal(layer.store.lengths, valid.sum(-1)), "lengths are those of the view"
    for name in ("keys", "values", "log_votes"):
        assert torch.isfinite(getattr(slots, name)[valid]).all(), f"{name} of layer {layer.info.index} are finite"
    late = slots.positions >= seen[:, None, None]
    assert not late.any(), f"layer {layer.info.index} holds tokens that its row has not seen"
    ordered = slots.positions.masked_fill(~valid, -1).sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    assert not twice.any(), f"layer {layer.info.index} holds a token twice"
    tally = layer.tally
    if tally.merged is not None and tally.dropped is not None and layer.shared.settings.method.name != "reskv":
        counted = valid.sum(-1) + tally.merged + tally.dropped
        assert (counted == seen[:, None]).all(), f"layer {layer.info.index}: slots + merged + dropped are not tokens"


def check_budget(world: World, cache: keepkv.Cache) -> None:
    """Right after a compression of everything: no more slots than the budget, on average over layers and heads."""
    if world.method == "full" or world.spans:
        return
    held = torch.cat([layer.store.lengths for layer in cache.compressible], dim=1).double().mean(1)
    assert (held <= BUDGET + 1e-9).all(), f"{held.tolist()} slots per head, the budget is {BUDGET}"


def _check_bytes(cache: keepkv.Cache) -> None:
    """A receipt counts what is allocated, neither more nor less."""
    found: dict[int, int] = {}
    for layer in cache.layers:
        held = (_real(layer.store), layer.score_state, layer.latest) if isinstance(layer, Layer) else vars(layer)
        _storages(held, found)
    counted, allocated = cache.report().bytes, sum(found.values())
    assert abs(counted - allocated) <= HOST * len(cache.layers), f"receipt of {counted} bytes for {allocated}"


def _real(store: Store) -> Store:
    """The store that a canary watches over."""
    return getattr(store, "inner", store)


def _storages(x: Any, found: dict[int, int]) -> None:
    """Bytes of every storage that ``x`` leads to, by address."""
    if isinstance(x, Tensor):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    elif isinstance(x, dict):
        for y in x.values():
            _storages(y, found)
    elif isinstance(x, tuple | list):
        for y in x:
            _storages(y, found)
    elif hasattr(x, "__dict__") and not isinstance(x, Held | type):
        _storages(vars(x), found)


def heard(cache: keepkv.Cache) -> dict[str, Any]:
    """The snapshot of a cache whose score has seen what it has still to see: when, makes no difference."""
    twin = cache.copy()
    for layer in twin.compressible:
        layer.listen()
    return snapshot(twin)


def changed(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names in which two snapshots differ."""
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def snapshot(cache: keepkv.Cache) -> dict[str, Any]:
    """Everything that a cache holds, as plain data: two are equal if nothing has changed."""
    shared, taken = cache.shared, {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, Layer):
            latest = {} if layer.latest is None else {"latest": layer.latest.query}
            held = {**layer.store.tensors(), **layer.score_state, **layer.tally.tensors(), **latest}
            taken[f"{i}.progress"] = {
                **asdict(layer.progress),
                "heard": layer.heard,
                "prefilling": None,
            }  # says what runs now
        else:
            held = {name: x for name, x in vars(layer).items() if isinstance(x, Tensor)}
            taken[f"{i}.progress"] = getattr(layer, "cumulative_length", None)
        taken |= {f"{i}.{name}": (x.dtype, x.shape, x.float().nan_to_num().tolist()) for name, x in held.items()}
    seen, gaps = shared.positions.seen, shared.positions.gaps
    clock = [None if seen is None else seen.tolist(), shared.positions.columns, bool(gaps), shared.decoded]
    spans = None if shared.spans is None else {n: x.tolist() for n, x in shared.spans.tensors().items()}
    return {**taken, "clock": repr(clock), "spans": spans, "compressing": shared.compressing}
