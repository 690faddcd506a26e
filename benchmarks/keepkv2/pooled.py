"""Means over a suite of tasks and models, and how far two of them are apart, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from keepkv.measure.interval import RESAMPLES

Cells = Mapping[Any, Mapping[Any, float]]  # by model and task: the value of each item


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval; NaN to NaN where some cell has one item alone, which does not say."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def mean(cells: Cells) -> float:
    """Over cells, of the mean over items: tasks and models weigh the same, however many items they have."""
    held = [sum(items.values()) / len(items) for items in cells.values() if items]
    return sum(held) / len(held) if held else float("nan")


def difference(ours: Cells, theirs: Cells) -> Interval | None:
    """Mean of ``ours`` − mean of ``theirs``, over the items that both have; None where there are none."""
    return _compare(ours, theirs, lambda a, b: a - b)


def ratio(ours: Cells, theirs: Cells) -> Interval | None:
    """Mean of ``ours`` / mean of ``theirs``, likewise."""
    return _compare(ours, theirs, lambda a, b: a / b)


def _compare(ours: Cells, theirs: Cells, of: Callable[[Any, Any], Any]) -> Interval | None:
    """Paired bootstrap, stratified: items are drawn anew within each cell, the same ones for both.

    A resample of n items spreads as if there were n/(n − 1) times as many, which counts where cells are small: its
    distance from the mean is drawn out by the root of that.
    """
    total = [torch.zeros(RESAMPLES + 1, dtype=torch.float64) for _ in range(2)]  # the last entry: nothing drawn
    count, least = 0, None
    for key in sorted(ours.keys() & theirs.keys(), key=str):
        items = sorted(ours[key].keys() & theirs[key].keys(), key=str)
        if items:
            n = len(items)
            drawn, wider = _drawn(count, n), (n / max(1, n - 1)) ** 0.5
            for held, cells in zip(total, (ours, theirs), strict=True):
                values = torch.tensor([cells[key][item] for item in items], dtype=torch.float64)
                centre = values.mean()
                held += torch.cat((centre + wider * (values[drawn].mean(-1) - centre), centre[None]))
            count, least = count + 1, min(n, least or n)
    if not count:
        return None
    found = of(total[0] / count, total[1] / count)
    if least == 1:
        return Interval(float(found[-1]), float("nan"), float("nan"))
    low, high = torch.quantile(found[:-1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(found[-1]), low, high)


@lru_cache(maxsize=512)
def _drawn(seed: int, n: int) -> Tensor:
    return torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
