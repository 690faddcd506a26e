"""Each program walks one segment from left to right: what it writes lies at or before what it has read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.layout import Layout
from keepkv.kernels.tiles import on, power
from keepkv.slots import EMPTY

BLOCK_S = 128  # slots moved at a time
LINE = 128  # bytes of a slot that one program moves: whole sectors, and more programs than (row, head) pairs


@triton.jit(do_not_specialize=["slots"])
def _compact(
    x, keep, first, lengths, counts, s_xb, s_xh, s_xs, s_kb, s_kh, s_ks, heads, slots,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    pair, line = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    start = tl.zeros((), tl.int64)
    count = slots
    if first is not None:
        start = tl.load(first + pair)
        count = tl.load(lengths + pair).to(tl.int32)
    d = line * BLOCK_D + tl.arange(0, BLOCK_D)
    base = x + row * s_xb + head * s_xh + start * s_xs + d[None, :]
    new = tl.zeros((), tl.int32)
    for at in range(0, count, BLOCK_S):
        n = at + tl.arange(0, BLOCK_S)
        kept = tl.load(keep + row * s_kb + head * s_kh + (start + n) * s_ks, mask=n < count, other=0).to(tl.int32)
        to = new + tl.cumsum(kept, 0) - 1
        mask = (kept != 0)[:, None] & (d < D)[None, :]
        moved = tl.load(base + n[:, None].to(tl.int64) * s_xs, mask=mask)
        # A tile may overwrite itself: every thread must have read before any writes. Later tiles lie further right.
        tl.debug_barrier()
        tl.store(base + to[:, None].to(tl.int64) * s_xs, moved, mask=mask)
        new += tl.sum(kept, 0)
    if FILL is not None:
        tl.debug_barrier()
        for at in range(new, count, BLOCK_S):
            n = at + tl.arange(0, BLOCK_S)
            mask = (n < count)[:, None] & (d < D)[None, :]
            empty = tl.full((BLOCK_S, BLOCK_D), FILL, x.dtype.element_ty)
            tl.store(base + n[:, None].to(tl.int64) * s_xs, empty, mask=mask)
    tl.store(counts + pair, new.to(tl.int64))  # the same number from every program of a pair


def compact(fields: Mapping[str, Tensor], keep: Tensor, space: Layout) -> Tensor:
    """As ``kernels.compact.reference``."""
    counts = torch.zeros(space.rows, space.heads, dtype=torch.int64, device=keep.device)
    kept = keep.to(torch.int8)
    with on(keep):
        for name, x in fields.items():
            d = x.shape[-1] if x.dim() > keep.dim() else 1
            block_d = min(power(d), LINE // x.element_size())
            _compact[space.rows * space.heads, -(-d // block_d)](
                x, kept, space.first, space.lengths, counts, *space.strides(x), *space.strides(kept),
                space.heads, space.longest, D=d, BLOCK_S=BLOCK_S, BLOCK_D=block_d,
                FILL=EMPTY if name == "positions" else None, num_warps=4,
            )  # fmt: skip
    return counts
