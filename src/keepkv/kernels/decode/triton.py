"""Flash decoding: slots are split over programs, each of which serves all query heads of a KV head at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels import launch
from keepkv.kernels.addressing import finite, load_keys, log_sum, logits, segment
from keepkv.kernels.decode.join import join, normalise
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.logits import KeySlots


@triton.jit(do_not_specialize=["slots", "chunk"])
def _attend(
    q, v, k, votes, positions, first, lengths, out, lse, per_slot,
    s_qb, s_qh, s_vb, s_vh, s_vs, s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, s_ub, s_uh, s_ug,
    scaling, softcap, heads, slots, chunk,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one (row, head): its softmax output, log-sum-exp, and logits if asked for."""
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head, start, count = segment(pair, heads, first, lengths, slots)
    begin = part * chunk
    end = tl.minimum(begin + chunk, count)

    g, d, e = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + row * s_qb + (head * G + g[:, None]) * s_qh + d[None, :]
    query = tl.load(q_at, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        inside = n < end
        slot = start + n
        key, held, vote = load_keys(
            k, votes, positions, row, head, slot, inside, d, s_kb, s_kh, s_ks, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, D
        )
        u = logits(query, key, vote, scaling, softcap, votes is not None, SOFTCAP, UPCAST)
        u = tl.where((held >= 0)[None, :], u, float("-inf"))
        if per_slot is not None:
            u_at = per_slot + row * s_ub + head * s_uh + g[:, None] * s_ug + slot[None, :]
            tl.store(u_at, u, mask=(g < G)[:, None] & inside[None, :])
        higher = tl.maximum(top, tl.max(u, 1))
        shift = finite(higher)
        share = tl.exp(u - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(share, 1)
        v_at = v + row * s_vb + head * s_vh + slot[:, None] * s_vs + e[None, :]
        value = tl.load(v_at, mask=(held >= 0)[:, None] & (e < DV)[None, :], other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        top = higher

    where = (pair.to(tl.int64) * tl.num_programs(1) + part) * G + g
    tl.store(lse + where, log_sum(top, total), mask=g < G)
    mean = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + where[:, None] * DV + e[None, :], mean, mask=(g < G)[:, None] & (e < DV)[None, :])


def decode_attention(query: Tensor, slots: KeySlots, values: Tensor, weights: bool) -> Decoded:
    """As ``reference.decode_attention``."""
    query, values, segments = launch.rowwise(query), launch.rowwise(values), slots.segments
    b, heads, d = query.shape
    dv, h = values.shape[-1], segments.heads
    pairs, g = b * h, heads // h
    block_n = launch.slots_per_tile(slots.keys, d, dv)
    chunk, parts = launch.split(segments.longest, segments.total, block_n, launch.programs(query.device))
    out, lse = query.new_empty(b, heads, dv), query.new_empty(b, heads, dtype=torch.float32)
    parts_out = query.new_empty(pairs, parts, g, dv, dtype=torch.float32)
    parts_lse = query.new_empty(pairs, parts, g, dtype=torch.float32)
    per_slot = segments.empty_per_query(slots.keys, g, torch.float32) if weights else None
    given, strides = launch.slot_arguments(slots)
    with launch.device_of(query):
        _attend[pairs, parts](
            query, values, *given, parts_out, parts_lse, per_slot,
            *query.stride()[:2], *segments.strides(values), *strides, *segments.strides(per_slot),
            slots.scaling, slots.softcap or 0.0, h, segments.longest, chunk,
            G=g, D=d, DV=dv, BLOCK_G=launch.next_power_of_two(g, launch.MIN_DOT), BLOCK_N=block_n,
            BLOCK_D=launch.next_power_of_two(d, launch.MIN_DOT), BLOCK_DV=launch.next_power_of_two(dv, launch.MIN_DOT),
            SOFTCAP=slots.softcap is not None, UPCAST=launch.upcast(query), num_warps=4, num_stages=2,
        )  # fmt: skip
        join(parts_out, parts_lse, slots.sinks, out, lse, h)
        if per_slot is not None:
            normalise(per_slot, lse, segments)
    return Decoded(out, lse, per_slot)
