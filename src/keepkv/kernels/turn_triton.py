"""One pass: every vector is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.layout import rowwise
from keepkv.kernels.rope_triton import content
from keepkv.kernels.tiles import on, power
from keepkv.rope import Rope


@triton.jit(do_not_specialize=["tokens"])
def _turn(
    x, by, inv_freq, out, s_xb, s_xh, s_xt, half, heads, tokens,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A tile of vectors of one head."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    t, d = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.arange(0, BLOCK_D)
    here = t < tokens
    step = tl.load(by + pair.to(tl.int64) * tokens + t, mask=here, other=0)
    at = x + row * s_xb + head * s_xh + t[:, None] * s_xt
    turned = content(at, here, -step, d, d < D, inv_freq, half, 1.0, True, INTERLEAVED)
    where = out + (pair.to(tl.int64) * tokens + t[:, None]) * D + d[None, :]
    tl.store(where, turned, mask=here[:, None] & (d < D)[None, :])


def turn(x: Tensor, by: Tensor, rope: Rope) -> Tensor:
    """As ``Rope.turn``."""
    x, by = rowwise(x), by.contiguous()
    b, h, t, d = x.shape
    out = torch.empty(b, h, t, d, dtype=x.dtype, device=x.device)
    if out.numel():
        with on(x):
            _turn[b * h, -(-t // 32)](
                x, by, rope.inv_freq, out, *x.stride()[:3], rope.dims // 2, h, t,
                D=d, BLOCK_T=32, BLOCK_D=power(d), INTERLEAVED=rope.interleaved, num_warps=4,
            )  # fmt: skip
    return out
