"""Runs of consecutive tokens of each row, and what their slots have in common."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from keepkv.core.pick import pick
from keepkv.core.slots import Slots


def chunk_of(slots: Slots, size: int, first: int = 0) -> Tensor:
    """Which run of ``size`` tokens each slot lies in, counted from the token ``first`` on: (B,H,S) int64, −1 for slots
    before it and empty ones. Runs are of the text, so they stay where they are when some of their slots have left."""
    positions = slots.positions.long()
    return torch.where(positions >= first, (positions - first) // size, -1)


class Runs:
    """Slots by their runs, of which ``home`` (B,H,S) is what ``chunk_of`` returns.

    Where all rows and heads hold every token of the same runs, as of a prompt that is read at once, runs are
    ``regular``: slots are read where they are, and nothing is sorted.
    """

    def __init__(self, home: Tensor) -> None:
        self.home = home

    @cached_property
    def count(self) -> int:
        """R: how many runs there are, at least one."""
        return max(1, int(self.home.max()) + 1) if self.home.numel() else 1

    @cached_property
    def regular(self) -> tuple[int, int] | None:
        """Where the first run begins and how many slots each but the last has; None where runs are not regular."""
        one = self.home[0, 0] if self.home.numel() else self.home.flatten()
        first, size = int((one < 0).sum()), int((one == 0).sum())
        if not size:
            return None
        runs = (torch.arange(len(one), device=one.device) - first).div(size, rounding_mode="floor").clamp_(min=-1)
        return (first, size) if torch.equal(self.home, runs.expand_as(self.home)) else None

    def of_head(self, head: int) -> Runs:
        """Those of one head, (B,1,S)."""
        part = Runs(self.home[:, head : head + 1])
        if self.regular is not None:
            part.count, part.regular = self.count, self.regular
        return part

    def per(self, x: Tensor, how: str) -> Tensor:
        """The ``how`` ("amax", "amin" or "sum") of x (B,H,S,…) over the slots of each run, (B,H,R,…). Runs without
        slots hold ∓inf, or 0. Sums are taken in float64 where the device has it."""
        if how == "sum" and x.device.type != "mps":
            x = x.double()
        if self.regular is not None:
            return torch.cat([getattr(part, how)(3) for part in self._parts(x)[1:]], dim=2)
        start = {"amax": float("-inf"), "amin": float("inf"), "sum": 0.0}[how]
        out = x.new_full((*x.shape[:2], self.count, *x.shape[3:]), start)
        inside, into = (t.view(*t.shape, *[1] * (x.dim() - 3)) for t in (self.home >= 0, self.home.clamp(min=0)))
        return out.scatter_reduce(2, into.expand_as(x), x.masked_fill(~inside, start), how)

    def at(self, table: Tensor, ahead: int = 0) -> Tensor:
        """``table`` (B,H,R,…) at the run of each slot, or so many runs ``ahead``: (B,H,S,…); that of the first or last
        run outside of all."""
        last = table.shape[2] - 1
        if self.regular is None:
            return pick(table, (self.home + ahead).clamp_(0, last))
        out, run = table.new_empty(*table.shape[:2], self.home.shape[2], *table.shape[3:]), ahead - 1
        for part in self._parts(out):
            runs = torch.arange(run, run + part.shape[2], device=out.device).clamp_(0, last)
            part.copy_(table.index_select(2, runs)[:, :, :, None])
            run += part.shape[2]
        return out

    def ranks(self, scores: Tensor) -> Tensor:
        """How many slots of its run are better than each, (B,H,S) int64: higher ``scores`` (B,H,S) are, and earlier
        ones of equals."""
        if self.regular is not None:
            return torch.cat([ranked(part).flatten(2) for part in self._parts(scores)], dim=2)
        order = _descending(scores)
        order = order.gather(-1, self.home.gather(-1, order).sort(dim=-1, stable=True).indices)
        runs = self.home.gather(-1, order).contiguous()
        rank = torch.arange(order.shape[-1], device=order.device) - torch.searchsorted(runs, runs)
        return torch.empty_like(order).scatter_(-1, order, rank)

    def _parts(self, x: Tensor) -> list[Tensor]:
        """x (B,H,S,…) as (B,H,N,n,…), of regular runs: what is before all, those that are whole, the last if it is
        not."""
        assert self.regular is not None
        first, size = self.regular
        whole = first + (x.shape[2] - first) // size * size
        rest = [x[:, :, None, whole:]] if whole < x.shape[2] else []
        return [x[:, :, None, :first], x[:, :, first:whole].unflatten(2, (-1, size)), *rest]


def ranked(scores: Tensor) -> Tensor:
    """How many entries of ``scores`` (…,n) are larger, or as large and earlier: (…,n) int64."""
    order = _descending(scores)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _descending(scores: Tensor) -> Tensor:
    """The order of ``scores`` (…,n), the largest first; NaN is as the smallest."""
    clean = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    return clean.sort(dim=-1, descending=True, stable=True).indices
