"""RoPE inside kernels: whatever its layout, a head's dimension turns with one partner."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def partners(c, half, INTERLEAVED: tl.constexpr):
    """Of dimensions c of which the first 2·half turn: the partner, the index of the frequency, and the sign with which
    the partner enters when the rotation is undone."""
    if INTERLEAVED:
        first = c % 2 == 0
        other = tl.where(first, c + 1, c - 1)
        index = c // 2
    else:
        first = c < half
        other = tl.where(first, c + half, c - half)
        index = tl.where(first, c, c - half)
    turns = c < 2 * half
    return tl.where(turns, other, c), tl.where(turns, index, 0), tl.where(first, 1.0, -1.0), turns


@triton.jit
def circle(angle):
    """cos and sin, to 1e-7, of angles below 10⁵ or so: without the path that the library's take for larger ones, which
    needs more registers than the rest of a kernel. Reduced to ±π/4 in three steps, then Cephes' polynomials."""
    k = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - k * 1.5703125
    r = r - k * 4.837512969970703e-4
    r = r - k * 7.549789948768648e-8
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = k.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def content(
    at, mask, where, c, inside, inv_freq, half, unscale, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Dimensions c, where ``inside``, of the vectors (N,1) that ``at`` points to, before RoPE at positions ``where``
    (N,): float32 (N,C), 0 where ``mask`` (N,) is false."""
    seen = mask[:, None] & inside[None, :]
    x = tl.load(at + c[None, :], mask=seen, other=0.0).to(tl.float32)
    if ROPE:
        other, index, sign, turns = partners(c, half, INTERLEAVED)
        turning = seen & turns[None, :]
        y = tl.load(at + other[None, :], mask=turning, other=0.0).to(tl.float32)
        angle = where[:, None].to(tl.float32) * tl.load(inv_freq + index, mask=inside & turns, other=0.0)[None, :]
        cos, sin = circle(angle)
        turned = (x * cos + y * sign[None, :] * sin) * unscale
        x = tl.where(turning, turned, x)
    return x
