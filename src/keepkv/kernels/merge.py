"""Groups of slots merged into one slot each: log mass, mean key and mean value in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check, choose
from keepkv.kernels.segments import segment_logsumexp, segment_mean, spread


class Merged(NamedTuple):
    """log_mass (B,H,size), −inf for a group without mass; keys (B,H,size,D) or None, values (B,H,size,Dv), zero there.
    All float32 (float64 for float64)."""

    log_mass: Tensor
    keys: Tensor | None
    values: Tensor


def merge_segments(
    u: Tensor, keys: Tensor | None, values: Tensor, group: Tensor, size: int, *, backend: str | None = None
) -> Merged:
    """L = ln Σ e^u, k̄ = Σ w̃k and v̄ = Σ w̃v over each group, w̃ = softmax of ``u`` over it (see ``reduce.forms``).

    u (B,H,S) float32 log masses; keys (B,H,S,D), None where only values are wanted, as for the ``fixed`` form; values
    (B,H,S,Dv); group (B,H,S) int64: 0 … size−1, or ``size`` for slots of no group. Slots are sorted by group first,
    so every sum runs in one order: the same result in every run.
    """
    check(
        u.shape == group.shape == values.shape[:3] and (keys is None or keys.shape[:3] == u.shape),
        f"u {tuple(u.shape)}, group {tuple(group.shape)}, values {tuple(values.shape)}"
        + ("" if keys is None else f", keys {tuple(keys.shape)}")
        + ": all need the same rows, heads and slots",
    )
    exact = u.dtype == torch.float64  # masses in float64 are wanted in float64
    if exact or choose(backend, values, keys) == "reference":
        return reference(u, keys, values, group, size)
    from keepkv.kernels import merge_triton  # Triton is needed only here

    return merge_triton.merge_segments(u, keys, values, group, size)


def reference(u: Tensor, keys: Tensor | None, values: Tensor, group: Tensor, size: int) -> Merged:
    """The same by the sums that the reductions use."""
    log_mass = segment_logsumexp(u, group, size)
    weights = (u - spread(log_mass.masked_fill(log_mass.isneginf(), 0.0), group)).exp() * (group < size)
    means = [None if x is None else segment_mean(x, weights, group, size) for x in (keys, values)]
    assert means[1] is not None
    return Merged(log_mass, means[0], means[1])
