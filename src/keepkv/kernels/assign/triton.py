"""Running maximum of the cosine over tiles of kept keys, for a tile of leaving ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.assign import reference
from keepkv.kernels.launch import MIN_DOT, device_of, next_power_of_two, rows_per_tile, rowwise, slots_per_tile, upcast

EPS = tl.constexpr(reference.EPS)


@triton.jit(do_not_specialize=["most_leaving", "most_targets", "slots"])
def _assign(
    k, leaving, targets, n_leaving, n_targets, into, cosine,
    s_kb, s_kh, s_ks, heads, most_leaving, most_targets, slots,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    pair, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base = k + (pair // heads) * s_kb + (pair % heads) * s_kh
    count = tl.load(n_targets + pair).to(tl.int32)
    m, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real = m < tl.load(n_leaving + pair)
    source = tl.load(leaving + pair * most_leaving + m, mask=real, other=0)
    x = tl.load(base + source[:, None] * s_ks + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    x_norm = tl.maximum(tl.sqrt(tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)), EPS)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    found = tl.full((BLOCK_M,), -1, tl.int64)
    for at in range(0, count, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        target = tl.load(targets + pair * most_targets + n, mask=n < count, other=0)
        y = tl.load(base + target[None, :] * s_ks + d[:, None], mask=(n < count)[None, :] & (d < D)[:, None], other=0.0)
        if UPCAST:
            y = y.to(tl.float32)
        y_norm = tl.maximum(tl.sqrt(tl.sum(y.to(tl.float32) * y.to(tl.float32), 0)), EPS)
        cos = tl.dot(x, y, input_precision="ieee") / y_norm[None, :] / x_norm[:, None]
        cos = tl.where((n < count)[None, :], cos, float("-inf"))
        highest = tl.max(cos, 1)
        # Targets come in ascending order: the first of equals has the lowest index, in the tile and over tiles.
        index = tl.min(tl.where(cos == highest[:, None], target[None, :], slots), 1)
        found = tl.where(highest > best, index, found)
        best = tl.maximum(best, highest)
    tl.store(into + pair * slots + source, found, mask=real)
    tl.store(cosine + pair * slots + source, best, mask=real)


def nearest_key(keys: Tensor, leaving: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.nearest_key``, in float32."""
    keys = rowwise(keys)
    b, h, s, d = keys.shape
    into = torch.full((b, h, s), -1, dtype=torch.int64, device=keys.device)
    cosine = torch.full((b, h, s), float("-inf"), dtype=torch.float32, device=keys.device)
    sources, real = reference.padded_indices(leaving)
    columns, held = reference.padded_indices(targets)
    if sources.shape[-1] == 0 or columns.shape[-1] == 0:
        return into, cosine
    block_m = rows_per_tile(keys, sources.shape[-1], d)
    with device_of(keys):
        _assign[b * h, -(-sources.shape[-1] // block_m)](
            keys, sources.contiguous(), columns.contiguous(), real.sum(-1), held.sum(-1), into, cosine,
            *keys.stride()[:3], h, sources.shape[-1], columns.shape[-1], s,
            D=d, BLOCK_M=block_m, BLOCK_N=slots_per_tile(keys, d), BLOCK_D=next_power_of_two(d, MIN_DOT),
            UPCAST=upcast(keys), num_warps=4, num_stages=2,
        )  # fmt: skip
    return into, cosine
