"""Lengths of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

TILE = 1 << 17  # numbers that are converted at a time: they stay in a processor's cache


def lengths(x: Tensor) -> Tensor:
    """‖x‖₂ (B,H,S) of x (B,H,S,D) in float32, or in float64 where x is: never a copy of all of x in it. No gradient."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == dtype or x.device.type != "cpu":  # other devices convert what they read
        found: Tensor = vector_norm(x, dim=-1, dtype=dtype)
        return found
    s, d = x.shape[2:]
    step = max(1, min(s, TILE // max(1, d)))
    out, wide = x.new_empty(x.shape[:-1], dtype=dtype), x.new_empty(step, d, dtype=dtype)
    for head, found in zip(x.detach().flatten(0, 1), out.flatten(0, 1), strict=True):
        for start in range(0, s, step):
            part = head[start : start + step]
            vector_norm(wide[: part.shape[0]].copy_(part), dim=-1, out=found[start : start + step])
    return out
