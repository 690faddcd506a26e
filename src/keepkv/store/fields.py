"""Fields of slots as a rectangle (B,H,S,…): parts, zones and choices of them."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.slots import EMPTY, Slots
from keepkv.store.codec.base import Fields
from keepkv.store.content import moved
from keepkv.store.older import Zone


def exact_part(fields: Fields) -> Part:
    """A rectangle of fields that no codec wrote."""
    return Part(fields["keys"], fields["values"], fields.get("log_votes"), fields["positions"])


def within(fields: Fields, which: Tensor) -> Fields:
    """The slots of a rectangle of fields where ``which`` (B,H,S), as few columns as hold them."""
    columns = which.any((0, 1)).nonzero()[:, 0]
    taken = {name: x.index_select(2, columns) for name, x in fields.items()}
    taken["positions"] = taken["positions"].masked_fill(~which.index_select(2, columns), EMPTY)
    return taken


def zone_of(fields: Fields) -> Zone:
    """A rectangle of fields."""

    def tile(start: int, stop: int) -> Fields:
        return {name: x[:, :, start:stop] for name, x in fields.items()}

    return Zone(fields["positions"].shape[2], tile, lambda columns: moved(fields, columns))


def chosen(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``one`` (B,H or 1,S,·) where ``which`` (B,H or 1,S), else ``other``."""
    which = which[:, : one.shape[1]]
    return torch.where(which if one.dim() == 3 else which[..., None], one, other)


def beside(fields: Fields) -> Fields:
    """Those of ``fields`` that are no content."""
    return {name: x for name, x in fields.items() if name not in ("keys", "values")}


def fields_of(slots: Slots) -> dict[str, Tensor]:
    """The fields of ``slots``; votes only where a slot has any."""
    fields = {"keys": slots.keys, "values": slots.values, "positions": slots.positions, **slots.stats}
    return {**fields, "log_votes": slots.log_votes} if bool(slots.log_votes.any()) else fields
