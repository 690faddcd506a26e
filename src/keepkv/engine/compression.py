"""Compressions of a cache's layers: what is due is scored, shares its budget, is reduced and stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.engine.allowance import check, check_buffers, check_prompt, exceeds, layer_budget
from keepkv.engine.state import CacheState, Compressible
from keepkv.engine.view import view_of
from keepkv.errors import KeepKVError
from keepkv.methods import Method, apply


@dataclass
class _Due:
    """A layer that is to be compressed. allowed (B,): its budget; budget (B,): with what spans demand beyond it;
    overflow: whether they do. view: freed between scoring and reducing where several layers share a budget and it is a
    copy."""

    layer: Compressible
    allowed: Tensor
    budget: Tensor
    overflow: bool
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


def end_prompt(layers: Sequence[Compressible]) -> None:
    """Say that the prompt of ``layers`` ends here, and all are to be compressed.

    Raises what compressing one of them would, before any is: a refusal midway would leave a cache that is half
    compressed. Changes nothing then.
    """
    before = [layer.progress.prefilling for layer in layers]
    try:
        for layer in layers:
            layer.progress.prefilling = False
        for layer in layers:
            _check(_due(layer, None, quiet=True))
    except KeepKVError:
        for layer, prefilling in zip(layers, before, strict=True):
            layer.progress.prefilling = prefilling
        raise


def _check(one: _Due) -> None:
    """Raise what compressing this layer would."""
    layer, method = one.layer, one.layer.shared.settings.method
    over = _over(method, [one])
    if bool(over.any()):
        check(layer, one.allowed, over)
        if method.score.observes:
            apply.check_seen(method, view_of(layer), one.budget)


def compress_waiting(shared: CacheState, rows: Tensor | None = None) -> None:
    """Compress the layers that wait for each other."""
    layers, shared.waiting = shared.waiting, []
    if layers:
        _compress_together(layers, None, rows)


def _compress_together(layers: Sequence[Compressible], query: Tensor | None, rows: Tensor | None) -> None:
    """Bring ``layers`` within their budgets. Where that raises they are still due."""
    _run(layers, query, rows)
    for layer in layers:
        layer.progress.pending = False
        layer.progress.settled = layer.progress.seen


def _run(layers: Sequence[Compressible], query: Tensor | None, rows: Tensor | None) -> None:
    """Slots stay as they are where every row fits already."""
    shared = layers[0].shared
    started, method, spans = shared.clock(), shared.settings.method, shared.spans
    due = [_due(layer, rows) for layer in layers]
    for one in due:
        one.layer.tally.overflows += one.overflow
    over = _over(method, due)
    if not bool(over.any()):
        for one in due:
            _encode(one.layer)
        return
    for one in due:
        check(one.layer, one.allowed, over)
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


def _over(method: Method, due: Sequence[_Due]) -> Tensor:
    """(B,) bool: rows that are to be compressed."""
    seen = due[0].layer.shared.positions.seen
    assert seen is not None
    return apply.over_budget(method, [x.layer.store.lengths for x in due], [x.budget for x in due], seen)


def _due(layer: Compressible, rows: Tensor | None, quiet: bool = False) -> _Due:
    check_buffers(layer)
    shared, allowed = layer.shared, layer_budget(layer)
    check_prompt(layer)
    if rows is not None:  # the others keep what they hold
        allowed = allowed.where(rows, allowed.maximum(layer.store.lengths.amax(-1)))
    budget, over = allowed, False
    if shared.spans is not None and shared.spans.demanding:
        name = f"layer {layer.info.index}"
        budget, over = apply.demanded(shared.settings.method, view_of(layer), budget, shared.spans, name, quiet)
    return _Due(layer, allowed, budget, over)


def _encode(layer: Compressible) -> None:
    """Every token fits, provided that it is encoded: those that are still exact are, where bytes are scarce."""
    if layer.store.held.codec.exact is None or not exceeds(layer):
        return
    layer.store.after_prefill()
    if exceeds(layer):
        store = layer.store.successor()
        store.load(layer.store.view())
        layer.store = store


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
        gone = view.slots.valid & ~keep
        tally.count(view, None, gone)
        tell = _telling(layer, view, gone)
        slots = form.stored(view.slots)
        del view, scores
        # No rectangle in between: it is as wide as the fullest head, which may hold everything.
        store = layer.store.successor()
        store.load_kept(slots, keep & slots.valid)
        tell()
    else:
        reduced = apply.reduce(method, view, keep, scores)
        tally.count(view, reduced.merged, reduced.lost)
        del view, scores, keep
        store = layer.store.successor()
        store.load(form.stored(reduced.slots))
    layer.store, layer.tally, layer.score_state, layer.progress.compressed = store, tally, state, True


def _telling(layer: Compressible, view: LayerView, gone: Tensor) -> Callable[[], None]:
    """What tells who records this cache, if anybody does, that the slots of ``view`` leave where ``gone`` (B,H,S) bool;
    to be called once they have. Positions are copied: what takes the place of a store may lie in the same memory."""
    recorder = layer.shared.recorder
    if recorder is None:
        return lambda: None
    return partial(recorder.left, layer.info.index, view.slots.positions.clone(), gone, view.seen)
