"""One program per group, over its slots in the order of a stable sort: a running softmax, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.kernels.addressing import finite, log_sum
from keepkv.kernels.launch import device_of, next_power_of_two, rowwise
from keepkv.kernels.merge.reference import Merged

BLOCK_M = 16  # slots at a time: most groups are small


@triton.jit(do_not_specialize=["slots", "size"])
def _merge(
    order, starts, u, k, v, log_mass, k_out, v_out,
    s_kb, s_kh, s_ks, s_vb, s_vh, s_vs, heads, slots, size,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    pair, group = tl.program_id(0).to(tl.int64) // size, tl.program_id(0).to(tl.int64) % size
    row, head = pair // heads, pair % heads
    begin = tl.load(starts + pair * (size + 1) + group).to(tl.int32)
    end = tl.load(starts + pair * (size + 1) + group + 1).to(tl.int32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    key = tl.zeros((BLOCK_D,), tl.float32)
    value = tl.zeros((BLOCK_DV,), tl.float32)
    for at in range(begin, end, BLOCK_M):
        m = at + tl.arange(0, BLOCK_M)
        slot = tl.load(order + pair * slots + m, mask=m < end, other=0)
        given = tl.load(u + pair * slots + slot, mask=m < end, other=float("-inf"))
        higher = tl.maximum(top, tl.max(given, 0))
        shift = finite(higher)
        share = tl.exp(given - shift)
        shrink = tl.exp(top - shift)
        # A slot without mass is not read: it adds nothing, whatever it holds.
        some = (share > 0)[:, None]
        total = total * shrink + tl.sum(share, 0)
        if k is not None:
            k_at = k + row * s_kb + head * s_kh + slot[:, None] * s_ks + d[None, :]
            rows = tl.load(k_at, mask=some & (d < D)[None, :], other=0.0)
            key = key * shrink + tl.sum(share[:, None] * rows.to(tl.float32), 0)
        v_at = v + row * s_vb + head * s_vh + slot[:, None] * s_vs + e[None, :]
        rows = tl.load(v_at, mask=some & (e < DV)[None, :], other=0.0)
        value = value * shrink + tl.sum(share[:, None] * rows.to(tl.float32), 0)
        top = higher
    to = pair * size + group
    tl.store(log_mass + to, log_sum(top, total))
    total = tl.where(total > 0, total, 1.0)
    if k is not None:
        tl.store(k_out + to * D + d, key / total, mask=d < D)
    tl.store(v_out + to * DV + e, value / total, mask=e < DV)


def merge_groups(u: Tensor, keys: Tensor | None, values: Tensor, group: Tensor, size: int) -> Merged:
    """As ``reference.merge_groups``, in float32."""
    values = rowwise(values)
    b, h, s, dv = values.shape
    d = 1 if keys is None else keys.shape[-1]
    log_mass = values.new_empty(b, h, size, dtype=torch.float32)
    k_out = None if keys is None else values.new_empty(b, h, size, d, dtype=torch.float32)
    v_out = values.new_empty(b, h, size, dv, dtype=torch.float32)
    if size == 0:
        return Merged(log_mass, k_out, v_out)
    ranked, order = group.to(torch.int32).sort(dim=-1, stable=True)
    edges = torch.arange(size + 1, dtype=torch.int32, device=group.device).expand(b, h, -1).contiguous()
    starts = torch.searchsorted(ranked, edges)
    if keys is not None:
        keys = rowwise(keys)
    with device_of(values):
        _merge[(b * h * size,)](
            order, starts, u.float().contiguous(), keys, values, log_mass, k_out, v_out,
            *((0, 0, 0) if keys is None else keys.stride()[:3]), *values.stride()[:3], h, s, size,
            D=d, DV=dv, BLOCK_M=BLOCK_M, BLOCK_D=next_power_of_two(d), BLOCK_DV=next_power_of_two(dv), num_warps=2,
        )  # fmt: skip
    return Merged(log_mass, k_out, v_out)
