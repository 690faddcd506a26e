"""Flash decoding: slots are split over programs, each of which serves all query heads of a KV head at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels import launch
from keepkv.kernels.addressing import finite, load_keys, log_sum, logits, segment
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


@triton.jit(do_not_specialize=["parts"])
def _combine(
    parts_out, parts_lse, sinks, out, lse, heads, parts, G: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Join the parts of one query head, always in the same order, and add its sink."""
    pair, g = tl.program_id(0), tl.program_id(1)
    at = pair.to(tl.int64) * parts * G + g
    top = tl.full((), float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(parts_lse + at + part * G))
    seen = top > float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + (pair % heads) * G + g).to(tl.float32)
        top = tl.where(seen, tl.maximum(top, sink), top)
    shift = tl.where(seen, top, 0.0)
    e = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    total = tl.zeros((), tl.float32)
    for part in range(parts):
        weight = tl.exp(tl.load(parts_lse + at + part * G) - shift)
        total += weight
        acc += weight * tl.load(parts_out + (at + part * G) * DV + e, mask=e < DV, other=0.0)
    if sinks is not None:
        total += tl.where(seen, tl.exp(sink - shift), 0.0)
    where = pair.to(tl.int64) * G + g
    tl.store(lse + where, tl.where(seen, shift + tl.log(tl.where(seen, total, 1.0)), float("-inf")))
    mean = acc / tl.where(seen, total, 1.0)
    tl.store(out + where * DV + e, mean.to(out.dtype.element_ty), mask=e < DV)


@triton.jit(do_not_specialize=["slots"])
def _normalise(
    per_slot, lse, first, lengths, s_ub, s_uh, s_ug, heads, slots,
    G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits to attention weights, in place."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    row, head, start, count = segment(pair, heads, first, lengths, slots)
    g, n = tl.arange(0, BLOCK_G), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (g < G)[:, None] & (n < count)[None, :]
    at = per_slot + row * s_ub + head * s_uh + g[:, None] * s_ug + (start + n)[None, :]
    z = finite(tl.load(lse + pair.to(tl.int64) * G + g, mask=g < G, other=0.0))
    u = tl.load(at, mask=mask, other=float("-inf"))
    tl.store(at, tl.exp(u - z[:, None]), mask=mask)


def decode_attention(query: Tensor, slots: KeySlots, values: Tensor, weights: bool) -> Decoded:
    """As ``reference.decode_attention``."""
    query, values, segments = launch.rowwise(query), launch.rowwise(values), slots.segments
    b, heads, d = query.shape
    dv, h = values.shape[-1], segments.heads
    pairs, g = b * h, heads // h
    block_n = launch.slots_per_tile(slots.keys, d, dv)
    chunk, parts = launch.split(segments.longest, segments.total, block_n, query.device)
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
        _combine[pairs, g](
            parts_out, parts_lse, slots.sinks, out, lse, h, parts,
            G=g, DV=dv, BLOCK_DV=launch.next_power_of_two(dv), num_warps=1,
        )  # fmt: skip
        if per_slot is not None:
            block = 512
            _normalise[pairs, max(1, -(-segments.longest // block))](
                per_slot, lse, segments.first, segments.lengths, *segments.strides(per_slot), h, segments.longest,
                G=g, BLOCK_G=launch.next_power_of_two(g), BLOCK_N=block, num_warps=4,
            )  # fmt: skip
    return Decoded(out, lse, per_slot)
