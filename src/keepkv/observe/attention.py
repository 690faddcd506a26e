"""Attention of given queries over the slots, as every attention-based score and merge needs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from keepkv.core.slots import LayerView, Slots
from keepkv.kernels.dispatch import choose
from keepkv.kernels.logits import cap_logits, with_sinks
from keepkv.kernels.window import window_scores

TILE = 1 << 20  # attention weights that ``received`` holds at a time (4 MiB of float32)
ROWS = 64  # queries of one head among them, where it can choose


def temp_elements(x: Tensor) -> int:
    """Elements that a temporary beside ``x`` should have: they stay in a processor's cache, or keep a GPU busy."""
    return TILE if x.device.type == "cpu" else 4 * TILE


def logits(view: LayerView, queries: Tensor, positions: Tensor) -> Tensor:
    """Biased logits u = softcap(q·k·scaling) + log_votes (B,H,G,T,S), float32, or float64 where the keys are.

    queries (B,H*G,T,D) after RoPE; positions (B,T). −inf where the slot is empty or lies after the query; a padded
    query (position < 0) sees nothing, its row is all −inf.
    """
    slots = view.slots
    b, h, _ = slots.shape
    grouped = queries.reshape(b, h, queries.shape[1] // h, *queries.shape[2:])
    # One matmul per KV head over all its queries: no key is repeated.
    keys = slots.keys if slots.keys.dtype == torch.float64 else slots.keys.float()
    raw = (grouped.flatten(2, 3).to(keys.dtype) * view.scaling) @ keys.transpose(-1, -2)
    raw = cap_logits(raw, view.softcap).view(*grouped.shape[:4], -1)
    if torch.compiler.is_compiling() or positions.shape[1] == 1:
        visible = slots.valid[:, :, None] & (slots.positions[:, :, None] <= positions[:, None, :, None])
        bias = slots.log_votes[:, :, None].masked_fill(~visible, float("-inf"))  # (B,H,T,S)
        return raw.add_(bias[:, :, None])
    if bool(slots.log_votes.any()):
        raw += slots.log_votes[:, :, None, None]
    return _hide(raw, slots, positions)


def _hide(u: Tensor, slots: Slots, positions: Tensor) -> Tensor:
    """``u`` (B,H,G,T,S) with −inf where a slot is empty or lies after the query, in place.

    Of a prompt, most slots are seen by all of its last queries: only columns that are not are looked at.
    """
    real = positions >= 0
    oldest = positions.masked_fill(~real, torch.iinfo(positions.dtype).max).amin()
    mixed = (~slots.valid | (slots.positions > oldest)).flatten(0, 1).any(0)  # (S,)
    columns = mixed.nonzero()[:, 0]
    if len(columns):
        held = slots.positions[..., columns][:, :, None]
        hidden = (held < 0) | (held > positions[:, None, :, None])  # (B,H,T,columns)
        first = int(columns[0])
        if len(columns) == u.shape[-1] - first:  # as usual: the newest
            u[..., first:].masked_fill_(hidden[:, :, None], float("-inf"))
        else:
            u[..., columns] = u[..., columns].masked_fill_(hidden[:, :, None], float("-inf"))
    if not bool(real.all()):
        u.masked_fill_(~real[:, None, None, :, None], float("-inf"))
    return u


def log_normalizer(view: LayerView, u: Tensor) -> Tensor:
    """Log of the softmax denominator of logits ``u`` (B,H,G,T,S), attention sinks included: (B,H,G,T).

    −inf where a query sees nothing.
    """
    return with_sinks(u.logsumexp(-1), view.sink_logits)


def weights(view: LayerView, queries: Tensor, positions: Tensor) -> Tensor:
    """Attention weights (B,H,G,T,S), dtype as ``logits``; all zero for a padded query."""
    if torch.compiler.is_compiling() or view.sink_logits is not None:
        u = logits(view, queries, positions)
        z = log_normalizer(view, u)
        return u.sub_(z.masked_fill_(z.isneginf(), 0.0)[..., None]).exp_()
    attn = logits(view, queries, positions).softmax(-1)
    blind = attn[..., :1].isnan()  # queries that see nothing
    return attn.masked_fill_(blind, 0.0) if bool(blind.any()) else attn


def received(view: LayerView, queries: Tensor, positions: Tensor, until: Tensor | None = None) -> Tensor:
    """Attention that each slot receives from all given queries together, (B,H,G,S), dtype as ``logits``.

    queries (B,H*G,T,D) after RoPE; positions (B,T). until (B,H,S): where given, a slot receives nothing from queries at
    or after that position. Tiled over queries, so that no T x S matrix is held, and only over slots that a tile sees.
    """
    slots = view.slots
    if queries is view.queries and view.weights is not None:
        return view.weights if until is None else view.weights * (positions[:, None] < until)[:, :, None]
    if until is None and choose(None, queries, slots.keys) == "triton":
        return _by_kernel(view, queries, positions)
    total = _nothing(view, queries)
    for heads, part, end, attn in tiles(view, queries, positions):
        if until is not None:
            attn *= (positions[:, None, part, None] < until[:, heads, None, :end])[:, :, None]
        total[:, heads, :, :end] += attn.sum(3)
        del attn  # before the next is made
    return total


def strongest(view: LayerView, queries: Tensor, positions: Tensor, worth: Tensor | None = None) -> Tensor:
    """The largest attention that each slot receives from any of the given queries, (B,H,G,S), as in ``received``;
    where ``worth`` (B,T) is given, that of each query is multiplied by it."""
    if queries is view.queries and view.weights is not None:
        return view.weights if worth is None else view.weights * worth[:, None, None].float()
    if worth is None and choose(None, queries, view.slots.keys) == "triton":
        return _by_kernel(view, queries, positions, peak=True)
    most = _nothing(view, queries)
    for heads, part, end, attn in tiles(view, queries, positions):
        if worth is not None:
            attn *= worth[:, None, None, part, None]
        seen = most[:, heads, :, :end]
        seen.copy_(seen.maximum(attn.amax(3)))
        del attn
    return most


def tiles(view: LayerView, queries: Tensor, positions: Tensor) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """``weights`` (B,h,G,t,end) of some heads and queries at a time, with these heads, these queries, and the number of
    columns that they see at most. What is yielded is the caller's to modify."""
    slots = view.slots
    b, h, s = slots.shape
    t, g = queries.shape[2], view.query_groups
    # Few heads and many queries at a time: their keys and weights stay in a processor's cache.
    heads = max(1, min(h, temp_elements(queries) // max(1, b * g * s * ROWS)))
    tile = max(1, temp_elements(queries) // max(1, b * heads * g * s))
    ends = _ends(slots, positions, tile) if t > tile else [s]
    for first in range(0, h, heads):
        some = of_heads(view, first, heads)
        asking = queries[:, first * g : (first + heads) * g]
        for start, end in zip(range(0, t, tile), ends, strict=False):
            part = slice(start, start + tile)
            near = some if end == s else replace(some, slots=some.slots.map(partial(_columns, count=end)))
            yield slice(first, first + heads), part, end, weights(near, asking[:, :, part], positions[:, part])


def _by_kernel(view: LayerView, queries: Tensor, positions: Tensor, peak: bool = False) -> Tensor:
    slots = view.slots
    return window_scores(
        queries, positions, slots.keys, slots.positions, slots.log_votes if bool(slots.log_votes.any()) else None,
        scaling=view.scaling, softcap=view.softcap, sinks=view.sink_logits, mean=False, peak=peak,
    )  # fmt: skip


def _nothing(view: LayerView, queries: Tensor) -> Tensor:
    """Zeros (B,H,G,S), dtype as ``logits``."""
    (b, h, s), dtype = view.slots.shape, torch.promote_types(view.slots.keys.dtype, torch.float32)
    return torch.zeros(b, h, view.query_groups, s, dtype=dtype, device=queries.device)


def of_heads(view: LayerView, first: int, count: int) -> LayerView:
    """The slots of ``count`` KV heads from ``first`` on, at most as many as there are; queries stay those of all."""
    g, some = view.query_groups, slice(first, first + count)
    sinks = None if view.sink_logits is None else view.sink_logits[first * g : (first + count) * g]
    return replace(view, slots=view.slots.map(lambda x: x[:, some]), sink_logits=sinks, weights=None)


def _ends(slots: Slots, positions: Tensor, tile: int) -> list[int]:
    """How many columns the queries of each tile see at most, in any row and head."""
    oldest = slots.positions.masked_fill(~slots.valid, torch.iinfo(slots.positions.dtype).max).flatten(0, 1).amin(0)
    after = oldest.flip(0).cummin(0).values.flip(0)  # the oldest slot of a column and all that follow it
    newest = torch.stack([x.amax() for x in positions.split(tile, dim=1)])
    return [max(1, end) for end in torch.searchsorted(after, newest.to(after.dtype), right=True).tolist()]


def _columns(x: Tensor, count: int) -> Tensor:
    return x[:, :, :count]
