"""First and second moments of a sample of the keys, then the norms of all, whitened by them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.core.rope import Rope
from keepkv.kernels.launch import MIN_DOT, device_of, next_power_of_two, programs, rowwise
from keepkv.kernels.leverage.reference import whitening
from keepkv.kernels.leverage.rope_triton import content

BLOCK_C = 32  # dimensions of a tile of the covariance
SHARE = 32  # slots per dimension for each part of the sums: of bfloat16 keys and values they take 1/SHARE at most


@triton.jit
def _newest(
    k_row, p_row, slots, s_ks, s_ps, c, inside, inv_freq, half, unscale, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Content (1,C) of the newest slot, 0 where it is empty."""
    n = tl.zeros((1,), tl.int64) + slots - 1
    held = tl.load(p_row + n * s_ps)
    return content(k_row + n[:, None] * s_ks, held >= 0, held, c, inside, inv_freq, half, unscale, ROPE, INTERLEAVED)


@triton.jit(do_not_specialize=["slots", "size", "chunk"])
def _moments(
    k, positions, votes, at, inv_freq, out, s_kb, s_kh, s_ks, s_pb, s_ph, s_ps, s_nb, s_nh, s_ns,
    unscale, half, heads, slots, size, chunk,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Σ w y yᵀ, Σ w y and Σ w over a part of the ``size`` slots ``at`` of a (row, head), y the contents less that of
    the newest slot: near the mean, so that the covariance does not drown in it. A program makes one tile of the matrix
    and its mirror.
    """
    pair, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    i = tile * 0
    for r in tl.static_range(1, -(-D // BLOCK_C)):  # tiles are numbered along the rows of the lower triangle
        i += (tile >= r * (r + 1) // 2).to(tl.int32)
    j = tile - i * (i + 1) // 2
    ci, cj = i * BLOCK_C + tl.arange(0, BLOCK_C), j * BLOCK_C + tl.arange(0, BLOCK_C)
    k_row, p_row = k + row * s_kb + head * s_kh, positions + row * s_pb + head * s_ph
    x_0 = _newest(k_row, p_row, slots, s_ks, s_ps, ci, ci < D, inv_freq, half, unscale, ROPE, INTERLEAVED)
    y_0 = _newest(k_row, p_row, slots, s_ks, s_ps, cj, cj < D, inv_freq, half, unscale, ROPE, INTERLEAVED)
    square = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    first = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, size), BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        drawn = n < size
        if at is not None:
            n = tl.load(at + pair.to(tl.int64) * size + n, mask=drawn, other=-1)
            drawn = n >= 0
        held = tl.load(p_row + n * s_ps, mask=drawn, other=-1)
        some = held >= 0
        w = some.to(tl.float32)
        if votes is not None:
            w = tl.where(some, tl.exp(tl.load(votes + row * s_nb + head * s_nh + n * s_ns, mask=some, other=0.0)), 0.0)
        key = k_row + n[:, None] * s_ks
        x = content(key, some, held, ci, ci < D, inv_freq, half, unscale, ROPE, INTERLEAVED) - x_0
        y = content(key, some, held, cj, cj < D, inv_freq, half, unscale, ROPE, INTERLEAVED) - y_0
        x = x * w[:, None]
        square += tl.dot(tl.trans(x), tl.where(some[:, None], y, 0.0), input_precision="tf32x3")
        first += tl.sum(x, 0)
        count += w
    here = out + (pair.to(tl.int64) * tl.num_programs(1) + part) * (D * D + D + 1)
    inside = (ci < D)[:, None] & (cj < D)[None, :]
    tl.store(here + ci[:, None] * D + cj[None, :], square, mask=inside)
    if i != j:
        tl.store(here + cj[None, :] * D + ci[:, None], square, mask=inside)
    if j == 0:
        tl.store(here + D * D + ci, first, mask=ci < D)
        if i == 0:
            tl.store(here + D * D + D, tl.sum(count, 0))


@triton.jit(do_not_specialize=["slots"])
def _norms(
    k, positions, inv_freq, means, white, out, s_kb, s_kh, s_ks, s_pb, s_ph, s_ps, s_wp, s_wc, s_wd,
    unscale, half, heads, slots,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """‖W(y − mean)‖² of a tile of slots; y as in ``_moments``."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    row, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    d, n = tl.arange(0, BLOCK_D), (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k_row, p_row = k + row * s_kb + head * s_kh, positions + row * s_pb + head * s_ph
    centre = _newest(k_row, p_row, slots, s_ks, s_ps, d, d < D, inv_freq, half, unscale, ROPE, INTERLEAVED)
    centre += tl.load(means + pair * D + d, mask=d < D, other=0.0)[None, :]
    held = tl.load(p_row + n * s_ps, mask=n < slots, other=-1)
    some = held >= 0
    x = content(k_row + n[:, None] * s_ks, some, held, d, d < D, inv_freq, half, unscale, ROPE, INTERLEAVED)
    x = tl.where(some[:, None], x - centre, 0.0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, D, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        w_at = white + pair.to(tl.int64) * s_wp + c[None, :] * s_wc + d[:, None] * s_wd
        w = tl.load(w_at, mask=(c < D)[None, :] & (d < D)[:, None], other=0.0)
        y = tl.dot(x, w, input_precision="tf32x3")
        total += tl.sum(y * y, 1)
    tl.store(out + pair.to(tl.int64) * slots + n, tl.where(some, total, 0.0), mask=n < slots)


def key_leverage(
    keys: Tensor, positions: Tensor, log_votes: Tensor | None, ridge: float, rope: Rope | None, at: Tensor | None
) -> Tensor:
    """As ``reference.key_leverage``."""
    keys = rowwise(keys)
    (b, h, s, d), pairs = keys.shape, keys.shape[0] * keys.shape[1]
    out = torch.empty(b, h, s, dtype=torch.float32, device=keys.device)
    if out.numel() == 0:
        return out
    block_c = min(BLOCK_C, next_power_of_two(d, MIN_DOT))
    rows = -(-d // block_c)
    tiles = rows * (rows + 1) // 2
    size = s if at is None else at.shape[-1]
    parts = max(1, min(programs(keys.device) // (pairs * tiles), size // (SHARE * d)))
    chunk = -(-size // parts)
    sums = torch.empty(pairs, parts, d * d + d + 1, dtype=torch.float32, device=keys.device)
    votes = None if log_votes is None else log_votes.float()
    none = (0, 0, 0)
    steps, held = keys.stride()[:3], positions.stride()
    frequencies, half, unscale = (None, 0, 1.0) if rope is None else (rope.inv_freq, rope.dims // 2, 1 / rope.scaling)
    layout = {"D": d, "ROPE": rope is not None, "INTERLEAVED": rope is not None and rope.interleaved, "num_warps": 8}
    with device_of(keys):
        _moments[pairs, parts, tiles](
            keys, positions, votes, None if at is None else at.contiguous(), frequencies, sums, *steps, *held,
            *(none if votes is None else votes.stride()), unscale, half, h, s, size, chunk, BLOCK_N=32,
            BLOCK_C=block_c, **layout,
        )  # fmt: skip
        moments = sums.sum(1)
        del sums  # each of these matrices is some per cent of a layer: as few at a time as can be
        moments /= moments[:, -1:].clamp(min=1e-30)
        mean = moments[:, d * d : -1].contiguous()
        sigma = moments[:, : d * d].view(-1, d, d)
        sigma.baddbmm_(mean[:, :, None], mean[:, None], alpha=-1)
        white = whitening(sigma, ridge)
        del moments, sigma
        block_n = 32 if d <= 128 else 16
        _norms[pairs, -(-s // block_n)](
            keys, positions, frequencies, mean, white, out, *steps, *held, *white.stride(),
            unscale, half, h, s, BLOCK_N=block_n, BLOCK_C=min(next_power_of_two(d, MIN_DOT), 64 if d <= 128 else 32),
            BLOCK_D=next_power_of_two(d, MIN_DOT), num_stages=2, **layout,  # few steps: more only take shared memory
        )  # fmt: skip
    return out
