"""Attention of given queries over the slots, as every attention-based score and merge needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.slots import LayerView

TILE = 1 << 24  # most attention weights that ``received`` holds at a time (64 MiB of float32)


def logits(view: LayerView, queries: Tensor, positions: Tensor) -> Tensor:
    """Biased logits u = softcap(q·k·scaling) + log_votes (B,H,G,T,S), float32, or float64 where the keys are.

    queries (B,H*G,T,D) after RoPE; positions (B,T). −inf where the slot is empty or lies after the query; a padded
    query (position < 0) sees nothing, its row is all −inf.
    """
    slots = view.slots
    b, h, _ = slots.shape
    grouped = queries.reshape(b, h, -1, *queries.shape[2:])
    # One matmul per KV head over all its queries: no key is repeated.
    keys = slots.keys if slots.keys.dtype == torch.float64 else slots.keys.float()
    raw = (grouped.flatten(2, 3).to(keys.dtype) @ keys.transpose(-1, -2)).mul_(view.scaling)
    raw = raw.view(*grouped.shape[:4], -1)
    if view.softcap is not None:
        raw = torch.tanh(raw / view.softcap) * view.softcap
    visible = slots.valid[:, :, None] & (slots.positions[:, :, None] <= positions[:, None, :, None])
    bias = slots.log_votes[:, :, None].masked_fill(~visible, float("-inf"))  # (B,H,T,S)
    return raw + bias[:, :, None]


def log_normalizer(view: LayerView, u: Tensor) -> Tensor:
    """Log of the softmax denominator of logits ``u`` (B,H,G,T,S), attention sinks included: (B,H,G,T).

    −inf where a query sees nothing.
    """
    z = u.logsumexp(-1)
    if view.sinks is None:
        return z
    sinks = view.sinks.to(z.dtype).view(1, u.shape[1], u.shape[2], 1)
    return torch.where(z.isneginf(), z, torch.logaddexp(z, sinks))


def weights(view: LayerView, queries: Tensor, positions: Tensor) -> Tensor:
    """Attention weights (B,H,G,T,S), dtype as ``logits``; all zero for a padded query."""
    u = logits(view, queries, positions)
    z = log_normalizer(view, u)
    return (u - z.masked_fill(z.isneginf(), 0.0)[..., None]).exp()


def received(view: LayerView, queries: Tensor, positions: Tensor, until: Tensor | None = None) -> Tensor:
    """Attention that each slot receives from all given queries together, (B,H,G,S), dtype as ``logits``.

    queries (B,H*G,T,D) after RoPE; positions (B,T). until (B,H,S): where given, a slot receives nothing from queries at
    or after that position. Tiled over queries, so that no T x S matrix is held.
    """
    b, h, s = view.slots.shape
    dtype = torch.promote_types(view.slots.keys.dtype, torch.float32)
    total = torch.zeros(b, h, queries.shape[1] // h, s, dtype=dtype, device=queries.device)
    tile = max(1, TILE // max(1, b * queries.shape[1] * s))
    for start in range(0, queries.shape[2], tile):
        part = slice(start, start + tile)
        given = weights(view, queries[:, :, part], positions[:, part])
        if until is not None:
            given *= (positions[:, None, part, None] < until[:, :, None])[:, :, None]
        total += given.sum(3)
    return total
