"""One program per vector that is picked: it is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.layout import rowwise
from keepkv.kernels.tiles import on, power


@triton.jit(do_not_specialize=["size", "tokens"])
def _pick(
    chosen, held, order, q, positions, out, out_order, s_qb, s_qh, s_qt, heads, size, tokens,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pair, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head, d = pair // heads, pair % heads, tl.arange(0, BLOCK_D)
    place = tl.load(chosen + pair * size + r)
    old = place < size
    index = tl.maximum(place - size, 0)
    token, group = index // G, index % G
    mask = d < D
    kept = tl.load(held + (pair * size + place) * D + d, mask=mask & old, other=0.0)
    new = tl.load(q + row * s_qb + (head * G + group) * s_qh + token * s_qt + d, mask=mask & (place >= size), other=0.0)
    was = tl.load(order + pair * size + place, mask=old, other=0)
    asked = tl.load(positions + row * tokens + token)
    tl.store(out + (pair * size + r) * D + d, tl.where(old, kept, new), mask=mask)
    tl.store(out_order + pair * size + r, tl.where(old, was, asked * G + group))


def pick(chosen: Tensor, held: Tensor, order: Tensor, queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """As ``kernels.pick.reference``."""
    chosen, held, order, positions = (x.contiguous() for x in (chosen, held, order, positions))
    queries, (b, h, size, d), (_, heads, t, _) = rowwise(queries), held.shape, queries.shape
    out, out_order = torch.empty_like(held), torch.empty_like(order)
    if size:
        with on(held):
            _pick[b * h, size](
                chosen, held, order, queries, positions, out, out_order, *queries.stride()[:3], h, size, t,
                G=heads // h, D=d, BLOCK_D=power(d), num_warps=1,
            )  # fmt: skip
    return out, out_order
