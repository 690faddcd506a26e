"""Chance: numbers that depend on a seed and on what is drawn for, and on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import LayerView

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB), (31, 1))  # of splitmix64


def uniform(view: LayerView, salt: int = 0, fresh: bool = False) -> Tensor:
    """(B,H,S) float32, a multiple of 2⁻²⁴ in [0,1) for each slot: a hash of (seed, layer, head, position).

    fresh: also of how many tokens the row has seen, so that every compression draws anew. salt: tells apart what draws
    for the same slots. A row draws the same alone and in any batch; torch's generators are neither read nor moved.
    """
    positions = view.slots.positions.long()
    heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
    x = positions + (heads << 32) + (view.layer << 44) + (view.seed ^ salt) * _GOLDEN % (1 << 62)
    if fresh:
        x = _mixed(x) + view.seen.to(x.device)[:, None, None]
    return (_mixed(x) & 0xFFFFFF).float() / (1 << 24)


def _mixed(x: Tensor) -> Tensor:
    """The bits of x int64, each of which depends on all of them."""
    for shift, factor in _MIX:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x
