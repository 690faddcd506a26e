"""Whether two lists are in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import correlation


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1, the mean of their ranks for equal ones."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation in [−1, 1]; None where one of them has no order at all."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be ranked against {len(b)}")
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return correlation(ranks(a), ranks(b))
