"""Attention that each slot receives from a window of queries, without the matrix of queries × slots."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.kernels.logits import KeySlots
from keepkv.kernels.segments import segments_of
from keepkv.kernels.window import reference

__all__ = ["window_scores"]


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

    queries (B,Hq,W,D) with positions (B,W), below 0 for padding; slots as in ``decode_attention``, but with positions:
    a query sees slots up to its own position, and never an empty one. Returns float32 (B,H,G,S), or (G,N) for ragged
    slots: Σ over queries of the softmax over all slots (and ``sinks``), by the number of real queries of the row
    unless ``mean`` is false; with ``peak`` the largest weight instead. Keys are read twice: for the softmax
    denominators, then for the sums. Any number of queries will do, H2O's whole prompt too.
    """
    slots = KeySlots(keys, log_votes, positions, segments_of(keys, offsets, lengths, longest), scaling, softcap, sinks)
    slots.check(queries, keys.shape[-1])
    b, w = queries.shape[0], queries.shape[2]
    check(query_positions.shape == (b, w), f"query_positions {tuple(query_positions.shape)} of {b} rows × {w} queries")
    counts = mean and not peak
    divisor = (query_positions >= 0).sum(-1).clamp(min=1) if counts else torch.ones_like(query_positions[:, 0])
    if choose(backend, queries, keys) == "reference":
        return reference.window_scores(queries, query_positions, slots, divisor, peak)
    from keepkv.kernels.window import triton  # only here, since Triton may be missing

    return triton.window_scores(queries, query_positions, slots, divisor, peak)
