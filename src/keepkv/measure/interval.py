"""A number that was measured several times: a mean with its 95 % interval, or percentiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RESAMPLES = 2000
Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A mean over samples, and its 95 % interval.

    low and high are None where there is one sample, which is too few to say. values: one for each sample, in order, so
    that estimates over the same samples can be compared in pairs.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Percentiles:
    """Median, 20th and 80th percentile (linear interpolation) of repeated measurements, and each one in order."""

    median: float
    p20: float
    p80: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Percentiles | None:
        """None where nothing was measured."""
        known = tuple(x for x in values if x is not None)
        if not known:
            return None
        marks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        low, middle, high = torch.tensor(known, dtype=torch.float64).quantile(marks).tolist()
        return cls(middle, low, high, known)


def mean(values: Iterable[float | None]) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def mean_low_high(found: Estimate | None) -> tuple[float | None, float | None, float | None]:
    """The three numbers of an estimate; each None where there is none."""
    return (None, None, None) if found is None else (found.mean, found.low, found.high)


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Percentile bootstrap of the mean over ``values``. The same seed draws the same samples, whatever the values."""
    n = len(values)
    if n == 0:
        raise ValueError("an estimate needs at least one value")
    held = torch.tensor(values, dtype=torch.float64)
    mean = float(held.mean())
    if n == 1:
        return Estimate(mean, None, None, tuple(values))
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    means = held[drawn].mean(-1).sort().values
    low, high = (float(means[round(q * (RESAMPLES - 1))]) for q in (0.025, 0.975))
    return Estimate(mean, low, high, tuple(values))


def mean_of_means(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean of the means of ``groups``, which weigh the same however many values each has, and its percentile
    bootstrap: values are drawn within their groups. ``values`` are the means."""
    means = tuple(float(torch.tensor(group, dtype=torch.float64).mean()) for group in groups)
    if max(map(len, groups)) == 1:
        return Estimate(sum(means) / len(means), None, None, means)
    flat = torch.tensor([value for group in groups for value in group], dtype=torch.float64)
    ordered = (_draws(tuple(map(len, groups)), seed) @ flat).sort().values
    low, high = (float(ordered[round(q * (RESAMPLES - 1))]) for q in (0.025, 0.975))
    return Estimate(sum(means) / len(means), low, high, means)


@lru_cache(maxsize=1)  # a table of results has many means of groups of the same sizes
def _draws(sizes: tuple[int, ...], seed: int) -> Tensor:
    """What each value weighs in each mean, (RESAMPLES, values): how often it is drawn of its group, whose values weigh
    1 / groups together. The same for the same sizes and seed."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.ones(1, dtype=torch.float64)
    parts = []
    for size in sizes:
        drawn = torch.randint(size, (RESAMPLES, size), generator=generator)
        counts = torch.zeros(RESAMPLES, size, dtype=torch.float64)
        parts.append(counts.scatter_add_(1, drawn, one.expand_as(counts)) / (size * len(sizes)))
    return torch.cat(parts, 1)


def share(verdicts: Sequence[bool]) -> Estimate:
    """Share of true verdicts, with its Wilson interval: a bootstrap of a share of 0 or 1 has no width."""
    values = tuple(map(float, verdicts))
    return Estimate(sum(values) / len(values), *wilson(sum(verdicts), len(values)), values)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    p = right / total
    centre = p + Z * Z / (2 * total)
    spread = Z * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    low, high = ((centre + sign * spread) / (1 + Z * Z / total) for sign in (-1, 1))
    # At none or all of them the end is exact, and rounding must not move it.
    return (0.0 if right == 0 else low), (1.0 if right == total else high)
