"""One compression of one layer: look at the slots, score, allocate, reduce, store, and keep count."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keepkv.allocate.select import keep_mask
from keepkv.attention import latent
from keepkv.errors import BudgetError
from keepkv.reduce.base import Reduced
from keepkv.score.attention import weights
from keepkv.slots import LayerView, Slots
from keepkv.spans.keep import keep_by_span, needed, trim

if TYPE_CHECKING:
    from keepkv.layer import Layer


@dataclass
class Tally:
    """What happened to a layer's slots so far, for the receipt. Tensors (B,H), or None before a compression."""

    compressions: int = 0
    overflows: int = 0  # compressions whose budget did not hold what spans demand
    seconds: float = 0.0
    merged: Tensor | None = None
    dropped: Tensor | None = None
    votes_dropped: Tensor | None = None  # tokens that the dropped slots stood for
    mass_dropped: Tensor | None = None  # (B,) share of the last query's attention given up, summed; None: unknown


def look(layer: Layer, query: Tensor | None = None, live: bool = False) -> LayerView:
    """What the pieces see of ``layer``.

    query (B,Hq,T,D): of the latest forward, None when it is over. live: the view that statistics are updated
    through, see ``Store.live_view``.
    """
    slots = layer.store.live_view() if live else layer.store.view()
    if layer.place.is_latent:
        slots = latent.absorbed_slots(slots)
    plan, clock = layer.plan, layer.plan.clock
    assert clock.seen is not None and clock.positions is not None and layer.attention is not None
    if query is None:
        query = slots.keys.new_zeros(slots.keys.shape[0], layer.query_heads, 0, slots.keys.shape[-1])
    protected = _pins(layer, slots)
    if plan.spans is not None:
        protected |= slots.valid & plan.spans.protects(slots.positions)
    return LayerView(
        slots=slots,
        queries=query,
        query_positions=clock.positions[:, clock.positions.shape[1] - query.shape[2] :],
        seen=clock.seen,
        state=layer.state,
        rope=layer.place.rope,
        layer=layer.place.rank,
        layers=layer.place.ranks,
        seed=plan.seed,
        protected=protected,
        spans=plan.spans.groups.fair if plan.spans is not None and plan.scopes else None,
        **layer.attention,
    )


def compress(layer: Layer, query: Tensor | None = None) -> bool:
    """Bring ``layer`` within its budget; returns False, and changes nothing, where every row fits it already."""
    started = time.perf_counter()
    view, method = look(layer, query), layer.plan.method
    budget, spans = layer.plan.layer_budget(layer), layer.plan.spans
    over = _overflow(layer, view, budget) if spans is not None and spans.demanding else None
    if over is not None and spans is not None and spans.policy.on_overflow == "grow":
        budget = budget.maximum(over)
    full = (view.slots.lengths > budget[:, None]).any(-1)
    if not bool(full.any()):
        return False
    if bool((view.slots.valid[..., :-1] & ~view.slots.valid[..., 1:]).any()):
        # Padding between turns: close the gaps first, so that neighbours in memory are neighbours in the text.
        view.slots, view.protected = _close_gaps(view.slots, view.protected)
    scores = method.score(view)
    if spans is None:
        keep = keep_mask(scores, method.allocate(scores, view, budget), view)
    else:
        if over is not None and spans.policy.on_overflow == "trim":
            view.protected = trim(scores, budget, view, _pins(layer, view.slots))
        counts, own = method.allocate(scores, view, budget), scores
        scores = own if view.spans is None else method.score.span_scores(view, own)
        keep = keep_by_span(scores, counts, view, spans, own)
    _settle(view, full)
    reduced = method.reduce(view, keep, scores, method.score)
    _count(layer.tally, view, reduced)
    del view, keep, scores  # what was held before is freed by load
    layer.store.load(latent.stored_slots(reduced.slots) if layer.place.is_latent else reduced.slots)
    layer.tally.compressions += 1
    layer.tally.seconds += time.perf_counter() - started
    return True


def _pins(layer: Layer, slots: Slots) -> Tensor:
    """(B,H,S) bool: sinks and recent window of the method."""
    method, seen = layer.plan.method, layer.plan.clock.seen
    assert seen is not None
    recent = (seen - method.window)[:, None, None]
    return slots.valid & ((slots.positions < method.sinks) | (slots.positions >= recent))


def _overflow(layer: Layer, view: LayerView, budget: Tensor) -> Tensor | None:
    """(B,) int64: slots per head that the spans of each row need, or None where the budget (B,) holds them.

    Raises where the spans say so. Sinks and window alone may exceed a budget, as they may without spans.
    """
    spans = layer.plan.spans
    assert spans is not None
    need, lengths = needed(view, spans), view.slots.lengths.amax(-1)
    over = (need > budget) & (need > _pins(layer, view.slots).sum(-1).amax(-1)) & (lengths > budget)
    if not bool(over.any()):
        return None
    row = int(over.int().argmax())
    said = (
        f"layer {layer.place.index}, row {row}: protected spans, min_keep, sinks and window need {int(need[row])} "
        f"slots per head, the budget ({layer.plan.budget}) holds {int(budget[row])}"
    )
    if spans.policy.on_overflow == "error":
        raise BudgetError(
            f"{said}. Give a larger budget, protect less, or choose SpanPolicy(on_overflow='grow') or 'trim'. Call "
            "cache.reset() before using the cache again."
        )
    layer.tally.overflows += 1
    if spans.policy.on_overflow == "trim":
        warnings.warn(f"{said}; protected tokens were given up", stacklevel=2)
    return torch.where(over, need, 0)


def _settle(view: LayerView, rows: Tensor) -> None:
    """Take over the statistics that the score left in ``view.memo``, for ``rows`` (B,) bool: a row that fits its budget
    would not have been scored if it were alone."""
    stats = view.slots.stats
    left = {name: view.memo[name].detach().to(x.dtype) for name, x in stats.items() if name in view.memo}
    if left:
        new = {name: torch.where(rows[:, None, None], x, stats[name]) for name, x in left.items()}
        view.slots = view.slots.with_(stats={**stats, **new})


def _count(tally: Tally, view: LayerView, reduced: Reduced) -> None:
    tally.merged = reduced.merged if tally.merged is None else tally.merged + reduced.merged
    tally.dropped = reduced.dropped if tally.dropped is None else tally.dropped + reduced.dropped
    votes = (view.slots.log_votes.double().exp() * reduced.lost).sum(-1)
    tally.votes_dropped = votes if tally.votes_dropped is None else tally.votes_dropped + votes
    if view.queries.shape[2]:
        share = weights(view, view.queries[:, :, -1:], view.query_positions[:, -1:])[:, :, :, 0].mean(2)
        mass = (share * reduced.lost).sum(-1).mean(-1)
        tally.mass_dropped = mass if tally.mass_dropped is None else tally.mass_dropped + mass


def _close_gaps(slots: Slots, protected: Tensor | None) -> tuple[Slots, Tensor | None]:
    if protected is not None:
        slots = slots.with_(stats={**slots.stats, "_protected": protected.float()})
    slots = slots.select(slots.valid)
    stats = dict(slots.stats)
    protected = stats.pop("_protected").bool() & slots.valid if protected is not None else None
    return slots.with_(stats=stats), protected
