"""Attention of given queries over the slots, as every attention-based score and merge needs it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from keepkv.kernels.dispatch import choose
from keepkv.kernels.window import window_scores
from keepkv.slots import LayerView, Slots

TILE = 1 << 23  # most attention weights that ``received`` holds at a time (32 MiB of float32)


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
    raw = (grouped.flatten(2, 3).to(keys.dtype) * view.scaling) @ keys.transpose(-1, -2)
    raw = raw.view(*grouped.shape[:4], -1)
    if view.softcap is not None:
        raw = torch.tanh(raw / view.softcap) * view.softcap
    visible = slots.valid[:, :, None] & (slots.positions[:, :, None] <= positions[:, None, :, None])
    bias = slots.log_votes[:, :, None].masked_fill(~visible, float("-inf"))  # (B,H,T,S)
    return raw.add_(bias[:, :, None])


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
    return u.sub_(z.masked_fill_(z.isneginf(), 0.0)[..., None]).exp_()


def received(view: LayerView, queries: Tensor, positions: Tensor, until: Tensor | None = None) -> Tensor:
    """Attention that each slot receives from all given queries together, (B,H,G,S), dtype as ``logits``.

    queries (B,H*G,T,D) after RoPE; positions (B,T). until (B,H,S): where given, a slot receives nothing from queries at
    or after that position. Tiled over queries, so that no T x S matrix is held, and only over slots that a tile sees.
    """
    slots = view.slots
    if queries is view.queries and view.weights is not None:
        return view.weights if until is None else view.weights * (positions[:, None] < until)[:, :, None]
    if until is None and choose(None, queries, slots.keys) == "triton":
        bias = slots.log_votes if bool(slots.log_votes.any()) else None
        return window_scores(
            queries, positions, slots.keys, slots.positions, bias, scaling=view.scaling, softcap=view.softcap,
            sinks=view.sinks, mean=False,
        )  # fmt: skip
    b, h, s = slots.shape
    t, dtype = queries.shape[2], torch.promote_types(slots.keys.dtype, torch.float32)
    total = torch.zeros(b, h, queries.shape[1] // h, s, dtype=dtype, device=queries.device)
    tile = max(1, TILE // max(1, b * queries.shape[1] * s))
    ends = _ends(slots, positions, tile) if t > tile else [s]
    for start, end in zip(range(0, t, tile), ends, strict=False):
        part, held = slice(start, start + tile), slots if end == s else slots.map(partial(_first, count=end))
        given = weights(replace(view, slots=held), queries[:, :, part], positions[:, part])
        if until is not None:
            given *= (positions[:, None, part, None] < until[:, :, None, :end])[:, :, None]
        total[..., :end] += given.sum(3)
    return total


def _ends(slots: Slots, positions: Tensor, tile: int) -> list[int]:
    """How many columns the queries of each tile see at most, in any row and head."""
    oldest = slots.positions.masked_fill(~slots.valid, torch.iinfo(slots.positions.dtype).max).flatten(0, 1).amin(0)
    after = oldest.flip(0).cummin(0).values.flip(0)  # the oldest slot of a column and all that follow it
    newest = torch.stack([x.amax() for x in positions.split(tile, dim=1)])
    return [max(1, end) for end in torch.searchsorted(after, newest.to(after.dtype), right=True).tolist()]


def _first(x: Tensor, count: int) -> Tensor:
    return x[:, :, :count]
