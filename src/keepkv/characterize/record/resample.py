"""The bootstrap of a run: stretches of neighbouring requests are drawn, for what disturbs one disturbs the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from keepkv.measure.interval import RESAMPLES, Estimate

MOST = 8_000_000  # numbers that are drawn at once, at most
LEAST = 200  # draws, however long the runs are
Statistic = Callable[[Tensor], Tensor]  # (…,n) to (…)
STATISTICS: dict[str, Statistic] = {
    "mean": lambda x: x.mean(-1),
    **{f"p{q}": (lambda x, q=q: quantile(x, q / 100)) for q in (50, 90, 95, 99)},  # type: ignore[misc]
}


def quantile(x: Tensor, q: float) -> Tensor:
    """Of the last axis, by a straight line between neighbours; NaN where it is empty. ``torch.quantile`` takes less."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], math.nan)
    ordered = x.sort(-1).values
    at = q * (x.shape[-1] - 1)
    low = math.floor(at)
    high = min(low + 1, x.shape[-1] - 1)
    return ordered[..., low] + (at - low) * (ordered[..., high] - ordered[..., low])


@dataclass(frozen=True)
class Samples:
    """What a metric is computed from: a value for each key, and the statistic of them that is the metric.

    keys: the first two parts are the seed of a run and which run of that seed it is, the rest tells its samples apart,
    in order of time. Two methods are compared in pairs over the keys that both have.
    """

    values: tuple[float, ...]
    keys: tuple[tuple[int, ...], ...]
    statistic: str = "mean"

    def on(self, keys: Sequence[tuple[int, ...]]) -> Samples:
        """The samples of ``keys`` alone, in their order."""
        held = dict(zip(self.keys, self.values, strict=True))
        return Samples(tuple(held[key] for key in keys), tuple(keys), self.statistic)

    @property
    def point(self) -> float:
        """The metric."""
        return float(STATISTICS[self.statistic](torch.tensor(self.values, dtype=torch.float64)))

    def draws(self, seed: int = 0) -> Tensor | None:
        """The metric of each resample, (R,) float64; None where fewer than two samples say nothing of their spread.
        The same keys are drawn the same way, whatever the values: differences of draws are paired."""
        if len(self.values) < 2:
            return None
        held = torch.tensor(self.values, dtype=torch.float64)
        runs = tuple(len(list(group)) for _, group in groupby(self.keys, key=lambda key: key[:2]))
        return STATISTICS[self.statistic](held[_drawn(runs, seed)])

    def estimate(self, seed: int = 0) -> Estimate:
        """The metric with its 95 % interval."""
        drawn = self.draws(seed)
        low, high = (None, None) if drawn is None else interval(drawn)
        return Estimate(self.point, low, high)


def interval(draws: Tensor) -> tuple[float, float]:
    """The middle 95 % of ``draws`` (R,)."""
    ordered = draws.sort().values
    low, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.025, 0.975))
    return low, high


def difference(a: Samples, b: Samples, seed: int = 0) -> tuple[float, float] | None:
    """The 95 % interval of the metric of ``a`` less that of ``b``: over the keys that both have, in pairs, where these
    are two or more; else of two separate draws. None where either has no spread to draw from."""
    common = [key for key in a.keys if key in set(b.keys)]
    if len(common) > 1:
        one, other = a.on(common).draws(seed), b.on(common).draws(seed)
    else:
        one, other = a.draws(seed), b.draws(seed + 1)
    if one is None or other is None:
        return None
    n = min(len(one), len(other))
    return interval(one[:n] - other[:n])


@lru_cache(maxsize=16)
def _drawn(runs: tuple[int, ...], seed: int) -> Tensor:
    """Indices of resamples (R,n): within each run, stretches of about the cube root of its length, which go round from
    its end to its beginning."""
    total = sum(runs)
    count = max(LEAST, min(RESAMPLES, MOST // total))
    generator = torch.Generator().manual_seed(seed)
    parts, first = [], 0
    for n in runs:
        # A run of one sample is drawn among all runs: with one number a seed, seeds are what is resampled.
        if max(runs) == 1:
            return torch.randint(total, (count, total), generator=generator)
        length = max(1, round(n ** (1 / 3)))
        starts = torch.randint(n, (count, math.ceil(n / length), 1), generator=generator)
        parts.append(first + ((starts + torch.arange(length)) % n).flatten(1)[:, :n])
        first += n
    return torch.cat(parts, 1)
