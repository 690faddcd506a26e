"""Two passes over the queries: sums of blocks, and, once these are added up, cosines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.layout import rowwise
from keepkv.kernels.tiles import on, power
from keepkv.spread import GOLDEN


@triton.jit(do_not_specialize=["tokens"])
def _block_sums(
    q, positions, seen, begin, part, sums, s_qb, s_qh, s_qt, s_part, heads, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ of the queries of one block of positions of one query head, with what is known of the first one."""
    pair, number = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    low = (tl.load(begin + row) // BLOCK + number) * BLOCK
    column = low - tl.load(seen + row) + tokens  # of position ``low``, could it be before this forward
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, BLOCK, BLOCK_T):
        inside = first + tl.arange(0, BLOCK_T)
        t = column + inside
        there = (inside < BLOCK) & (t >= 0) & (t < tokens)
        asked = tl.load(positions + row * tokens + t, mask=there, other=-1)
        at = q + row * s_qb + head * s_qh + t[:, None] * s_qt + d[None, :]
        query = tl.load(at, mask=(asked >= 0)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(query.to(tl.float32), 0)
    if number == 0:
        total += tl.load(part + row * s_part + head * D + d, mask=d < D, other=0.0)
    tl.store(sums + (pair.to(tl.int64) * tl.num_programs(1) + number) * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["blocks"])
def _add_up(
    seen, begin, whole, part, sums, before, s_part, heads, blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Directions of what comes before each block of a query head; moves ``whole`` and ``part`` on."""
    pair = tl.program_id(0)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = row * s_part + head * D + d
    last = tl.load(seen + row) // BLOCK - tl.load(begin + row) // BLOCK
    total = tl.load(whole + here, mask=d < D, other=0.0)
    for number in range(blocks):
        at = (pair.to(tl.int64) * blocks + number) * D + d
        length = tl.sqrt(tl.sum(total * total, 0))
        tl.store(before + at, total / tl.maximum(length, 1e-12), mask=d < D)
        own = tl.load(sums + at, mask=d < D, other=0.0)
        if number == last:
            tl.store(whole + here, total, mask=d < D)
            tl.store(part + here, own, mask=d < D)
        total += own


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _cosines(
    q, positions, begin, before, out, s_qb, s_qh, s_qt, heads, tokens, blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    GOLDEN: tl.constexpr,
):  # fmt: skip
    """Of a tile of tokens of one query head."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    t, d = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    asked = tl.load(positions + row * tokens + t, mask=t < tokens, other=-1)
    real = asked >= 0
    seen = real[:, None] & (d < D)[None, :]
    query = tl.load(q + row * s_qb + head * s_qh + t[:, None] * s_qt + d[None, :], mask=seen, other=0.0).to(tl.float32)
    place = tl.where(real, asked // BLOCK - tl.load(begin + row) // BLOCK, 0)
    direction = tl.load(before + (pair.to(tl.int64) * blocks + place[:, None]) * D + d[None, :], mask=seen, other=0.0)
    length = tl.sqrt(tl.sum(query * query, 1))
    cosine = tl.sum(query * direction, 1) / tl.maximum(length, 1e-12)
    number = ((asked.to(tl.int64) * G + head % G) * GOLDEN) & 0xFFFFFFFF
    cosine = tl.where(asked < BLOCK, 2.0 + number.to(tl.float32) * (1.0 / 4294967296.0), cosine)
    here = out + ((pair // G).to(tl.int64) * tokens + t) * G + head % G
    tl.store(here, tl.where(real, cosine, float("inf")), mask=t < tokens)


def likeness(
    queries: Tensor, positions: Tensor, seen: Tensor, whole: Tensor, part: Tensor, groups: int, block: int
) -> Tensor:
    """As ``kernels.likeness.reference``."""
    queries, positions, seen = rowwise(queries), positions.contiguous(), seen.contiguous()
    b, heads, t, d = queries.shape
    out = torch.empty(b, heads // groups, t, groups, dtype=torch.float32, device=queries.device)
    if out.numel() == 0:
        return out
    begin, blocks = seen - (positions >= 0).sum(-1), t // block + 2
    sums = torch.empty(b * heads, blocks, d, dtype=torch.float32, device=queries.device)
    before, at = torch.empty_like(sums), queries.stride()[:3]
    sizes = {"D": d, "BLOCK": block, "BLOCK_D": power(d), "num_warps": 4}
    with on(queries):
        _block_sums[b * heads, blocks](
            queries, positions, seen, begin, part, sums, *at, part.stride(0), heads, t, BLOCK_T=32, **sizes
        )
        _add_up[(b * heads,)](seen, begin, whole, part, sums, before, part.stride(0), heads, blocks, **sizes)
        _cosines[b * heads, -(-t // 32)](
            queries, positions, begin, before, out, *at, heads, t, blocks, G=groups, BLOCK_T=32, GOLDEN=GOLDEN, **sizes
        )
    return out
