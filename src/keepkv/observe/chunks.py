"""Runs of consecutive tokens of each row, and what their slots have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import Slots


def chunk_of(slots: Slots, size: int, first: int = 0) -> Tensor:
    """Which run of ``size`` tokens each slot lies in, counted from the token ``first`` on: (B,H,S) int64, −1 for slots
    before it and empty ones. Runs are of the text, so they stay where they are when some of their slots have left."""
    positions = slots.positions.long()
    return torch.where(positions >= first, (positions - first) // size, -1)


def per_chunk(x: Tensor, home: Tensor, how: str) -> Tensor:
    """The ``how`` ("amax", "amin" or "sum") of x (B,H,S,…) over the slots of each run, (B,H,R,…). Runs without slots
    hold ∓inf, or 0. ``home`` (B,H,S) is of ``chunk_of``. Sums are taken in float64 where the device has it."""
    if how != "sum" and (runs := _regular(home)) is not None:  # sums would be added in another order
        first, size = runs
        whole = first + (home.shape[2] - first) // size * size
        found = getattr(x[:, :, first:whole].unflatten(2, (-1, size)), how)(3)
        return found if whole == home.shape[2] else torch.cat((found, getattr(x[:, :, whole:], how)(2, True)), dim=2)
    start = {"amax": float("-inf"), "amin": float("inf"), "sum": 0.0}[how]
    if how == "sum" and x.device.type != "mps":
        x = x.double()
    out = x.new_full((*x.shape[:2], _count(home), *x.shape[3:]), start)
    inside = (home >= 0).view(*home.shape, *[1] * (x.dim() - 3))
    return out.scatter_reduce(2, _wide(home.clamp(min=0), x), x.masked_fill(~inside, start), how)


def at_chunk(table: Tensor, home: Tensor) -> Tensor:
    """``table`` (B,H,R,…) at the run of each slot, (B,H,S,…); that of the first or last run outside of all."""
    index = home.clamp(0, table.shape[2] - 1)
    if bool((home == home[:1, :1]).all()):  # whole rows are copied
        return table.index_select(2, index[0, 0])
    return table.gather(2, index.view(*index.shape, *[1] * (table.dim() - 3)).expand(*index.shape, *table.shape[3:]))


def rank_within(scores: Tensor, home: Tensor) -> Tensor:
    """How many slots of its run are better than each, (B,H,S) int64: higher scores are, and earlier ones of equals."""
    clean = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    order = clean.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, home.gather(-1, order).sort(dim=-1, stable=True).indices)
    runs = home.gather(-1, order).contiguous()
    rank = torch.arange(order.shape[-1], device=order.device) - torch.searchsorted(runs, runs)
    return torch.empty_like(order).scatter_(-1, order, rank)


def _regular(home: Tensor) -> tuple[int, int] | None:
    """Where the first run begins and how many slots each but the last has, if all rows and heads of ``home`` hold every
    token of the same runs; else None."""
    one = home[0, 0] if home.numel() else home.flatten()
    first, size = int((one < 0).sum()), int((one == 0).sum())
    if not size:
        return None
    runs = (torch.arange(len(one), device=one.device) - first).div(size, rounding_mode="floor").clamp_(min=-1)
    return (first, size) if torch.equal(home, runs.expand_as(home)) else None


def _count(home: Tensor) -> int:
    return max(1, int(home.max()) + 1) if home.numel() else 1


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index.view(*index.shape, *[1] * (x.dim() - 3)).expand_as(x)
