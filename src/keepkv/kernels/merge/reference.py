"""Merged groups in plain torch, by the sums that the reductions use: what the kernel is compared with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from keepkv.kernels.groups import expand_groups, group_logsumexp, group_mean


class Merged(NamedTuple):
    """One slot for each group, all float32 (float64 for float64).

    log_mass (B,H,size): −inf for a group without mass. keys (B,H,size,D), or None where none were given, and values
    (B,H,size,Dv): zero there.
    """

    log_mass: Tensor
    keys: Tensor | None
    values: Tensor


def merge_groups(u: Tensor, keys: Tensor | None, values: Tensor, group: Tensor, size: int) -> Merged:
    """``kernels.merge_groups`` with its arguments checked."""
    log_mass = group_logsumexp(u, group, size)
    weights = (u - expand_groups(log_mass.masked_fill(log_mass.isneginf(), 0.0), group)).exp() * (group < size)
    mean_keys = None if keys is None else group_mean(keys, weights, group, size)
    return Merged(log_mass, mean_keys, group_mean(values, weights, group, size))
