"""One compression of one layer: look at the slots, score, allocate, reduce, store, and keep count."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from keepkv.allocate.select import keep_mask
from keepkv.attention import latent
from keepkv.reduce.base import Reduced
from keepkv.score.attention import weights
from keepkv.slots import LayerView, Slots

if TYPE_CHECKING:
    from keepkv.layer import Layer


@dataclass
class Tally:
    """What happened to a layer's slots so far, for the receipt. Tensors (B,H), or None before a compression."""

    compressions: int = 0
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
    recent = (clock.seen - plan.method.window)[:, None, None]
    protected = slots.valid & ((slots.positions < plan.method.sinks) | (slots.positions >= recent))
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
        **layer.attention,
    )


def compress(layer: Layer, query: Tensor | None = None) -> bool:
    """Bring ``layer`` within its budget; returns False, and changes nothing, where every row fits it already."""
    started = time.perf_counter()
    view, method = look(layer, query), layer.plan.method
    budget = layer.plan.layer_budget(layer)
    if not bool((view.slots.lengths > budget[:, None]).any()):
        return False
    if bool((view.slots.valid[..., :-1] & ~view.slots.valid[..., 1:]).any()):
        # Padding between turns: close the gaps first, so that neighbours in memory are neighbours in the text.
        view.slots, view.protected = _close_gaps(view.slots, view.protected)
    scores = method.score(view)
    keep = keep_mask(scores, method.allocate(scores, view, budget), view)
    reduced = method.reduce(view, keep, scores, method.score)
    _count(layer.tally, view, reduced)
    del view, keep, scores  # what was held before is freed by load
    layer.store.load(latent.stored_slots(reduced.slots) if layer.place.is_latent else reduced.slots)
    layer.tally.compressions += 1
    layer.tally.seconds += time.perf_counter() - started
    return True


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
