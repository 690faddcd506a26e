"""What follows the parts of a split softmax: they are joined, and logits become weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.addressing import finite, segment
from keepkv.kernels.launch import next_power_of_two
from keepkv.kernels.segments import Segments

BLOCK = 512  # slots that one program normalises


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


def join(parts_out: Tensor, parts_lse: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, heads: int) -> None:
    """Join the parts (B·H,parts,G,Dv) with log-sum-exps (B·H,parts,G) into out (B,Hq,Dv) and lse (B,Hq); heads: H."""
    pairs, parts, g, dv = parts_out.shape
    _combine[pairs, g](
        parts_out, parts_lse, sinks, out, lse, heads, parts,
        G=g, DV=dv, BLOCK_DV=next_power_of_two(dv), num_warps=1,
    )  # fmt: skip


def normalise(per_slot: Tensor, lse: Tensor, segments: Segments) -> None:
    """Logits (B,H,G,S), or (G,N), to attention weights, in place."""
    pairs = segments.rows * segments.heads
    g = lse.numel() // pairs
    _normalise[pairs, max(1, -(-segments.longest // BLOCK))](
        per_slot, lse, segments.first, segments.lengths, *segments.strides(per_slot), segments.heads, segments.longest,
        G=g, BLOCK_G=next_power_of_two(g), BLOCK_N=BLOCK, num_warps=4,
    )  # fmt: skip
