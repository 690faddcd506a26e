"""The shape of a front, as pure functions of points of losses: smaller is better in each coordinate."""

from __future__ import annotations

from collections.abc import Sequence

Losses = Sequence[Sequence[float]]


def hypervolume(points: Losses, reference: Sequence[float]) -> float:
    """The volume of what is worse than one of ``points`` and better than ``reference``, exactly, by slicing along the
    last coordinate. Points that do not beat the reference everywhere add nothing."""
    inside = [tuple(p) for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    inside.sort(key=lambda p: p[-1])
    total = 0.0
    for i, point in enumerate(inside):
        until = inside[i + 1][-1] if i + 1 < len(inside) else reference[-1]
        if until > point[-1]:
            total += (until - point[-1]) * hypervolume([p[:-1] for p in inside[: i + 1]], reference[:-1])
    return total


def normalised(points: Losses) -> list[list[float]]:
    """Each coordinate from 0, the best of all, to 1, the worst; 0 where all are equal."""
    columns = [(min(column), max(column)) for column in zip(*points, strict=True)]
    return [[(x - a) / (b - a) if b > a else 0.0 for x, (a, b) in zip(p, columns, strict=True)] for p in points]


def knee(points: Losses) -> int:
    """The point farthest from the line between the extreme points, on the side of the best; with more coordinates, from
    the plane. Once coordinates are normalised that is where their sum is smallest. The first of equals."""
    sums = [sum(p) for p in normalised(points)]
    return sums.index(min(sums))
