"""Flash decoding over blocks: as ``decode.triton``, with each slot's address from counts and a block table."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels import launch
from keepkv.kernels.addressing import finite, log_sum, logits
from keepkv.kernels.decode.join import join
from keepkv.kernels.decode.reference import Decoded
from keepkv.kernels.paged.slots import PagedSlots


@triton.jit
def _place(n, event, count, first, first_block, packed, own, lanes, SIZE: tl.constexpr):
    """Logical block, lane and offset of slots ``n`` (N,) of one lane, as ``PagedSlots.places``."""
    tail = tl.minimum(count, event % SIZE)
    main = count - tail
    place = (main + SIZE - 1) // SIZE * SIZE - main + n
    page = first + place // SIZE
    held, in_tail = n < count, n >= main
    straight = tl.where(held, event - count + n, event + n - count)
    moved = held & (packed != 0)
    logical = tl.where(moved, tl.where(in_tail, event // SIZE, first_block + page // lanes), straight // SIZE)
    lane = tl.where(moved & (n < main), page % lanes, own)
    offset = tl.where(moved, tl.where(in_tail, event % SIZE - tail + n - main, place % SIZE), straight % SIZE)
    return logical, lane, offset, held


@triton.jit(do_not_specialize=["chunk", "own", "lanes"])
def _attend_pages(
    q, k, v, votes, table, event, end, counts, first_page, first_block, packed, out, lse,
    s_qr, s_qh, s_kl, s_kb, s_kh, s_kn, s_vl, s_vb, s_vh, s_vn, s_nl, s_nb, s_nh, s_nn, s_tr,
    scaling, softcap, heads, own, lanes, chunk,
    SIZE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One part of the slots of one (row, head): its softmax output and log-sum-exp."""
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    mine = own + head
    since = tl.load(event + row)
    held = tl.load(counts + row * lanes + mine)
    first = tl.load(first_page + row * lanes + mine)
    begins, ragged = tl.load(first_block + row), tl.load(packed + row)
    begin = part * chunk
    stop = tl.minimum(begin + chunk, held + tl.load(end + row) - since)

    g, d, e = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + row * s_qr + (head * G + g[:, None]) * s_qh + d[None, :]
    query = tl.load(q_at, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_DV), tl.float32)
    for at in range(begin, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        inside = n < stop
        logical, lane, offset, kept = _place(n, since, held, first, begins, ragged, mine, lanes, SIZE)
        block = tl.load(table + row * s_tr + logical, mask=inside, other=0).to(tl.int64)
        layer, its = (lane // heads).to(tl.int64), (lane % heads).to(tl.int64)
        k_at = k + layer * s_kl + block * s_kb + its * s_kh + offset * s_kn
        key = tl.load(k_at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        vote = tl.zeros((BLOCK_N,), tl.float32)
        if votes is not None:
            n_at = votes + layer * s_nl + block * s_nb + its * s_nh + offset * s_nn
            vote = tl.load(n_at, mask=inside & kept, other=0.0)
        u = logits(query, key, vote, scaling, softcap, votes is not None, SOFTCAP, UPCAST)
        u = tl.where(inside[None, :], u, float("-inf"))
        higher = tl.maximum(top, tl.max(u, 1))
        shift = finite(higher)
        share = tl.exp(u - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(share, 1)
        v_at = v + layer * s_vl + block * s_vb + its * s_vh + offset * s_vn
        value = tl.load(v_at[:, None] + e[None, :], mask=inside[:, None] & (e < DV)[None, :], other=0.0)
        if UPCAST:
            value = value.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        top = higher

    where = (pair.to(tl.int64) * tl.num_programs(1) + part) * G + g
    tl.store(lse + where, log_sum(top, total), mask=g < G)
    mean = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + where[:, None] * DV + e[None, :], mean, mask=(g < G)[:, None] & (e < DV)[None, :])


def paged_attention(
    query: Tensor, slots: PagedSlots, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Decoded:
    """As ``reference.paged_attention``."""
    query, keys, values, votes = launch.rowwise(query), slots.keys, slots.values, slots.log_votes
    rows, heads, d = query.shape
    h, size, dv = slots.heads, keys.shape[3], values.shape[-1]
    pairs, g = rows * h, heads // h
    block_n = launch.slots_per_tile(keys, d, dv)
    chunk, parts = launch.split(slots.longest, pairs * slots.longest, block_n, launch.programs(query.device))
    out, lse = query.new_empty(rows, heads, dv), query.new_empty(rows, heads, dtype=torch.float32)
    parts_out = query.new_empty(pairs, parts, g, dv, dtype=torch.float32)
    parts_lse = query.new_empty(pairs, parts, g, dtype=torch.float32)
    numbers = (slots.event, slots.end, slots.counts, slots.pages(), slots.first_block, slots.packed)
    with launch.device_of(query):
        _attend_pages[pairs, parts](
            query, keys, values, votes, slots.table, *(x.int().contiguous() for x in numbers), parts_out, parts_lse,
            *query.stride()[:2], *keys.stride()[:4], *values.stride()[:4],
            *((0, 0, 0, 0) if votes is None else votes.stride()), slots.table.stride(0),
            scaling, softcap or 0.0, h, slots.layer * h, slots.lanes, chunk,
            SIZE=size, G=g, D=d, DV=dv, BLOCK_G=launch.next_power_of_two(g, launch.MIN_DOT), BLOCK_N=block_n,
            BLOCK_D=launch.next_power_of_two(d, launch.MIN_DOT), BLOCK_DV=launch.next_power_of_two(dv, launch.MIN_DOT),
            SOFTCAP=softcap is not None, UPCAST=launch.upcast(query), num_warps=4, num_stages=2,
        )  # fmt: skip
        join(parts_out, parts_lse, sinks, out, lse, h)
    return Decoded(out, lse, None)
