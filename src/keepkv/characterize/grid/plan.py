"""The points of a grid, in the order in which they are run; what cannot be run is named with the reason."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from keepkv.characterize.grid.levels import Point, Technique
from keepkv.characterize.grid.read import Grid

Refuses = Callable[[Point], str | None]
TIMES_LONGER = 3.0  # what loading, warming up and draining take beside the window, at a guess


@dataclass(frozen=True)
class Plan:
    """points: in order. dropped: points that cannot be run, and why."""

    points: tuple[Point, ...]
    dropped: tuple[tuple[Point, str], ...]

    def seconds(self, grid: Grid) -> float:
        """How long all of it takes at a guess: windows of the length that was asked for, and what is around them."""
        return len(self.points) * grid.phases.seconds * TIMES_LONGER


def plan(grid: Grid, refuses: Refuses = lambda point: None) -> Plan:
    """Every combination, without those that ``refuses`` gives a reason for.

    Points of one application, workload, hardware and seed are cut into blocks of ``grid.block`` at random, each with
    the full cache among them; blocks come in random order, and so do the points of a block. The first block's baseline
    is run once more before everything and after it.
    """
    rng = random.Random(f"{grid.seed}")
    dropped: list[tuple[Point, str]] = []
    blocks: list[list[Point]] = []
    for application, workload, hardware, seed in product(grid.applications, grid.workloads, grid.hardware, grid.seeds):
        here = [
            Point(application, workload, technique, weights, hardware, seed)
            for technique, weights in product(_with_full(grid.techniques), grid.weights)
        ]
        kept = []
        for point in here:
            why = refuses(point)
            if why is not None:
                dropped.append((point, why))
            elif not point.is_baseline:
                kept.append(point)
        base = replace(here[0], technique=Technique(), weights="none", role="baseline")
        if refuses(base) is None:
            rng.shuffle(kept)
            blocks += [_block(base, part, rng) for part in _parts(kept, grid.block)]
    rng.shuffle(blocks)
    points = [replace(point, block=i) for i, block in enumerate(blocks) for point in block]
    if points:
        first = points[0].as_baseline("start", 0)
        points = [first, *points, replace(first, role="end", block=len(blocks) - 1)]
    return Plan(tuple(points), tuple(dropped))


def _with_full(techniques: Sequence[Technique]) -> list[Technique]:
    """``techniques`` with the full cache, which other weights are measured with too."""
    full = Technique()
    return [full, *(one for one in techniques if one != full)]


def _parts(points: Sequence[Point], size: int) -> list[Sequence[Point]]:
    return [points[i : i + size] for i in range(0, len(points), size)] or [[]]


def _block(base: Point, part: Sequence[Point], rng: random.Random) -> list[Point]:
    block = [base, *part]
    rng.shuffle(block)
    return block
