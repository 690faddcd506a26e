"""Slots that a layer may hold, from what is asked for: the same arithmetic for a cache and for a serving engine."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.methods.base import Method


def least(method: Method, seen: Tensor) -> Tensor:
    """(B,) int64: slots of a head that ``method`` keeps of ``seen`` (B,) tokens whatever the budget, one at least."""
    return seen.clamp(max=max(1, method.sinks + method.window))


def allowed(
    method: Method, mean: Tensor, seen: Tensor, grows: bool, rank: int = 0, ranks: int = 1, held: Tensor | int = 0
) -> Tensor:
    """(B,) int64: slots per KV head that layer ``rank`` of ``ranks`` may hold on average.

    mean (B,) float64: what the budget gives every layer of rows that have seen ``seen`` (B,) int64 tokens. grows:
    whether it is a share, which may be less than what is always kept. held: slots that every layer holds whatever the
    allocation; what layers divide among themselves is the rest.
    """
    floor = least(method, seen)
    mean = mean.maximum(floor) if grows else mean
    mine = method.allocate.layer_budget(mean - held, rank, ranks, seen - held).floor().long() + held
    mine = mine.maximum(floor) if grows else mine
    # Where every token fits, no layer gives any up, however the allocation slopes.
    return mine.where(mean < seen, seen)


def allowed_slots(method: Method, mean: float, seen: int, grows: bool, rank: int = 0, ranks: int = 1) -> int:
    """``allowed`` of one row, in numbers."""
    one = torch.tensor([seen])
    return int(allowed(method, torch.tensor([mean], dtype=torch.float64), one, grows, rank, ranks))
