"""Codes become numbers in the registers of a Triton program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels import launch
from keepkv.kernels.codes import Codes
from keepkv.kernels.segments import Segments

# The bits of a code, put into the lowest of a float of 16 bits, without a conversion: (bits ahead of them, offset,
# unit), and the float is (offset + code) / unit. In float16 it is subnormal, which tensor cores multiply exactly; in
# bfloat16 they follow those of 128, whose 7 bits of fraction hold codes of up to 4 bits.
TRICKS = {torch.float16: (0, 0.0, 2.0**24), torch.bfloat16: (0x4300, 128.0, 1.0)}


@triton.jit
def column(j, BITS: tl.constexpr):
    """Which number of a vector stands in column ``j`` of a tile: those of the two halves of a word take turns."""
    EACH: tl.constexpr = 32 // BITS
    return j // EACH * EACH + j % EACH // 2 + j % 2 * (EACH // 2)


@triton.jit
def _numbers(
    word, levels, ahead, dtype: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, TRICK: tl.constexpr
):  # fmt: skip
    """What the codes in words (N,K) int32 stand for, (N,K·32/BITS) in ``dtype``, ordered as ``column`` says.

    ahead: ``TRICKS``, in both halves of a word; where TRICK is set the numbers are as that says.
    """
    # Two codes, 16 bits apart, are cut out at once: the two halves of a register are what tensor cores take. Reshapes
    # instead of new axes: only with them the compiler keeps the codes of a word in one thread.
    N: tl.constexpr = word.shape[0]
    K: tl.constexpr = word.shape[1]
    P: tl.constexpr = 16 // BITS
    MASK: tl.constexpr = (2**BITS - 1) * 0x10001
    pair = (tl.reshape(word, (N, K, 1)) >> (BITS * tl.arange(0, P))[None, None, :]) & MASK
    if TRICK:
        pair |= ahead
    half = (tl.reshape(pair, (N, K, P, 1)) >> (16 * tl.arange(0, 2))[None, None, None, :]).to(tl.int16)
    if levels is not None:
        table = tl.load(levels + tl.arange(0, 2**BITS))
        return tl.reshape(tl.gather(table, tl.reshape(half.to(tl.int32), (N * K * P * 2,)), 0), (N, K * P * 2))
    elif TRICK:
        return tl.reshape(half, (N, K * P * 2)).to(dtype, bitcast=True)
    else:
        whole = tl.reshape(half, (N, K * P * 2)).to(tl.int32)
        if SIGNED:
            whole = (whole ^ 128) - 128
        return whole.to(tl.float32).to(dtype)


@triton.jit
def load_vectors(
    words, scale, zero, levels, ahead, row, head, slot, held, s_wb, s_wh, s_ws, s_sb, s_sh, s_ss, s_zb, s_zh, s_zs,
    dtype: tl.constexpr,
    BITS: tl.constexpr, SIGNED: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, BLOCK_W: tl.constexpr,
    TRICK: tl.constexpr,
):  # fmt: skip
    """Vectors of the slots (N,) as numbers (N,BLOCK_W), scales and zeros (N,): scale · number + zero; 0 if not held.

    Where there are several groups, scales and zeros are in the numbers already.
    """
    full = held >= 0
    j = tl.arange(0, BLOCK_W * BITS // 32)
    at = words + row * s_wb + head * s_wh + slot[:, None] * s_ws + j[None, :]
    word = tl.load(at, mask=full[:, None] & (j < W * BITS // 32)[None, :], other=0)
    x = _numbers(word, levels, ahead, dtype, BITS, SIGNED, TRICK)
    scale_at = scale + row * s_sb + head * s_sh + slot * s_ss
    zero_at = scale_at if zero is None else zero + row * s_zb + head * s_zh + slot * s_zs
    b = tl.zeros(slot.shape, tl.float32)
    if GROUP == W:
        a = tl.load(scale_at, mask=full, other=0.0).to(tl.float32)
        if zero is not None:
            b = tl.load(zero_at, mask=full, other=0.0).to(tl.float32)
    else:
        a = tl.full(slot.shape, 1.0, tl.float32)
        group = tl.arange(0, BLOCK_W // GROUP)
        mask = full[:, None] & (group < W // GROUP)[None, :]
        grouped = tl.reshape(x, (slot.shape[0], BLOCK_W // GROUP, GROUP)).to(tl.float32)
        grouped *= tl.load(scale_at[:, None] + group[None, :], mask=mask, other=0.0).to(tl.float32)[:, :, None]
        if zero is not None:
            grouped += tl.load(zero_at[:, None] + group[None, :], mask=mask, other=0.0).to(tl.float32)[:, :, None]
        x = tl.reshape(grouped, (slot.shape[0], BLOCK_W)).to(dtype)
    return x, a, b


def arguments(codes: Codes, segments: Segments, dtype: torch.dtype) -> tuple[tuple[Tensor | None, ...], list[int]]:
    """What kernels take of ``codes``: words, scales, zeros and levels; and the strides of the first three."""
    zero = None if codes.zero is None else launch.rowwise(codes.zero)
    fields = _words(codes.codes), launch.rowwise(codes.scale), zero
    levels = None if codes.levels is None else codes.levels.to(dtype)
    return (*fields, levels), [step for x in fields for step in segments.strides(x)]


def _words(codes: Tensor) -> Tensor:
    """Bytes (…,4·K) as int32 (…,K); copied only if slots do not begin at whole words."""
    whole = codes.stride(-1) == 1 and not any(x % 4 for x in (codes.storage_offset(), *codes.stride()[:-1]))
    return (codes if whole else codes.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def constants(name: str, codes: Codes, dtype: torch.dtype) -> dict[str, Any]:
    """BITS, SIGNED, GROUP, TRICK, OFFSET and UNIT of keys ("K") or values ("V")."""
    group = codes.width // codes.scale.shape[-1]
    _, offset, unit = TRICKS.get(dtype, (0, 0.0, 1.0))
    plain = group == codes.width and codes.levels is None and not codes.signed
    trick = dtype in TRICKS and plain and offset + 2**codes.bits <= 256
    if not trick:
        offset, unit = 0.0, 1.0
    found = {"BITS": codes.bits, "SIGNED": codes.signed, "GROUP": group, "TRICK": trick, "OFFSET": offset, "UNIT": unit}
    return {f"{name}_{one}": x for one, x in found.items()}
