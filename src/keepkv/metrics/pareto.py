"""The frontier of points of which more is better in every coordinate."""

from __future__ import annotations

from collections.abc import Sequence


def frontier(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other one beats, ascending: none is at least as good in all coordinates and better
    in one. Of equal points the first stands for all. Coordinates of which less is better are given with a minus."""
    first: dict[tuple[float, ...], int] = {}
    for i, point in enumerate(points):
        first.setdefault(tuple(point), i)
    held: list[tuple[float, ...]] = []
    # From the largest down, whatever beats a point comes before it.
    for point in sorted(first, reverse=True):
        if not any(all(a >= b for a, b in zip(other, point, strict=True)) for other in held):
            held.append(point)
    return sorted(first[point] for point in held)
