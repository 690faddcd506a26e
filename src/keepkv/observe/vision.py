"""What the vision slots of a view are: their time steps and cells, and which of them are recent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.core.tokens import CELL, FACTS, KIND, STEP, TEXT


@dataclass(frozen=True)
class Sight:
    """Of a view. vision (B,H,S) bool; steps, cells (B,H,S) int64, cells −1 where a slot is no vision.

    newest, size (B,1,1) int64: the last step of a row and the cells that it has, −1 and 0 where a row has seen nothing.
    room (B,1,1) int64: vision slots of a head that its budget leaves, beside all text. width (B,1,1) int64: cells of a
    step side by side: what M-RoPE tells, else the side of a square, else all of them.
    """

    vision: Tensor
    steps: Tensor
    cells: Tensor
    newest: Tensor
    size: Tensor
    room: Tensor
    width: Tensor

    def recent(self, share: float) -> Tensor:
        """(B,H,S) bool: vision of the newest steps, as many as ``share`` of the room holds whole, at least one."""
        count = (share * self.room / self.size.clamp(min=1) + 1e-9).floor().long().clamp(min=1)
        return self.vision & (self.steps > self.newest - count)


def sight(view: LayerView) -> Sight:
    """What is seen in ``view``; everything is text where nothing is known of its tokens."""
    slots, valid = view.slots, view.slots.valid
    if view.tokens is None:
        none = torch.zeros_like(slots.positions, dtype=torch.int64)
        one, budget = none[:, :1, :1], _budget(view)
        room = (budget - valid.sum(-1).amax(-1)).clamp(min=0)[:, None, None]
        return Sight(none > 0, none - 1, none - 1, one - 1, one, room, one + 1)
    facts = view.tokens.of(slots.positions).long()
    vision = valid & (facts[..., KIND] != TEXT)
    steps = facts[..., STEP]
    cells = facts[..., CELL].masked_fill(~vision, -1)
    newest = steps.masked_fill(~vision, -1).amax((1, 2), keepdim=True)
    last = vision & (steps == newest)
    size = (cells.masked_fill(~last, -1) + 1).amax((1, 2), keepdim=True)
    text = (valid & ~vision).sum(-1).amax(-1)
    width = _side(size)
    if view.tokens.axes > 1:
        columns = facts[..., -FACTS - 1]
        high = columns.masked_fill(~last, -1).amax((1, 2), keepdim=True)
        low = columns.masked_fill(~last, torch.iinfo(torch.int32).max).amin((1, 2), keepdim=True)
        width = torch.where(high >= 0, high - low + 1, 1)
    room = (_budget(view) - text).clamp(min=0)[:, None, None]
    return Sight(vision, steps, cells, newest, size, room, width)


def ranked(scores: Tensor, among: Tensor) -> Tensor:
    """(B,H,S) float32 in [0, 1): the rank of ``scores`` (B,H,S) ``among`` some slots, larger is higher; equal scores by
    age. 0 elsewhere."""
    lowest = torch.finfo(torch.float32).min
    clean = scores.float().nan_to_num(nan=lowest, posinf=-lowest, neginf=lowest).masked_fill(~among, float("-inf"))
    order = clean.sort(dim=-1, stable=True).indices
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place).float()
    return (rank / max(1, order.shape[-1])).masked_fill(~among, 0.0)


def _side(size: Tensor) -> Tensor:
    side = size.double().sqrt().round().long()
    return torch.where(side * side == size, side, size).clamp(min=1)


def _budget(view: LayerView) -> Tensor:
    if view.budget is not None:
        return view.budget
    return torch.full_like(view.seen, view.slots.shape[2])
