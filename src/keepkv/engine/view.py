"""What the pieces see of one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.engine import latent

if TYPE_CHECKING:
    from keepkv.engine.layer import Layer


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
    protected = pins(layer, slots)
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
        scaling=layer.attention["scaling"],
        softcap=layer.attention["softcap"],
        sink_logits=layer.attention["sinks"],
    )


def pins(layer: Layer, slots: Slots) -> Tensor:
    """(B,H,S) bool: sinks and recent window of the method."""
    method, seen = layer.plan.method, layer.plan.clock.seen
    assert seen is not None
    recent = (seen - method.window)[:, None, None]
    return slots.valid & ((slots.positions < method.sinks) | (slots.positions >= recent))


def close_gaps(view: LayerView) -> None:
    """Padding between turns: move empty slots to the front, so that neighbours in memory are neighbours in the text."""
    valid = view.slots.valid
    if bool((valid[..., :-1] & ~valid[..., 1:]).any()):
        view.slots, view.protected = _closed(view.slots, view.protected)


def _closed(slots: Slots, protected: Tensor | None) -> tuple[Slots, Tensor | None]:
    if protected is not None:
        slots = slots.with_(stats={**slots.stats, "_protected": protected.float()})
    slots = slots.select(slots.valid)
    stats = dict(slots.stats)
    protected = stats.pop("_protected").bool() & slots.valid if protected is not None else None
    return slots.with_(stats=stats), protected
