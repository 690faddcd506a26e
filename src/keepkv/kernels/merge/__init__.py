"""Groups of slots merged into one slot each: log mass, mean key and mean value in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.kernels.merge import reference
from keepkv.kernels.merge.reference import Merged

__all__ = ["Merged", "merge_groups"]


def merge_groups(
    u: Tensor, keys: Tensor | None, values: Tensor, group: Tensor, size: int, *, backend: str | None = None
) -> Merged:
    """L = ln Σ e^u, k̄ = Σ w̃k and v̄ = Σ w̃v over each group, w̃ = softmax of ``u`` over it (see ``reduce.forms``).

    u (B,H,S) float32 log masses; keys (B,H,S,D), None where only values are wanted, as for the ``fixed`` form; values
    (B,H,S,Dv); group (B,H,S) int64: 0 … size−1, or ``size`` for slots of no group. Slots are sorted by group first,
    so every sum runs in one order: the same result in every run. Raises ``UnsupportedInput`` where shapes differ.
    backend: see ``dispatch.choose``.
    """
    check(
        u.shape == group.shape == values.shape[:3] and (keys is None or keys.shape[:3] == u.shape),
        f"u {tuple(u.shape)}, group {tuple(group.shape)}, values {tuple(values.shape)}"
        + ("" if keys is None else f", keys {tuple(keys.shape)}")
        + ": all need the same rows, heads and slots",
    )
    exact = u.dtype == torch.float64  # masses in float64 are wanted in float64
    if exact or choose(backend, values, keys) == "reference":
        return reference.merge_groups(u, keys, values, group, size)
    from keepkv.kernels.merge import triton  # only here, since Triton may be missing

    return triton.merge_groups(u, keys, values, group, size)
