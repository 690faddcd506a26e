"""Compressions of a cache's layers: what is due is scored, shares its budget, is reduced and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.engine.state import CacheState, Compressible
from keepkv.engine.view import view_of
from keepkv.methods import apply


@dataclass
class _Due:
    """A layer that is to be compressed, and its budget (B,). view: freed between scoring and reducing where several
    layers share a budget and it is a copy."""

    layer: Compressible
    budget: Tensor
    view: LayerView | None = None
    scored: apply.Scored | None = None


def compress(layer: Compressible, query: Tensor | None = None, rows: Tensor | None = None) -> None:
    """Compress ``layer`` now if a row holds more than its budget; where layers share one, it waits for the others until
    ``compress_waiting``.

    query (B,Hq,T,D): of the latest forward, where it has just ended. rows (B,) bool: only these; None: all.
    """
    shared = layer.shared
    layer.listen()
    if not shared.settings.method.allocate.joint:
        _compress_together([layer], query, rows)
    elif layer not in shared.waiting:
        shared.waiting.append(layer)


def compress_waiting(shared: CacheState, rows: Tensor | None = None) -> None:
    """Compress the layers that wait for each other."""
    layers, shared.waiting = shared.waiting, []
    if layers:
        _compress_together(layers, None, rows)


def layer_budget(layer: Compressible) -> Tensor:
    """(B,) int64: slots per KV head that ``layer`` may hold on average now, at least 1."""
    info, shared = layer.info, layer.shared
    settings, seen = shared.settings, shared.positions.seen
    assert seen is not None
    content, beside, plain = layer.store.slot_bytes()
    sliding = plain * settings.sliding_tokens * len(seen)  # what transformers keeps of layers with a sliding window
    mean = settings.budget.per_head(seen, (content + beside) * info.ranks, sliding)
    # Every layer holds the protected spans: what layers divide among themselves is the rest.
    held = 0 if shared.spans is None else shared.spans.protected_tokens(seen)
    mine = settings.method.allocate.layer_budget(mean - held, info.rank, info.ranks, seen - held).floor().long() + held
    # Where every token fits, no layer gives any up, however the allocation slopes.
    return mine.clamp_min(1).where(mean < seen, seen)


def _compress_together(layers: Sequence[Compressible], query: Tensor | None, rows: Tensor | None) -> None:
    """Bring ``layers`` within their budgets. Where that raises they are still due."""
    _run(layers, query, rows)
    for layer in layers:
        layer.progress.pending = False
        layer.progress.settled = layer.progress.seen


def _run(layers: Sequence[Compressible], query: Tensor | None, rows: Tensor | None) -> None:
    """Nothing is changed where every row fits already."""
    shared = layers[0].shared
    started, method, spans = shared.clock(), shared.settings.method, shared.spans
    due = [_due(layer, rows) for layer in layers]
    over = apply.over_budget([x.layer.store.lengths for x in due], [x.budget for x in due])
    if not bool(over.any()):
        return
    for one in due:
        one.view = view_of(one.layer, query)
        one.scored = apply.score(method, one.view, one.budget, spans)
        if len(due) > 1 and not one.layer.store.views_share_memory:
            one.view = None
    views = [] if method.allocate.joint else [_view(x) for x in due]
    counts = apply.share(method, [_scored(x) for x in due], views, [x.budget for x in due])
    del views
    for wanted in counts:
        _reduce(due.pop(0), wanted, over)
    for layer in layers:
        layer.tally.seconds += (shared.clock() - started) / len(layers)


def _due(layer: Compressible, rows: Tensor | None) -> _Due:
    shared, budget = layer.shared, layer_budget(layer)
    if rows is not None:  # the others keep what they hold
        budget = budget.where(rows, budget.maximum(layer.store.lengths.amax(-1)))
    if shared.spans is not None and shared.spans.demanding:
        name = f"layer {layer.info.index}"
        budget, over = apply.demanded(shared.settings.method, view_of(layer), budget, shared.spans, name)
        layer.tally.overflows += over
    return _Due(layer, budget)


def _scored(one: _Due) -> apply.Scored:
    assert one.scored is not None
    return one.scored


def _view(one: _Due) -> LayerView:
    """The view that was scored, or its like."""
    if one.view is None:
        one.view = view_of(one.layer)
        apply.close_gaps(one.view)
        one.view.protected, one.view.memo = _scored(one).protected, _scored(one).memo
    return one.view


def _reduce(one: _Due, counts: Tensor, over: Tensor) -> None:
    """Keep ``counts`` (B,H) slots of each head; ``over`` (B,) bool: rows that are over their budget. Ends ``one``.

    What the layer holds, counts and remembers changes in one step: an interrupt leaves all the old or all the new.
    """
    layer, view, method = one.layer, _view(one), one.layer.shared.settings.method
    keep, scores = apply.choose(method, view, _scored(one), counts, layer.shared.spans)
    apply.take_stats(view, over)
    view.state = state = dict(view.state)  # the reduction may set entries
    form, tally = layer.form, replace(layer.tally)
    one.view = one.scored = None
    if method.reduce.drops:
        tally.count(view, None, view.slots.valid & ~keep)
        slots = form.stored(view.slots)
        del view, scores
        # No rectangle in between: it is as wide as the fullest head, which may hold everything.
        store = layer.store.successor()
        store.load_kept(slots, keep & slots.valid)
    else:
        reduced = method.reduce(view, keep, scores, method.score)
        tally.count(view, reduced.merged, reduced.lost)
        del view, scores, keep
        store = layer.store.successor()
        store.load(form.stored(reduced.slots))
    layer.store, layer.tally, layer.score_state, layer.progress.compressed = store, tally, state, True
