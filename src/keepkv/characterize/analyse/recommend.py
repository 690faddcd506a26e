"""What to take at one place: limits first, then the front, then one choice with what the others cost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keepkv.characterize.analyse.pareto import Axis, Standing, pareto
from keepkv.characterize.analyse.shape import hypervolume, knee, normalised
from keepkv.characterize.record.names import metric
from keepkv.characterize.record.rows import ResultRow
from keepkv.characterize.record.summary import Choice
from keepkv.errors import KeepKVError

CAREFUL = ("score_drop", "worst_drop", "lost")  # what is held to a limit by the bad end of its interval
NEAREST = 2
AXES = ("ratio", "tpot_p50", "score")  # where none are given


@dataclass(frozen=True)
class Limit:
    """A metric that must be at most, or at least, ``bound``."""

    name: str
    most: bool
    bound: float

    @classmethod
    def read(cls, text: str) -> Limit:
        """``ttft_p95<=0.5`` or ``score>=0.9``. Raises ``KeepKVError``."""
        found = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*", text)
        try:
            if found is None:
                raise ValueError
            name, sign, bound = found[1], found[2], float(found[3])
        except ValueError:
            raise KeepKVError(f"limit {text!r}: write it as ttft_p95<=0.5 or score>=0.9") from None
        metric(name)
        return cls(name, sign.startswith("<"), bound)

    def measured(self, row: ResultRow) -> float | None:
        """What is held against the bound: the value, of quality lost the bad end of its interval; None where it was not
        measured, or too seldom for an interval that is needed."""
        found = row.metrics.get(self.name)
        if found is None:
            return None
        return (found.high if self.most else found.low) if self.name in CAREFUL else found.mean

    def excess(self, row: ResultRow) -> float | None:
        """By how much ``row`` breaks it, in the metric's unit; 0 where it keeps it, None where nobody knows."""
        value = self.measured(row)
        if value is None:
            return None
        return max(0.0, value - self.bound if self.most else self.bound - value)

    def __str__(self) -> str:
        return f"{self.name} {'≤' if self.most else '≥'} {self.bound:g}{_unit(self.name)}"


@dataclass(frozen=True)
class Alternative:
    """Another choice of the front, and what it changes: of each axis, the share by which its value is larger (negative:
    smaller), None where that of the pick is 0."""

    row: ResultRow
    price: dict[str, float | None]


@dataclass(frozen=True)
class Recommendation:
    """pick: a measured choice, None where none keeps all limits; ``why`` then says which limit binds and by how much.
    standings: of the choices that keep all limits. volume: hypervolume of each technique's choices, in shares of the
    box between the best and the worst of each axis."""

    place: tuple[str, str, str]
    axes: tuple[str, ...]
    pick: ResultRow | None
    why: str
    alternatives: tuple[Alternative, ...] = ()
    standings: tuple[Standing, ...] = ()
    volume: dict[str, float] | None = None


def recommend(
    choices: Sequence[Choice], axes: Sequence[Axis], limits: Iterable[Limit] = (), objective: Axis | None = None
) -> Recommendation:
    """The best of ``choices``, which are of one place, that keeps all ``limits``: on the front, the best by
    ``objective``, or else the knee. It is one of them, never something in between. Raises ``KeepKVError`` where nothing
    was measured on the axes."""
    if not choices:
        raise KeepKVError("nothing was measured: no choice to recommend")
    place, names = choices[0].row.place, tuple(axis.name for axis in axes)
    known = [one for one in choices if one.row.status == "ok" and all(name in one.samples for name in names)]
    if not known:
        lacking = [name for name in names if not any(name in one.samples for one in choices)]
        raise KeepKVError(f"nothing was measured on {', '.join(lacking or names)} at {', '.join(place)}")
    steady = [one for one in known if not one.row.unstable]
    if not steady:
        return Recommendation(place, names, None, "the queue grew with every choice: the load is above what any serves")
    limits = list(limits)
    kept = [one for one in steady if all(limit.excess(one.row) == 0 for limit in limits)]
    if not kept:
        return Recommendation(place, names, None, binding([one.row for one in steady], limits))
    samples = {one.row.choice: one.samples for one in kept}
    standings = pareto(samples, axes)
    front = [one for one, at in zip(kept, standings, strict=True) if at.on_front]
    points = [_losses(one, axes) for one in front]
    best, why = knee(points), "the knee of the front"
    if objective is not None:
        best = min(range(len(front)), key=lambda i: objective.loss(front[i].samples[objective.name].point))
        why = f"the {'smallest' if objective.best == 'min' else 'largest'} {objective.name} of the front"
    if limits:
        why += f", of the {len(kept)} of {len(steady)} that keep {', '.join(map(str, limits))}"
    others = _nearest(points, best)
    return Recommendation(
        place, names, front[best].row, why,
        tuple(Alternative(front[i].row, _price(front[best], front[i], axes)) for i in others),
        tuple(standings), volumes(kept, axes),
    )  # fmt: skip


def binding(rows: Sequence[ResultRow], limits: Sequence[Limit]) -> str:
    """Which limit no choice keeps and by how much the nearest breaks it; where each is kept by some choice, which one
    the nearest to keeping all of them breaks."""
    for limit in limits:
        known = [(excess, row) for row in rows if (excess := limit.excess(row)) is not None]
        if not known:
            return f"{limit} binds: it was not measured with any choice"
        excess, row = min(known, key=lambda pair: pair[0])
        if excess > 0:
            return f"{limit} binds: {_breaks(limit, row, excess)}, and no other comes nearer"

    def worst(row: ResultRow) -> tuple[float, Limit, float]:
        """Relative excess of the limit that ``row`` breaks most."""
        found = [(limit, limit.excess(row)) for limit in limits]
        return max(
            ((float("inf") if x is None else x / (abs(limit.bound) or 1.0), limit, x or 0.0) for limit, x in found),
            key=lambda one: one[0],
        )

    nearest = min(rows, key=lambda row: worst(row)[0])
    _, limit, excess = worst(nearest)
    return (
        f"{limit} binds together with the others: {_breaks(limit, nearest, excess)}, and no other comes nearer to all"
    )


def volumes(choices: Sequence[Choice], axes: Sequence[Axis]) -> dict[str, float]:
    """The hypervolume of each technique's choices, whatever their budgets, in shares of the box between the best and
    the worst of each axis over all ``choices``; the worst is set a tenth farther out, so that extremes count too."""
    points = normalised([_losses(one, axes) for one in choices])
    reference = [1.1] * len(axes)
    groups: dict[str, list[list[float]]] = {}
    for one, point in zip(choices, points, strict=True):
        groups.setdefault(one.row.technique.partition(" @ ")[0], []).append(point)
    return {name: hypervolume(held, reference) / 1.1 ** len(axes) for name, held in groups.items()}


def _losses(one: Choice, axes: Sequence[Axis]) -> list[float]:
    return [axis.loss(one.samples[axis.name].point) for axis in axes]


def _nearest(points: Sequence[Sequence[float]], best: int) -> list[int]:
    """The two other points nearest to that one."""
    scaled = normalised(points)

    def far(i: int) -> float:
        return sum((x - y) ** 2 for x, y in zip(scaled[i], scaled[best], strict=True))

    return sorted((i for i in range(len(points)) if i != best), key=lambda i: (far(i), i))[:NEAREST]


def _price(pick: Choice, other: Choice, axes: Sequence[Axis]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for axis in axes:
        mine, theirs = pick.samples[axis.name].point, other.samples[axis.name].point
        found[axis.name] = theirs / mine - 1 if mine else None
    return found


def _breaks(limit: Limit, row: ResultRow, excess: float) -> str:
    value = limit.measured(row)
    if value is None:
        return f"with {row.choice} it was not measured"
    share = f", {100 * excess / abs(limit.bound):.0f} % beyond" if limit.bound else ""
    return f"{row.choice} has {value:.4g}{_unit(limit.name)}{share}"


def _unit(name: str) -> str:
    unit = metric(name).unit
    return f" {unit}" if unit else ""


def by_place(choices: Iterable[Choice]) -> Mapping[tuple[str, str, str], list[Choice]]:
    """Choices that can be compared with each other."""
    found: dict[tuple[str, str, str], list[Choice]] = {}
    for one in choices:
        found.setdefault(one.row.place, []).append(one)
    return found
