"""Two passes over the keys: softmax denominators of all queries, then each slot's sum of weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.layout import Layout, room, room_strides, rowwise
from keepkv.kernels.tiles import MIN_DOT, on, power, rows_per_tile, slots_per_tile, split, upcast


@triton.jit
def _logits(
    query, key, vote, held, asked, scaling, softcap, VOTES: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr
):
    """Biased logits of queries × slots; −inf where a query does not see a slot."""
    if UPCAST:
        query, key = query.to(tl.float32), key.to(tl.float32)
    u = tl.dot(query, key, input_precision="ieee") * scaling
    if SOFTCAP:
        u = softcap * (2 * tl.sigmoid(2 * u / softcap) - 1)  # tanh
    if VOTES:
        u += vote[None, :]
    return tl.where((held >= 0)[None, :] & (held[None, :] <= asked[:, None]), u, float("-inf"))


@triton.jit(do_not_specialize=["slots", "chunk", "window"])
def _normalisers(
    q, asked_at, k, votes, positions, first, lengths, lse,
    s_qb, s_qh, s_qw, s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps,
    scaling, softcap, heads, slots, chunk, window, blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one part of the slots of a (row, head), for a block of its G·W queries."""
    pair, block, part = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = tl.zeros((), tl.int64)
    count = slots
    if first is not None:
        start = tl.load(first + pair)
        count = tl.load(lengths + pair).to(tl.int32)
    begin = part * chunk
    end = tl.minimum(begin + chunk, count)
    r, d = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    g, w = r // window, r % window
    real = r < G * window
    q_at = q + row * s_qb + (head * G + g[:, None]) * s_qh + w[:, None].to(tl.int64) * s_qw + d[None, :]
    query = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    asked = tl.load(asked_at + row * window + w, mask=real, other=-1)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        slot = start + n
        held = tl.load(positions + row * s_pb + head * s_ph + slot * s_ps, mask=n < end, other=-1)
        some = held >= 0
        k_at = k + row * s_kb + head * s_kh + slot[None, :] * s_ks + d[:, None]
        key = tl.load(k_at, mask=some[None, :] & (d < D)[:, None], other=0.0)
        vote = held
        if votes is not None:
            vote = tl.load(votes + row * s_nb + head * s_nh + slot * s_ns, mask=some, other=0.0)
        u = _logits(query, key, vote, held, asked, scaling, softcap, votes is not None, SOFTCAP, UPCAST)
        higher = tl.maximum(top, tl.max(u, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(u - shift[:, None]), 1)
        top = higher
    z = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse + (pair.to(tl.int64) * tl.num_programs(1) + part) * G * window + r, z, mask=real)


@triton.jit(do_not_specialize=["slots", "window"])
def _received(
    q, asked_at, k, votes, positions, first, lengths, lse, real, out,
    s_qb, s_qh, s_qw, s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, s_ob, s_oh, s_og,
    scaling, softcap, heads, slots, window,
    G: tl.constexpr, D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """Weights that one tile of slots receives, summed over the queries of each query head in turn, or the largest."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = tl.zeros((), tl.int64)
    count = slots
    if first is not None:
        start = tl.load(first + pair)
        count = tl.load(lengths + pair).to(tl.int32)
    n, d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    slot = start + n
    held = tl.load(positions + row * s_pb + head * s_ph + slot * s_ps, mask=n < count, other=-1)
    some = held >= 0
    k_at = k + row * s_kb + head * s_kh + slot[None, :] * s_ks + d[:, None]
    key = tl.load(k_at, mask=some[None, :] & (d < D)[:, None], other=0.0)
    vote = held
    if votes is not None:
        vote = tl.load(votes + row * s_nb + head * s_nh + slot * s_ns, mask=some, other=0.0)
    divisor = tl.load(real + row).to(tl.float32)
    for g in range(G):
        total = tl.zeros((BLOCK_N,), tl.float32)
        for at in range(0, window, BLOCK_W):
            w = at + tl.arange(0, BLOCK_W)
            q_at = q + row * s_qb + (head * G + g) * s_qh + w[:, None].to(tl.int64) * s_qw + d[None, :]
            query = tl.load(q_at, mask=(w < window)[:, None] & (d < D)[None, :], other=0.0)
            asked = tl.load(asked_at + row * window + w, mask=w < window, other=-1)
            z = tl.load(lse + (pair.to(tl.int64) * G + g) * window + w, mask=w < window, other=0.0)
            z = tl.where(z == float("-inf"), 0.0, z)
            u = _logits(query, key, vote, held, asked, scaling, softcap, votes is not None, SOFTCAP, UPCAST)
            if PEAK:
                total = tl.maximum(total, tl.max(tl.exp(u - z[:, None]), 0))
            else:
                total += tl.sum(tl.exp(u - z[:, None]), 0)
        tl.store(out + row * s_ob + head * s_oh + g * s_og + slot, total / divisor, mask=n < count)


def window_scores(
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
    """As ``kernels.window.reference``."""
    queries, keys, asked = rowwise(queries), rowwise(keys), query_positions.contiguous()
    b, heads, w, d = queries.shape
    h, g, pairs = space.heads, heads // space.heads, b * space.heads
    out = room(space, keys, g, torch.float32)
    if w == 0 or space.longest == 0:
        return out.zero_()
    block_n = slots_per_tile(keys, d)
    chunk, parts = split(space.longest, space.total, block_n, queries.device)
    block_r = rows_per_tile(queries, g * w, d)
    blocks = -(-g * w // block_r)
    lse = queries.new_empty(pairs, parts, g * w, dtype=torch.float32)
    votes = None if log_votes is None else log_votes.float()
    given = (queries, asked, keys, votes, positions, space.first, space.lengths)
    none = (0, 0, 0)
    strides = (*queries.stride()[:3], *space.strides(keys), *(none if votes is None else space.strides(votes)))
    strides = (*strides, *space.strides(positions))
    sizes = {"G": g, "D": d, "BLOCK_N": block_n, "BLOCK_D": power(d, MIN_DOT)}
    options = {"SOFTCAP": softcap is not None, "UPCAST": upcast(queries), "num_warps": 4}
    with on(queries):
        _normalisers[pairs * blocks, parts](
            *given, lse, *strides, scaling, softcap or 0.0, h, space.longest, chunk, w, blocks,
            BLOCK_R=block_r, **sizes, **options, num_stages=2,
        )  # fmt: skip
        z = lse.logsumexp(1).view(b, h, g, w)
        if sinks is not None:
            z = torch.where(z.isneginf(), z, torch.logaddexp(z, sinks.float().view(1, h, g, 1)))
        _received[pairs, -(-space.longest // block_n)](
            *given, z.contiguous(), real, out, *strides, *room_strides(space, out), scaling, softcap or 0.0, h,
            space.longest, w, BLOCK_W=rows_per_tile(queries, w, d), **sizes, **options, PEAK=peak, num_stages=1,
        )  # fmt: skip
    return out
