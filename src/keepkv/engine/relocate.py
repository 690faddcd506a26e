"""Slots that are held already get other rotary positions, and remember by how much; or those of some tokens go."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import Slots
from keepkv.core.tokens import KIND, MOVED, TEXT, steps_of
from keepkv.engine.layer import Layer
from keepkv.engine.view import view_of
from keepkv.errors import KeepKVError
from keepkv.methods.apply import close_gaps


def relocate(layer: Layer, by: Tensor) -> None:
    """Turn the keys of ``layer`` ``by`` (B,H,S) int64 further in time, as ``times_of`` orders them. Nothing appended
    before can be taken back afterwards."""
    view, rope = view_of(layer), layer.info.rope
    close_gaps(view)
    slots = view.slots
    if rope is None or MOVED not in slots.stats:
        raise KeepKVError(f"layer {layer.info.index} cannot be turned: its score keeps no {MOVED!r} statistic")
    kinds = torch.zeros_like(by) if view.tokens is None else view.tokens.of(slots.positions)[..., KIND]
    wide = torch.promote_types(slots.keys.dtype, torch.float32)
    keys = rope.turn(slots.keys.to(wide), steps_of(by, kinds, rope.axes)).to(slots.keys.dtype)
    stats = {**slots.stats, MOVED: slots.stats[MOVED] + by.to(torch.float32)}
    _hold(layer, slots.with_(keys=keys, stats=stats))


def drop(layer: Layer, first: int, last: int) -> None:
    """Free the slots of tokens ``first`` to ``last`` − 1 of every row. Nothing appended before can be taken back
    afterwards."""
    view = view_of(layer)
    at = view.slots.positions
    _hold(layer, view.slots.select((at < first) | (at >= last)))


def _hold(layer: Layer, slots: Slots) -> None:
    store = layer.store.successor()
    store.load(layer.form.stored(slots))
    layer.store, layer.progress.compressed, layer.progress.settled = store, True, layer.progress.seen


def times_of(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Of the slots of ``layer``, empty ones first: where each stands in time now, which are vision, and their tokens;
    (B,H,S) each, −1 for no token."""
    view = view_of(layer)
    close_gaps(view)
    places, positions = view.key_places(), view.slots.positions
    vision = torch.zeros_like(positions, dtype=torch.bool)
    if view.tokens is not None:
        vision = view.slots.valid & (view.tokens.of(positions)[..., KIND] != TEXT)
    return (places if places.shape == positions.shape else places[..., 0]).long(), vision, positions
