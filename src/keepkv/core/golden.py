"""Numbers that are spread evenly over any run of positions."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 2654435769  # 2^32 / golden ratio: multiples of it, modulo 2^32, spread evenly whatever their number
NEVER = 1 << 32


def golden_order(positions: Tensor, times: int = 1) -> Tensor:
    """A number in [0, 2^32) for each position, evenly spread over any run of positions; int64. ``times`` in a row."""
    return (positions.long() * pow(GOLDEN, times, NEVER)) & (NEVER - 1)
