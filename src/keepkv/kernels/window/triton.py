"""Two passes over the keys: softmax denominators of all queries, then each slot's sum of weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels import launch
from keepkv.kernels.addressing import finite, load_keys, log_sum, logits, segment
from keepkv.kernels.logits import KeySlots, with_sinks


@triton.jit
def _seen(u, held, asked):
    """Logits (R,N) of queries at positions ``asked``, with −inf where they do not see the slot ``held``."""
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
    row, head, start, count = segment(pair, heads, first, lengths, slots)
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
        key, held, vote = load_keys(
            k, votes, positions, row, head, start + n, n < end, d,
            s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, D,
        )  # fmt: skip
        u = logits(query, key, vote, scaling, softcap, votes is not None, SOFTCAP, UPCAST)
        u = _seen(u, held, asked)
        higher = tl.maximum(top, tl.max(u, 1))
        shift = finite(higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(u - shift[:, None]), 1)
        top = higher
    at = lse + (pair.to(tl.int64) * tl.num_programs(1) + part) * G * window + r
    tl.store(at, log_sum(top, total), mask=real)


@triton.jit(do_not_specialize=["slots", "window"])
def _received(
    q, asked_at, k, votes, positions, first, lengths, lse, divisors, out,
    s_qb, s_qh, s_qw, s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, s_ob, s_oh, s_og,
    scaling, softcap, heads, slots, window,
    G: tl.constexpr, D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """Weights that one tile of slots receives, summed over the queries of each query head in turn, or the largest."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    row, head, start, count = segment(pair, heads, first, lengths, slots)
    n, d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key, held, vote = load_keys(
        k, votes, positions, row, head, start + n, n < count, d,
        s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, D,
    )  # fmt: skip
    divisor = tl.load(divisors + row).to(tl.float32)
    for g in range(G):
        total = tl.zeros((BLOCK_N,), tl.float32)
        for at in range(0, window, BLOCK_W):
            w = at + tl.arange(0, BLOCK_W)
            q_at = q + row * s_qb + (head * G + g) * s_qh + w[:, None].to(tl.int64) * s_qw + d[None, :]
            query = tl.load(q_at, mask=(w < window)[:, None] & (d < D)[None, :], other=0.0)
            asked = tl.load(asked_at + row * window + w, mask=w < window, other=-1)
            z = finite(tl.load(lse + (pair.to(tl.int64) * G + g) * window + w, mask=w < window, other=0.0))
            u = logits(query, key, vote, scaling, softcap, votes is not None, SOFTCAP, UPCAST)
            weights = tl.exp(_seen(u, held, asked) - z[:, None])
            if PEAK:
                total = tl.maximum(total, tl.max(weights, 0))
            else:
                total += tl.sum(weights, 0)
        out_at = out + row * s_ob + head * s_oh + g * s_og + start + n
        tl.store(out_at, total / divisor, mask=n < count)


def window_scores(queries: Tensor, query_positions: Tensor, slots: KeySlots, divisor: Tensor, peak: bool) -> Tensor:
    """As ``reference.window_scores``, float32."""
    queries, asked, segments = launch.rowwise(queries), query_positions.contiguous(), slots.segments
    b, heads, w, d = queries.shape
    h, g, pairs, longest = segments.heads, heads // segments.heads, b * segments.heads, segments.longest
    out = segments.empty_per_query(slots.keys, g, torch.float32)
    if w == 0 or longest == 0:
        return out.zero_()
    block_n = launch.slots_per_tile(slots.keys, d)
    chunk, parts = launch.split(longest, segments.total, block_n, launch.programs(queries.device))
    block_r = launch.rows_per_tile(queries, g * w, d)
    blocks = -(-g * w // block_r)
    lse = queries.new_empty(pairs, parts, g * w, dtype=torch.float32)
    given, strides = launch.slot_arguments(slots)
    strides = (*queries.stride()[:3], *strides)
    scales = (slots.scaling, slots.softcap or 0.0)
    sizes = {"G": g, "D": d, "BLOCK_N": block_n, "BLOCK_D": launch.next_power_of_two(d, launch.MIN_DOT)}
    options = {"SOFTCAP": slots.softcap is not None, "UPCAST": launch.upcast(queries), "num_warps": 4}
    with launch.device_of(queries):
        _normalisers[pairs * blocks, parts](
            queries, asked, *given, lse, *strides, *scales, h, longest, chunk, w, blocks,
            BLOCK_R=block_r, **sizes, **options, num_stages=2,
        )  # fmt: skip
        z = with_sinks(lse.logsumexp(1).view(b, h, g, w), slots.sinks).contiguous()
        _received[pairs, -(-longest // block_n)](
            queries, asked, *given, z, divisor, out, *strides, *segments.strides(out), *scales, h, longest, w,
            BLOCK_W=launch.rows_per_tile(queries, w, d), **sizes, **options, PEAK=peak, num_stages=1,
        )  # fmt: skip
    return out
