"""Flash decoding: slots are split over programs, each of which serves all query heads of a KV head at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.decode import Decoded
from keepkv.kernels.layout import Layout, room, room_strides, rowwise
from keepkv.kernels.tiles import MIN_DOT, on, power, slots_per_tile, split, upcast


@triton.jit(do_not_specialize=["slots", "chunk"])
def _attend(
    q, k, v, votes, positions, first, lengths, out, lse, logits,
    s_qb, s_qh, s_kb, s_kh, s_ks, s_vb, s_vh, s_vs, s_nb, s_nh, s_ns, s_pb, s_ph, s_ps, s_ub, s_uh, s_ug,
    scaling, softcap, heads, slots, chunk,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one (row, head): its softmax output, log-sum-exp, and logits if asked for."""
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = tl.zeros((), tl.int64)
    count = slots
    if first is not None:
        start = tl.load(first + pair)
        count = tl.load(lengths + pair).to(tl.int32)
    begin = part * chunk
    end = tl.minimum(begin + chunk, count)

    g, d, e = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + row * s_qb + (head * G + g[:, None]) * s_qh + d[None, :]
    query = tl.load(q_at, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        inside = n < end
        slot = start + n
        if positions is not None:
            held = tl.load(positions + row * s_pb + head * s_ph + slot * s_ps, mask=inside, other=-1) >= 0
        else:
            held = inside
        # Empty slots are never read, whatever garbage they hold.
        k_at = k + row * s_kb + head * s_kh + slot[None, :] * s_ks + d[:, None]
        key = tl.load(k_at, mask=held[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
        u = tl.dot(query, key, input_precision="ieee") * scaling
        if SOFTCAP:
            u = softcap * (2 * tl.sigmoid(2 * u / softcap) - 1)  # tanh
        if votes is not None:
            u += tl.load(votes + row * s_nb + head * s_nh + slot * s_ns, mask=held, other=0.0)[None, :]
        u = tl.where(held[None, :], u, float("-inf"))
        if logits is not None:
            u_at = logits + row * s_ub + head * s_uh + g[:, None] * s_ug + slot[None, :]
            tl.store(u_at, u, mask=(g < G)[:, None] & inside[None, :])
        higher = tl.maximum(top, tl.max(u, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # of all empty: −inf − −inf would be NaN
        share = tl.exp(u - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(share, 1)
        v_at = v + row * s_vb + head * s_vh + slot[:, None] * s_vs + e[None, :]
        value = tl.load(v_at, mask=held[:, None] & (e < DV)[None, :], other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        top = higher

    some = total > 0
    where = (pair.to(tl.int64) * tl.num_programs(1) + part) * G + g
    tl.store(lse + where, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=g < G)
    mean = acc / tl.where(some, total, 1.0)[:, None]
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
    logits, lse, first, lengths, s_ub, s_uh, s_ug, heads, slots,
    G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits to attention weights, in place."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = tl.zeros((), tl.int64)
    count = slots
    if first is not None:
        start = tl.load(first + pair)
        count = tl.load(lengths + pair).to(tl.int32)
    g, n = tl.arange(0, BLOCK_G), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (g < G)[:, None] & (n < count)[None, :]
    at = logits + row * s_ub + head * s_uh + g[:, None] * s_ug + (start + n)[None, :]
    z = tl.load(lse + pair.to(tl.int64) * G + g, mask=g < G, other=0.0)
    z = tl.where(z == float("-inf"), 0.0, z)
    u = tl.load(at, mask=mask, other=float("-inf"))
    tl.store(at, tl.exp(u - z[:, None]), mask=mask)


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_votes: Tensor | None,
    positions: Tensor | None,
    space: Layout,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    weights: bool,
) -> Decoded:
    """As ``kernels.decode.reference``."""
    query, keys, values = rowwise(query), rowwise(keys), rowwise(values)
    b, heads, d = query.shape
    dv, h = values.shape[-1], space.heads
    pairs, g = b * h, heads // h
    block_n = slots_per_tile(keys, d, dv)
    chunk, parts = split(space.longest, space.total, block_n, query.device)
    out, lse = query.new_empty(b, heads, dv), query.new_empty(b, heads, dtype=torch.float32)
    parts_out = query.new_empty(pairs, parts, g, dv, dtype=torch.float32)
    parts_lse = query.new_empty(pairs, parts, g, dtype=torch.float32)
    logits = room(space, keys, g, torch.float32) if weights else None
    votes = None if log_votes is None else log_votes.float()
    none = (0, 0, 0)
    with on(query):
        _attend[pairs, parts](
            query, keys, values, votes, positions, space.first, space.lengths, parts_out, parts_lse, logits,
            *query.stride()[:2], *space.strides(keys), *space.strides(values),
            *(none if votes is None else space.strides(votes)),
            *(none if positions is None else space.strides(positions)),
            *(none if logits is None else room_strides(space, logits)),
            scaling, softcap or 0.0, h, space.longest, chunk,
            G=g, D=d, DV=dv, BLOCK_G=power(g, MIN_DOT), BLOCK_N=block_n,
            BLOCK_D=power(d, MIN_DOT), BLOCK_DV=power(dv, MIN_DOT),
            SOFTCAP=softcap is not None, UPCAST=upcast(query), num_warps=4, num_stages=2,
        )  # fmt: skip
        _combine[pairs, g](parts_out, parts_lse, sinks, out, lse, h, parts, G=g, DV=dv, BLOCK_DV=power(dv), num_warps=1)
        if logits is not None:
            block = 512
            _normalise[pairs, max(1, -(-space.longest // block))](
                logits, lse, space.first, space.lengths, *room_strides(space, logits), h, space.longest,
                G=g, BLOCK_G=power(g), BLOCK_N=block, num_warps=4,
            )  # fmt: skip
    return Decoded(out, lse, logits)
