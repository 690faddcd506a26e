"""What the rows of the leakage study say together: peaks, gaps, gains, ranks; over prompts, in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.evaluation.leakage.rows import LeakageRow
from keepkv.measure.interval import RESAMPLES, Estimate, bootstrap
from keepkv.metrics.rank import spearman

MIDDLE = (0.4, 0.7)  # shares removed over which the composite score is a mean


@dataclass(frozen=True)
class Curve:
    """A method in one order under one handling of spans: rows by the share removed, from none."""

    method: str
    order: str
    spans: str
    rows: tuple[LeakageRow, ...]

    @property
    def removed(self) -> list[float]:
        """Shares removed."""
        return [row.removed for row in self.rows]

    def means(self, name: str) -> list[float | None]:
        """A measure at each share removed."""
        return [row.measure(name) for row in self.rows]

    def values(self, name: str) -> list[list[float | None]]:
        """leak or directive of each prompt at each share removed."""
        return [row.values[name] for row in self.rows]


def curves(rows: Iterable[LeakageRow]) -> dict[tuple[str, str, str], Curve]:
    """(method, order, spans) → its curve."""
    found: dict[tuple[str, str, str], list[LeakageRow]] = {}
    for row in rows:
        found.setdefault((row.method, row.order, row.spans), []).append(row)
    return {key: Curve(*key, tuple(sorted(mine, key=lambda row: row.removed))) for key, mine in found.items()}


def peak(curve: Curve) -> LeakageRow:
    """The row that leaks most, the first of them."""
    return max(curve.rows, key=lambda row: row.leak or 0.0)


def peak_change(curve: Curve, base: Curve, seed: int = 0) -> Estimate:
    """Peak leakage of ``curve`` minus that of ``base``, each at its own share removed.

    Prompts are drawn again for the interval, and the peaks looked for in each draw. ``values`` is empty: a peak is of
    the mean, no prompt has one.
    """
    a, b = _paired("leak", curve, base)
    drawn = torch.randint(a.shape[1], (RESAMPLES, a.shape[1]), generator=torch.Generator().manual_seed(seed))
    changes = (a[:, drawn].mean(-1).amax(0) - b[:, drawn].mean(-1).amax(0)).sort().values
    low, high = (float(changes[round(q * (RESAMPLES - 1))]) for q in (0.025, 0.975))
    return Estimate(float(a.mean(-1).max() - b.mean(-1).max()), low, high, ())


def composite(curve: Curve, base: Curve) -> Estimate:
    """Mean over shares removed from 0.4 to 0.7 of ½ (directive accuracy gained) + ½ (leakage lost) against ``base``."""
    both = [torch.stack(_paired(name, curve, base)) for name in ("directive", "leak")]
    inside = [i for i, share in enumerate(curve.removed) if MIDDLE[0] <= share <= MIDDLE[1]]
    if not inside:
        raise KeepKVError(f"the composite score needs shares removed within {MIDDLE}; the curve has {curve.removed}")
    directive, leak = (each[0, inside] - each[1, inside] for each in both)
    return bootstrap(((directive - leak) / 2).mean(0).tolist())


def order_gap(name: str, defence_first: Curve, directive_first: Curve) -> list[Estimate]:
    """At each share removed, ``name`` (leak or directive) with the defence first minus with the directive first."""
    a, b = _paired(name, defence_first, directive_first)
    return [bootstrap(row.tolist()) for row in a - b]


def area(curve: Curve, name: str = "directive") -> float:
    """Mean of a measure over the shares removed (area under the curve by trapezia, by its width)."""
    points = [(x, y) for x, y in zip(curve.removed, curve.means(name), strict=True) if y is not None]
    if len(points) < 2:
        raise KeepKVError(f"an area needs at least two shares removed; {name} was measured at {len(points)}")
    total = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
    return total / (points[-1][0] - points[0][0])


def family_order(curve: Curve) -> list[float | None]:
    """At each share removed, Spearman's correlation of the families' accuracies with those at the first: even
    degradation keeps it near 1. None where families do not differ."""
    first = curve.rows[0].families
    return [spearman(list(first.values()), [row.families.get(x, 0.0) for x in first]) for row in curve.rows]


def _paired(name: str, one: Curve, other: Curve) -> tuple[Tensor, Tensor]:
    """Values (shares removed, prompts) of both curves, without the prompts that failed anywhere."""
    if one.removed != other.removed:
        raise KeepKVError(f"curves at {one.removed} and at {other.removed} cannot be compared")
    lists = [one.values(name), other.values(name)]
    widths = {len(row) for values in lists for row in values}
    if len(widths) != 1:
        raise KeepKVError(f"curves over {sorted(widths)} prompts cannot be compared: use the same prompts for both")
    good = [i for i in range(widths.pop()) if all(row[i] is not None for values in lists for row in values)]
    if not good:
        raise KeepKVError(f"no prompt was measured on both curves of {one.method} and {other.method}")
    a, b = (torch.tensor([[row[i] for i in good] for row in values], dtype=torch.float64) for values in lists)
    return a, b


def complete(rows: Sequence[LeakageRow], removed: Sequence[float]) -> list[LeakageRow]:
    """The rows of those curves that have every share removed (the full cache: the one that it has)."""
    found = curves(rows).values()
    return [row for curve in found if curve.method == "full" or curve.removed == sorted(removed) for row in curve.rows]
