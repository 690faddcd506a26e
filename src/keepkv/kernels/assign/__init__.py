"""Nearest kept key of every leaving slot, without the matrix of leaving × kept."""

from __future__ import annotations

from torch import Tensor

from keepkv.kernels.assign import reference
from keepkv.kernels.dispatch import check, choose

__all__ = ["nearest_key"]


def nearest_key(keys: Tensor, leaving: Tensor, targets: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """For each leaving slot the target slot of largest key cosine in its row and head, and that cosine.

    keys (B,H,S,D); leaving, targets (B,H,S) bool. Returns slot indices (B,H,S) int64, −1 where a slot does not leave or
    its head has no target, and cosines (B,H,S) float32 (float64 for float64), −inf there. Of equal cosines the lowest
    index wins: ties go to the oldest target. A key of zeros has cosine 0 with every other. Raises ``UnsupportedInput``
    for masks of another shape. backend: see ``dispatch.choose``.
    """
    check(
        leaving.shape == targets.shape == keys.shape[:3],
        f"leaving {tuple(leaving.shape)} and targets {tuple(targets.shape)} for keys {tuple(keys.shape)}: masks must "
        "have the shape of keys without the last dimension",
    )
    if choose(backend, keys) == "reference":
        return reference.nearest_key(keys, leaving, targets)
    from keepkv.kernels.assign import triton  # only here, since Triton may be missing

    return triton.nearest_key(keys, leaving, targets)
