"""How far apart floats are, in units of the last place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ulps(one: Tensor, two: Tensor) -> float:
    """Largest difference of two tensors of the same dtype, in units of the last place of their largest value; 0 where
    they are equal to the bit, infinite where one is not finite and the other differs there."""
    assert one.dtype == two.dtype and one.shape == two.shape
    if torch.equal(one, two):
        return 0.0
    off, largest = (one - two).abs().max().double(), torch.maximum(one.abs().max(), two.abs().max()).double()
    last = torch.finfo(one.dtype).eps * 2.0 ** math.floor(math.log2(float(largest))) if largest.isfinite() else 0.0
    return float(off / last) if last and off.isfinite() else math.inf
