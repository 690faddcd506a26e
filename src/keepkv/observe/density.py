"""How dense attention is: how many of its entries matter beside the largest one of their query."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.attention import tiles


def large_entries(view: LayerView, queries: Tensor, positions: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Of the attention of ``queries`` (B,H*G,T,D) at ``positions`` (B,T), −1 for padding: how many entries are at least
    ``part`` of the largest of their query, and how many there are, (B,) float64 each, all query heads together.

    1 − their ratio is the sparsity of VL-Cache (arXiv 2410.23317).
    """
    slots, nothing = view.slots, torch.zeros(len(positions), dtype=torch.float64, device=positions.device)
    large, every = nothing, nothing.clone()
    if queries is view.queries and view.weights is not None:  # of one query
        attn, seen = view.weights[:, :, :, None], (slots.valid & (positions >= 0)[:, None])[:, :, None]
        return _count(attn, seen, part)
    for heads, some, end, attn in tiles(view, queries, positions):
        held, asked = slots.positions[:, heads, None, :end], positions[:, None, some, None]
        more = _count(attn, (held >= 0) & (held <= asked), part)
        large, every = large + more[0], every + more[1]
    return large, every


def _count(attn: Tensor, seen: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Of attention (B,h,G,t,S) where ``seen`` (B,h,t,S)."""
    matters = (attn >= part * attn.amax(-1, keepdim=True)) & seen[:, :, None]
    every = attn.shape[2] * seen.flatten(1).sum(-1, dtype=torch.float64)
    return matters.flatten(1).sum(-1, dtype=torch.float64), every
