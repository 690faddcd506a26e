"""Attention that each slot receives from a window of queries, without the matrix of queries × slots."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.kernels.layout import Layout, agree, layout, spread


def window_scores(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    positions: Tensor,
    log_votes: Tensor | None = None,
    *,
    scaling: float,
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    longest: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mean: bool = True,
    peak: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean attention of each slot over the queries, as SnapKV's window wants it (arXiv 2404.14469), unpooled.

    queries (B,Hq,W,D) with positions (B,W), below 0 for padding; slots as in ``decode``, their positions needed: a
    query sees slots up to its own position, and empty ones never. Returns float32 (B,H,G,S), or (G,N) for ragged
    slots: Σ over queries of the softmax over all slots (and ``sinks``), by the number of real queries of the row
    unless ``mean`` is false; with ``peak`` the largest weight instead. Keys are read twice: for the softmax
    denominators, then for the sums. Any number of queries, so this serves H2O's whole prompt too.
    """
    space = layout(keys, 1, offsets, lengths, longest)
    b, heads, w, d = queries.shape
    agree(space, (b, heads, d), keys, sinks, positions=positions, log_votes=log_votes)
    check(query_positions.shape == (b, w), f"query_positions {tuple(query_positions.shape)} of {b} rows × {w} queries")
    if choose(backend, queries, keys) == "reference":
        kernel = reference
    else:
        from keepkv.kernels.window_triton import window_scores as kernel  # Triton is needed only here
    counts = mean and not peak
    real = (query_positions >= 0).sum(-1).clamp(min=1) if counts else torch.ones_like(query_positions[:, 0])
    return kernel(queries, query_positions, real, keys, positions, log_votes, space, scaling, softcap, sinks, peak)


def reference(
    queries: Tensor,
    query_positions: Tensor,
    real: Tensor,
    keys: Tensor,
    positions: Tensor,
    log_votes: Tensor | None,
    space: Layout,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    peak: bool,
) -> Tensor:
    """The same in plain torch, with the matrix; real (B,): what sums are divided by."""
    b, _, w, d = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    index, inside = space.index()
    grouped = queries.to(wide).view(b, space.heads, -1, d)  # (B,H,G·W,D)
    u = grouped @ space.take(keys, index, inside).to(wide).transpose(-1, -2) * scaling
    if softcap is not None:
        u = torch.tanh(u / softcap) * softcap
    u = u.view(b, space.heads, -1, w, u.shape[-1])
    if log_votes is not None:
        u = u + space.take(log_votes, index, inside)[:, :, None, None]
    held = space.take(positions, index, inside)
    sees = (held[:, :, None] >= 0) & (held[:, :, None] <= query_positions[:, None, :, None])  # (B,H,W,longest)
    if inside is not None:
        sees = sees & inside[:, :, None]
    u = u.masked_fill(~sees[:, :, None], float("-inf"))
    z = u.logsumexp(-1)
    if sinks is not None:
        z = torch.where(z.isneginf(), z, torch.logaddexp(z, sinks.to(wide).view(1, space.heads, -1, 1)))
    weights = (u - z.masked_fill(z.isneginf(), 0.0)[..., None]).exp()
    total = weights.amax(3) if peak else weights.sum(3)
    return spread(total / real.view(-1, 1, 1, 1), keys, space, index, inside)
