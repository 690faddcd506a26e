"""Flash decoding over codes: their bytes are read once, and codes become numbers in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels import launch
from keepkv.kernels.addressing import finite, load_held, log_sum, segment, voted
from keepkv.kernels.codes import Codes
from keepkv.kernels.decode.join import join, normalise
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.logits import KeySlots
from keepkv.kernels.packed.numbers import TRICKS, arguments, column, constants, load_vectors
from keepkv.kernels.segments import Segments

RESIDENT = 3  # programs that a multiprocessor of an H100 holds at once: registers and shared memory end there
WAVES = 4
PARTS = 16  # of a head on average, at most, where there are waves


@triton.jit
def _dot(x, y, UPCAST: tl.constexpr):
    if UPCAST:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit(do_not_specialize=["slots", "chunk", "ahead"])
def _attend_codes(
    q, k, k_scale, k_zero, k_levels, v, v_scale, v_zero, v_levels, votes, positions, first, lengths, out, lse, per_slot,
    s_qb, s_qh, s_kb, s_kh, s_ks, s_ab, s_ah, s_as, s_bb, s_bh, s_bs, s_vb, s_vh, s_vs, s_cb, s_ch, s_cs,
    s_db, s_dh, s_ds, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, s_ub, s_uh, s_ug,
    scaling, softcap, heads, slots, chunk, ahead,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    K_BITS: tl.constexpr, K_SIGNED: tl.constexpr, K_GROUP: tl.constexpr,
    K_TRICK: tl.constexpr, K_OFFSET: tl.constexpr, K_UNIT: tl.constexpr,
    V_BITS: tl.constexpr, V_SIGNED: tl.constexpr, V_GROUP: tl.constexpr,
    V_TRICK: tl.constexpr, V_OFFSET: tl.constexpr, V_UNIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one (row, head): its softmax output, log-sum-exp, and logits if asked for.

    With one scale and zero a slot: q·k = scale·(q·code) + zero·Σq, and Σ p·v = Σ w·code + Σ p·zero with w = p·scale.
    Products take w rounded to the dtype of q. ``rest`` makes up for what that takes from a code of middle size, so that
    codes, which are not centred, lose no more than values would.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head, start, count = segment(pair, heads, first, lengths, slots)
    begin = part * chunk
    end = tl.minimum(begin + chunk, count)

    g = tl.arange(0, BLOCK_G)
    d, e = column(tl.arange(0, BLOCK_D), K_BITS), column(tl.arange(0, BLOCK_DV), V_BITS)
    q_at = q + row * s_qb + (head * G + g[:, None]) * s_qh + d[None, :]
    query = tl.load(q_at, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    q_sum = tl.sum(query.to(tl.float32), 1)
    MIDDLE: tl.constexpr = (2**V_BITS - 1) / 2 if v_levels is None and not V_SIGNED and V_GROUP == DV else 0.0
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    rest = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        inside = n < end
        slot = start + n
        held, vote = load_held(votes, positions, row, head, slot, inside, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps)
        key, scale, zero = load_vectors(
            k, k_scale, k_zero, k_levels, ahead, row, head, slot, held,
            s_kb, s_kh, s_ks, s_ab, s_ah, s_as, s_bb, s_bh, s_bs,
            query.dtype, K_BITS, K_SIGNED, D, K_GROUP, BLOCK_D, K_TRICK,
        )  # fmt: skip
        scale *= scaling
        u = _dot(query, tl.trans(key), UPCAST) * (K_UNIT * scale)[None, :]
        u += q_sum[:, None] * (zero * scaling - K_OFFSET * scale)[None, :]
        u = voted(u, vote, softcap, votes is not None, SOFTCAP)
        u = tl.where((held >= 0)[None, :], u, float("-inf"))
        if per_slot is not None:
            u_at = per_slot + row * s_ub + head * s_uh + g[:, None] * s_ug + slot[None, :]
            tl.store(u_at, u, mask=(g < G)[:, None] & inside[None, :])
        higher = tl.maximum(top, tl.max(u, 1))
        shift = finite(higher)
        share = tl.exp(u - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(share, 1)
        value, scale, zero = load_vectors(
            v, v_scale, v_zero, v_levels, ahead, row, head, slot, held,
            s_vb, s_vh, s_vs, s_cb, s_ch, s_cs, s_db, s_dh, s_ds,
            query.dtype, V_BITS, V_SIGNED, DV, V_GROUP, BLOCK_DV, V_TRICK,
        )  # fmt: skip
        largest = 1.0
        if query.dtype == tl.float16:  # whose numbers do not reach to small products
            largest = tl.maximum(tl.max(tl.abs(scale), 0), 1e-30)
        weight = (share * (scale / largest)[None, :]).to(query.dtype)
        acc = acc * shrink[:, None] + (largest * V_UNIT) * _dot(weight, value, UPCAST)
        middle = share * (zero + MIDDLE * scale)[None, :]
        rest = rest * shrink + tl.sum(middle - largest * (MIDDLE + V_OFFSET) * weight.to(tl.float32), 1)
        top = higher

    where = (pair.to(tl.int64) * tl.num_programs(1) + part) * G + g
    tl.store(lse + where, log_sum(top, total), mask=g < G)
    mean = (acc + rest[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + where[:, None] * DV + e[None, :], mean, mask=(g < G)[:, None] & (e < DV)[None, :])


def decode_packed(query: Tensor, slots: KeySlots, keys: Codes, values: Codes, weights: bool) -> Decoded:
    """As ``reference.decode_packed``, but that codes meet the query in its dtype; the output is float32."""
    query, segments = launch.rowwise(query), slots.segments
    b, heads, d = query.shape
    dv, h = values.width, segments.heads
    pairs, g = b * h, heads // h
    block_n = _slots_per_tile(query, keys, values)
    chunk, parts = launch.split(segments.longest, segments.total, block_n, _programs(query, segments))
    out, lse = (query.new_empty(b, heads, *width, dtype=torch.float32) for width in ((dv,), ()))
    parts_out = query.new_empty(pairs, parts, g, dv, dtype=torch.float32)
    parts_lse = query.new_empty(pairs, parts, g, dtype=torch.float32)
    per_slot = segments.empty_per_query(slots.keys, g, torch.float32) if weights else None
    (_, *given), (_, _, _, *strides) = launch.slot_arguments(slots)
    key_fields, key_strides = arguments(keys, segments, query.dtype)
    value_fields, value_strides = arguments(values, segments, query.dtype)
    ahead = TRICKS.get(query.dtype, (0,))[0] * 0x10001
    with launch.device_of(query):
        _attend_codes[pairs, parts](
            query, *key_fields, *value_fields, *given, parts_out, parts_lse, per_slot,
            *query.stride()[:2], *key_strides, *value_strides, *strides, *segments.strides(per_slot),
            slots.scaling, slots.softcap or 0.0, h, segments.longest, chunk, ahead,
            G=g, D=d, DV=dv, **constants("K", keys, query.dtype), **constants("V", values, query.dtype),
            BLOCK_G=launch.next_power_of_two(g, launch.MIN_DOT), BLOCK_N=block_n,
            BLOCK_D=launch.next_power_of_two(d, launch.MIN_DOT), BLOCK_DV=launch.next_power_of_two(dv, launch.MIN_DOT),
            SOFTCAP=slots.softcap is not None, UPCAST=launch.upcast(query), num_warps=4, num_stages=3,
        )  # fmt: skip
        join(parts_out, parts_lse, slots.sinks, out, lse, h)
        if per_slot is not None:
            normalise(per_slot, lse, segments)
    return Decoded(out, lse, per_slot)


def _slots_per_tile(query: Tensor, keys: Codes, values: Codes) -> int:
    """Twice as many slots as ``decode_attention`` takes where few bits make room for them, since what each tile costs
    beside is then shared by more; half as many in float32, which is multiplied in registers."""
    size = launch.TILE_BYTES
    if query.dtype == torch.float32:
        size //= 2
    elif max(keys.bits, values.bits) <= 4:
        size *= 2
    return launch.slots_per_tile(query, keys.width, values.width, size=size)


def _programs(query: Tensor, segments: Segments) -> int:
    """As many as run at once; where heads are many, several times as many: those that begin last then end soon after
    the others, and a head still has few parts to join."""
    waves = launch.programs(query.device, RESIDENT * WAVES)
    return waves if waves <= PARTS * segments.rows * segments.heads else launch.programs(query.device, RESIDENT)
