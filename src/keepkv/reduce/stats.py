"""What becomes of a score's statistics when slots merge."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import Slots
from keepkv.core.stats import Merge
from keepkv.kernels.groups import group_logsumexp, group_sum
from keepkv.score.base import Score


def merged_stats(score: Score, slots: Slots, kept: Slots, group: Tensor, changes: Tensor) -> dict[str, Tensor]:
    """Statistics of ``kept``, each (B,H,K), once the slots that leave have entered it, as ``score`` declares them.

    group (B,H,S) int64: the kept slot that each of ``slots`` is part of, K for none; a kept slot is part of itself.
    changes (B,H,K) bool: kept slots that took something in; the others keep what they have.
    """
    kinds = score.stats | score.span_stats

    def merged(name: str, held: Tensor) -> Tensor:
        kind = kinds[name].merge
        if kind == "anchor":
            return held
        return torch.where(changes, combined(slots.stats[name], group, held.shape[-1], kind).to(held.dtype), held)

    return {name: merged(name, held) for name, held in kept.stats.items()}


def combined(x: Tensor, group: Tensor, size: int, kind: Merge) -> Tensor:
    """x (B,H,S) over each group, (B,H,size), by ``kind``: "sum", "logsumexp" or "max"."""
    if kind == "sum":
        return group_sum(x, group, size)
    if kind == "logsumexp":
        return group_logsumexp(x, group, size)
    lowest = x.new_full((*x.shape[:2], size + 1), float("-inf"))
    return lowest.scatter_reduce(2, group, x, "amax")[..., :size]
