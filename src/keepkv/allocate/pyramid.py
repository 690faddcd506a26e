"""More slots for the lower layers, fewer for the upper ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from keepkv.allocate.base import register_allocate
from keepkv.allocate.uniform import Uniform
from keepkv.core.options import Count, at_least


@register_allocate("pyramid")
@dataclass(frozen=True)
class Pyramid(Uniform):
    """PyramidKV (arXiv 2406.02069): budgets fall linearly from the first layer to the last, heads are equal.

    With mean budget b and ``reserved`` slots that every layer has anyway (sinks and window), n = b − reserved:
    last layer max(n/beta, 1), first layer 2n − last, plus ``reserved`` each. Rounding is cumulative, so the sum over
    layers is ⌊layers · b⌋ exactly and no layer falls below ``reserved + 1``. Where the first layer would get more
    than the tokens ``seen`` it gets them all and the others share the rest, as in kvpress.
    """

    beta: Annotated[float, at_least(1)] = 20.0
    reserved: Count = 0

    def layer_budget(self, budget: Tensor, layer: int, layers: int, seen: Tensor | None = None) -> Tensor:
        free = budget.double() - self.reserved
        last = (free / self.beta).clamp(min=1.0).minimum(free)
        first = 2 * free - last
        if seen is not None:
            room = seen.double() - self.reserved
            first = first.minimum(room).maximum(free)
            last = 2 * free - first

        def upto(count: int) -> Tensor:
            """Slots of the first ``count`` layers together, rounded down."""
            step = (first - last) / max(layers - 1, 1)
            exact = count * (first + self.reserved) - step * (count * (count - 1) / 2)
            return (exact + 1e-6).floor() if layers > 1 else (budget.double() * count + 1e-6).floor()

        return upto(layer + 1) - upto(layer)
