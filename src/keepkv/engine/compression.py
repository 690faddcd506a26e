"""Compressions: look at the slots, score, allocate, reduce, store, and keep count."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keepkv.allocate.select import keep_mask, tiers
from keepkv.core.slots import LayerView
from keepkv.engine import latent
from keepkv.engine.view import close_gaps, look, pins
from keepkv.errors import BudgetError
from keepkv.observe.attention import weights
from keepkv.spans.select import keep_by_span, needed, trim

if TYPE_CHECKING:
    from keepkv.engine.layer import Layer


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


@dataclass
class _Due:
    """A layer that is to be compressed. budget (B,): slots per KV head. over (B,): slots per head that its spans need
    beyond it. The rest is known once it is scored. view: None where it was let go, so that of several layers nothing is
    held but scores (B,H,S), tier (B,H,S), and what a second view would not know by itself."""

    layer: Layer
    budget: Tensor
    over: Tensor | None
    view: LayerView | None = None
    scores: Tensor = field(init=False)
    tier: Tensor = field(init=False)
    protected: Tensor | None = None
    memo: dict[str, Tensor] = field(default_factory=dict)


def compress(layers: Sequence[Layer], query: Tensor | None = None) -> bool:
    """Bring ``layers`` within their budgets; returns False, and changes nothing, where every row fits already.

    query (B,Hq,T,D): of the latest forward, where one layer is compressed right after its attention. Several layers:
    those of a cache whose allocation is joint. All are scored, then they share what there is, then each is reduced.
    """
    started, allocate = time.perf_counter(), layers[0].plan.method.allocate
    due = [_due(layer) for layer in layers]
    full = torch.stack([(x.layer.store.lengths > x.budget[:, None]).any(-1) for x in due]).any(0)
    if not bool(full.any()):
        return False
    for one in due:
        _score(one, query)
        if len(due) > 1 and not one.layer.store.views_share_memory:
            one.view = None  # it is a copy
    if allocate.joint:
        shares = allocate.across([x.scores for x in due], [x.tier for x in due], [x.budget for x in due])
    else:
        shares = [allocate(x.scores, _view(x), x.budget) for x in due]
    for counts in shares:
        _reduce(due.pop(0), counts, full)
    for layer in layers:
        layer.tally.seconds += (time.perf_counter() - started) / len(layers)
    return True


def _due(layer: Layer) -> _Due:
    budget, spans = layer.plan.layer_budget(layer), layer.plan.spans
    if spans is None or not spans.demanding:
        return _Due(layer, budget, None)
    over = _overflow(layer, look(layer), budget)
    grow = over is not None and spans.policy.on_overflow == "grow"
    return _Due(layer, budget.maximum(over) if grow and over is not None else budget, over)


def _score(one: _Due, query: Tensor | None) -> None:
    layer = one.layer
    view, spans = look(layer, query), layer.plan.spans
    view.budget = one.budget
    close_gaps(view)
    one.scores = layer.plan.method.score(view)
    if spans is not None and one.over is not None and spans.policy.on_overflow == "trim":
        view.protected = trim(one.scores, one.budget, view, pins(layer, view.slots))
    one.view, one.tier, one.protected, one.memo = view, tiers(view), view.protected, view.memo


def _view(one: _Due) -> LayerView:
    """The view that was scored, or its like."""
    if one.view is not None:
        return one.view
    view = look(one.layer)
    close_gaps(view)
    view.protected, view.memo = one.protected, one.memo
    return view


def _reduce(one: _Due, counts: Tensor, full: Tensor) -> None:
    """Keep ``counts`` (B,H) slots of each head; ``full`` (B,) bool: rows that are over their budget. Ends ``one``."""
    layer, view, scores = one.layer, _view(one), one.scores
    method, spans = layer.plan.method, layer.plan.spans
    if spans is None:
        keep = keep_mask(scores, counts, view)
    else:
        scores = one.scores if view.spans is None else method.score.span_scores(view, one.scores)
        keep = keep_by_span(scores, counts, view, spans, one.scores)
    _settle(view, full)
    if method.reduce.drops and not layer.place.is_latent:
        lost = view.slots.valid & ~keep
        _count(layer.tally, view, None, lost)
        one.view, slots = None, view.slots
        del view, scores  # what was held before is freed by load
        # No rectangle in between: it is as wide as the fullest head, which may hold everything.
        layer.store.load_kept(slots, keep & slots.valid)
    else:
        reduced = method.reduce(view, keep, scores, method.score)
        _count(layer.tally, view, reduced.merged, reduced.lost)
        one.view = None
        del view, keep, scores
        layer.store.load(latent.stored_slots(reduced.slots) if layer.place.is_latent else reduced.slots)
    layer.tally.compressions += 1


def _overflow(layer: Layer, view: LayerView, budget: Tensor) -> Tensor | None:
    """(B,) int64: slots per head that the spans of each row need, or None where the budget (B,) holds them.

    Raises where the spans say so. Sinks and window alone may exceed a budget, as they may without spans.
    """
    spans = layer.plan.spans
    assert spans is not None
    need, lengths = needed(view, spans), view.slots.lengths.amax(-1)
    over = (need > budget) & (need > pins(layer, view.slots).sum(-1).amax(-1)) & (lengths > budget)
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


def _count(tally: Tally, view: LayerView, merged: Tensor | None, lost: Tensor) -> None:
    """merged (B,H): slots that entered another, None: none; lost (B,H,S) bool: those that left."""
    dropped = lost.sum(-1)
    merged = torch.zeros_like(dropped) if merged is None else merged
    tally.merged = merged if tally.merged is None else tally.merged + merged
    tally.dropped = dropped if tally.dropped is None else tally.dropped + dropped
    votes = (view.slots.log_votes.double().exp() * lost).sum(-1)
    tally.votes_dropped = votes if tally.votes_dropped is None else tally.votes_dropped + votes
    if view.queries.shape[2]:
        share = weights(view, view.queries[:, :, -1:], view.query_positions[:, -1:])[:, :, :, 0].mean(2)
        mass = (share * lost).sum(-1).mean(-1)
        tally.mass_dropped = mass if tally.mass_dropped is None else tally.mass_dropped + mass
