"""What is shown: orders, pooled scores, needle grids, failures. Page, figures and tables all draw from here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from keepkv.evaluation.leakage.curves import curves, peak
from keepkv.evaluation.leakage.rows import LeakageRow
from keepkv.evaluation.rows import CellRow, ItemRow
from keepkv.evaluation.setup import BASELINES
from keepkv.report.budgets import Axis, axes, budget_label, places, share_of
from keepkv.report.notes import Failure, failures, notes
from keepkv.report.pool import ALL, pooled
from keepkv.report.read import Evaluation
from keepkv.report.style import MOST

T = TypeVar("T")
USUAL = 0.1  # the budget that is shown first is the share nearest to this, whatever the results
SAME = 0.03  # bytes and speeds that differ by less are the same on a front


class Needle(NamedTuple):
    """Where a needle lies, and what became of it. depth: 0 at the start of the context, 1 at its end."""

    task: str
    mode: str
    method: str
    budget: str
    depth: float
    length: int
    score: float
    n: int


class Loss(NamedTuple):
    """Cells of a method whose whole interval lies below the full cache. cells: how many were compared."""

    method: str
    below: int
    cells: int
    worst: CellRow


@dataclass(frozen=True)
class Report:
    """An evaluation in the order in which it is shown.

    cells: also those of ``ALL``. budgets: labels, the full cache's left out. methods: by rank, best first, at the first
    mode, length and budget shown. chosen: the methods drawn first, ten at most: the baselines, and of others the best
    of each family (``keepkv`` and ``keepkv:key=zip`` are one), then the next best. also: methods of leakage and
    fidelity alone.
    """

    evaluation: Evaluation
    cells: list[CellRow]
    tasks: list[str]
    lengths: list[int]
    modes: list[str]
    methods: list[str]
    budgets: list[str]
    start: tuple[str, str, int, str]  # task, mode, length and budget shown first
    chosen: list[str]
    needles: list[Needle]
    failures: list[Failure]
    notes: list[str]
    also: list[str]

    def at(self, task: str, mode: str, length: int, budget: str | None = None) -> list[CellRow]:
        """Cells of a task, mode and length, best first; of one budget and the full cache where ``budget`` is given."""
        found = [cell for cell in self.cells if (cell.task, cell.mode, cell.length) == (task, mode, length)]
        if budget is not None:
            found = [cell for cell in found if cell.method == "full" or budget_label(cell.budget) == budget]
        return sorted(found, key=lambda cell: -(cell.score if cell.score is not None else -1.0))

    def axes(self, task: str, mode: str, length: int) -> list[Axis]:
        """The budgets that were measured there, shares and slots apart."""
        return axes(cell.budget for cell in self.at(task, mode, length) if cell.method != "full")

    def table(self, task: str, mode: str, length: int) -> tuple[list[str], dict[str, list[CellRow | None]]]:
        """The budgets measured there, and the cells of each method by budget, best method first at the budget shown
        first; one and the same for the full cache."""
        budgets = [budget for axis in self.axes(task, mode, length) for budget in axis.budgets] or self.budgets
        found = [*self.at(task, mode, length, self.start[3]), *self.at(task, mode, length)]
        cells = {(cell.method, budget_label(cell.budget)): cell for cell in found}
        full = {cell.method: cell for cell in found if cell.method == "full"}
        methods = dict.fromkeys(cell.method for cell in found)
        return budgets, {name: [full.get(name, cells.get((name, one))) for one in budgets] for name in methods}

    def panels(self) -> list[tuple[str, int]]:
        """Modes and lengths of which there are cells."""
        held = {(cell.mode, cell.length) for cell in self.cells}
        return [(mode, length) for mode in self.modes for length in self.lengths if (mode, length) in held]

    def main(self, mode: str, length: int) -> str:
        """The task that stands for a mode and length: all of them where they are pooled, else the first."""
        held = {cell.task for cell in self.cells if (cell.mode, cell.length) == (mode, length)}
        return next(task for task in (ALL, *self.tasks) if task in held)

    @property
    def losses(self) -> list[Loss]:
        """Where each method lies below the full cache by more than its interval, by the share of its cells; random and
        cells over all tasks left out."""
        compared: dict[str, list[CellRow]] = defaultdict(list)
        for cell in self.cells:
            if cell.task != ALL and cell.method not in ("full", "random") and cell.minus_full_high is not None:
                compared[cell.method].append(cell)
        below = {name: [one for one in own if (one.minus_full_high or 0) < 0] for name, own in compared.items()}
        found = [
            Loss(name, len(below[name]), len(own), min(below[name], key=lambda one: one.minus_full or 0))
            for name, own in compared.items()
            if below[name]
        ]
        return sorted(found, key=lambda one: -one.below / one.cells)


def arrange(evaluation: Evaluation) -> Report:
    """Pools and orders what was read."""
    run, cells = evaluation.run, evaluation.cells
    over_all, short = pooled(evaluation)
    tasks = _order(run.tasks, (cell.task for cell in cells))
    modes = _order(run.modes, (cell.mode for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    asked = list({budget_label(c.budget): c.budget for c in cells if c.method != "full"}.values()) or [1.0]
    order = places(asked)
    asked.sort(key=lambda one: order[budget_label(one)])
    shares = {one: share for one in asked if (share := share_of(one)) is not None}
    usual = min(shares, key=lambda one: abs(math.log(shares[one] / USUAL))) if shares else asked[0]
    budget = budget_label(usual)
    found = [*over_all, *cells]
    mode = modes[0]
    held = {(cell.length, cell.task) for cell in cells if cell.mode == mode}
    length = max((n for n, _ in held), key=lambda n: (sum(one == n for one, _ in held), n))  # where most was asked
    measured = {cell.task for cell in found if (cell.mode, cell.length) == (mode, length)}
    start = (next(task for task in (ALL, *tasks) if task in measured), mode, length, budget)
    names = _order(["full", *run.methods], (cell.method for cell in cells))
    report = Report(
        evaluation, found, tasks, lengths, modes, [], [budget_label(one) for one in asked], start, [],
        _needles(evaluation.items), failures(evaluation.items), notes(evaluation, short), [],
    )  # fmt: skip
    ranked = _order([cell.method for cell in report.at(*start)], names)
    ranked = [name for name in ranked if name in {cell.method for cell in cells}]
    also = [row.method for row in evaluation.leakage] + [row.label for row in evaluation.fidelity]
    also = [name for name in dict.fromkeys(also) if name not in ranked]
    return replace(report, methods=ranked, also=also, chosen=_chosen([*ranked, *also]))


def peaks(rows: Sequence[LeakageRow]) -> list[LeakageRow]:
    """The row that leaks most, for each method, order and handling of spans; worst first."""
    return sorted(map(peak, curves(rows).values()), key=lambda row: -(row.leak or 0))


def front(points: Iterable[tuple[float, float, T]], small: bool) -> list[tuple[float, float, T]]:
    """Points (x, y, what) that no other beats, best x first: none has a larger y at an x as small, or as large if not
    ``small``, or within ``SAME`` of it."""
    points = sorted(points, key=lambda p: (p[0] if small else -p[0], -p[1]))
    held: list[tuple[float, float, T]] = []
    for point in points:
        reach = point[0] * (1 + SAME if small else 1 - SAME)
        rivals = (other for other in points if (other[0] <= reach if small else other[0] >= reach))
        if all(other[1] <= point[1] for other in rivals) and (not held or point[1] > held[-1][1]):
            held.append(point)
    return held


def _chosen(ranked: Sequence[str]) -> list[str]:
    """Baselines and the methods that have a colour at first, by rank."""
    others = [name for name in ranked if name not in BASELINES]
    families = {name.partition(":")[0]: name for name in reversed(others)}  # the best of each family stays
    best = sorted(families.values(), key=others.index)
    drawn = {*BASELINES, *list(dict.fromkeys([*best, *others]))[:MOST]}
    return [name for name in ranked if name in drawn]


def _order(given: Sequence[str], found: Iterable[str]) -> list[str]:
    """What was found, in the given order, and after it what is not in that order."""
    held = list(dict.fromkeys(found))
    return [*(one for one in dict.fromkeys(given) if one in held), *(one for one in held if one not in given)]


def _needles(items: Iterable[ItemRow]) -> list[Needle]:
    """Scores of the items that have a depth, by depth (in tenths) and length."""
    found: dict[tuple[str, str, str, str, float, int], list[float]] = defaultdict(list)
    for item in items:
        if "depth" in item.tags:
            depth = round(min(1.0, max(0.0, item.tags["depth"])), 1)
            key = (item.task, item.mode, item.method, budget_label(item.budget), depth, item.length)
            found[key].append(item.score or 0.0)
    return [Needle(*key, sum(scores) / len(scores), len(scores)) for key, scores in found.items()]
