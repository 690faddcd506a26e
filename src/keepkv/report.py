"""Making the receipt of a cache: measured on the storage it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keepkv.layer import Layer
from keepkv.receipt import Receipt, SpanReceipt
from keepkv.spans.rates import keep_rates

if TYPE_CHECKING:
    from keepkv.cache import Cache
    from keepkv.plan import Plan


def make_receipt(cache: Cache) -> Receipt:
    """The receipt of ``cache`` as it stands."""
    plan, ours = cache.plan, [x for x in cache.layers if isinstance(x, Layer)]
    used = [x for x in ours if x.is_initialized and x.seen]
    tallies = [x.tally for x in used]
    masses = [t.mass_dropped for t in tallies if t.mass_dropped is not None]
    seen = plan.clock.seen
    return Receipt(
        method=plan.method.name,
        options=dict(plan.method.options),
        budget=plan.budget.value,
        compressed=any(t.compressions for t in tallies),
        seen=[] if seen is None else seen.tolist(),
        kept={x.place.index: x.store.view().lengths.tolist() for x in used},
        bytes=sum(map(layer_bytes, cache.layers)),
        full_bytes=sum(map(full_bytes, cache.layers)),
        merged=sum(int(t.merged.sum()) for t in tallies if t.merged is not None),
        dropped=sum(int(t.dropped.sum()) for t in tallies if t.dropped is not None),
        mass_dropped=float(torch.stack(masses).mean()) if masses else None,
        largest_vote=max([1.0, *(_largest_vote(x) for x in used)]),
        compressions=sum(t.compressions for t in tallies),
        seconds=sum(t.seconds for t in tallies),
        spans=_span_receipt(plan, used),
    )


def _span_receipt(plan: Plan, used: list[Layer]) -> SpanReceipt | None:
    spans, seen = plan.spans, plan.clock.seen
    if spans is None:
        return None
    rates, requested, realised = {}, 1.0, 1.0
    if seen is not None and used:
        positions = [x.store.view().positions for x in used]
        rates = keep_rates(spans, positions, seen)
        tokens = max(1, len(used) * int(seen.sum()))
        requested = sum(int(plan.layer_budget(x).minimum(seen).sum()) for x in used) / tokens
        realised = sum(float((x >= 0).sum()) / x.shape[1] for x in positions) / tokens
    scoring, overflows = "span" if plan.scopes else "global", sum(x.tally.overflows for x in used)
    return SpanReceipt(rates, spans.policy.fair_lambda, scoring, requested, realised, overflows)


def _largest_vote(layer: Layer) -> float:
    slots = layer.store.view()
    return float(slots.log_votes[slots.valid].max().exp()) if bool(slots.valid.any()) else 1.0


def layer_bytes(layer: Any) -> int:
    """Bytes of storage that a cache layer of any kind holds."""
    if isinstance(layer, Layer):
        return layer.store.nbytes + _storage(list(layer.state.values()))
    return _storage(_tensors(vars(layer)))


def full_bytes(layer: Any) -> int:
    """Bytes that a plain cache holds for the same tokens; layers that stay stock weigh the same in both."""
    if not isinstance(layer, Layer):
        return layer_bytes(layer)
    if not layer.is_initialized:
        return 0
    part = layer.part()
    rows, heads = part.positions.shape[:2]
    width = part.keys.shape[-1] + part.values.shape[-1]
    return rows * heads * layer.seen * width * torch.empty((), dtype=layer.dtype).element_size()


def _tensors(values: dict[Any, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            found.append(value)
        elif isinstance(value, dict):
            found += _tensors(value)
    return found


def _storage(tensors: list[Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
