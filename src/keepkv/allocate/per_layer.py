"""Budgets of layers as they are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.allocate.base import register_allocate
from keepkv.allocate.uniform import Uniform
from keepkv.allocate.water_filling import water_fill
from keepkv.core.options import Count, shown
from keepkv.errors import BudgetError, KeepKVError

TINY = 1e-9  # of the largest share: nothing


@register_allocate("per-layer")
@dataclass(frozen=True)
class PerLayer(Uniform):
    """Layers share the budget in proportion to ``shares``, one number for each that is compressed; heads are equal.

    Without shares it is uniform. ``reserved`` slots (sinks and window) every layer has anyway. What a layer cannot use,
    because the row has fewer tokens, goes to the others. Rounding is cumulative: the sum over layers is exact.
    """

    shares: tuple[float, ...] | list[float] = ()
    reserved: Count = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        good = all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < float("inf") for x in self.shares
        )
        if not good or (self.shares and not any(self.shares)):
            raise KeepKVError(
                f"PerLayer: shares={shown(self.shares)}: give a number of at least 0 for each layer, such as (2, 1, 1)"
            )
        object.__setattr__(self, "shares", tuple(float(x) for x in self.shares))

    def layer_budget(self, budget: Tensor, layer: int, layers: int, seen: Tensor | None = None) -> Tensor:
        shares = [x if x > TINY * max(self.shares) else 0.0 for x in self.shares] or [1.0] * layers
        if len(shares) != layers:
            raise BudgetError(
                f"shares of {len(shares)} layers, and {layers} are compressed: give one number for each of these"
            )
        total = (budget.double() * layers)[..., None]
        low = torch.full((*budget.shape, layers), float(self.reserved), dtype=torch.float64, device=budget.device)
        low = low.minimum(budget.double()[..., None])
        high = total.expand(low.shape) if seen is None else seen.double()[..., None].expand(low.shape).maximum(low)
        each = water_fill(total[..., 0], (total.new_tensor(shares) / max(shares)).expand(low.shape), low, high)
        spare = total[..., 0] - each.sum(-1)  # of layers of share 0
        each = each + water_fill(spare, torch.ones_like(each), torch.zeros_like(each), high - each)
        upto = (each.cumsum(-1) + 1e-6).floor()
        return upto[..., layer] - (upto[..., layer - 1] if layer else 0)
