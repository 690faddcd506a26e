"""What is shown: orders, pooled scores, needle grids, failures. Page, figures and tables all draw from here."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeVar

from keepkv import tasks
from keepkv.core.budget import Budget
from keepkv.evaluation.leakage.curves import curves, peak
from keepkv.evaluation.leakage.rows import LeakageRow
from keepkv.evaluation.rows import BudgetAsked, CellKey, CellRow, ItemRow
from keepkv.evaluation.setup import BASELINES
from keepkv.evaluation.summary import over_tasks, per_second
from keepkv.measure.interval import mean, mean_low_high
from keepkv.report.read import Evaluation

T = TypeVar("T")
K = TypeVar("K", bound=CellKey)
ALL = "all tasks"
USUAL = 0.1  # the budget that is shown first is the share nearest to this, whatever the results


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


@dataclass(frozen=True)
class Report:
    """An evaluation in the order in which it is shown.

    cells: also those of ``ALL``. budgets: labels, the full cache's left out. positions: of the budgets on an axis from
    0 to 1. methods: by rank, best first, at the first mode, length and budget shown. chosen: the methods shown first.
    """

    evaluation: Evaluation
    cells: list[CellRow]
    tasks: list[str]
    lengths: list[int]
    modes: list[str]
    methods: list[str]
    budgets: list[str]
    positions: list[float]
    start: tuple[str, str, int, str]  # task, mode, length and budget shown first
    chosen: list[str]
    needles: list[Needle]
    failures: list[tuple[str, str, int, list[str]]]  # method, error, how many, on which tasks
    notes: list[str]

    def at(self, task: str, mode: str, length: int, budget: str | None = None) -> list[CellRow]:
        """Cells of a task, mode and length, best first; of one budget and the full cache where ``budget`` is given."""
        found = [cell for cell in self.cells if (cell.task, cell.mode, cell.length) == (task, mode, length)]
        if budget is not None:
            found = [cell for cell in found if cell.method == "full" or budget_label(cell.budget) == budget]
        return sorted(found, key=lambda cell: -(cell.score if cell.score is not None else -1.0))

    def table(self, task: str, mode: str, length: int) -> dict[str, list[CellRow | None]]:
        """Cells of each method by budget, best method first at the budget shown first; one and the same for the full
        cache."""
        found = [*self.at(task, mode, length, self.start[3]), *self.at(task, mode, length)]
        cells = {(cell.method, budget_label(cell.budget)): cell for cell in found}
        full = {cell.method: cell for cell in found if cell.method == "full"}
        methods = dict.fromkeys(cell.method for cell in found)
        return {name: [full.get(name, cells.get((name, budget))) for budget in self.budgets] for name in methods}

    def panels(self) -> list[tuple[str, int]]:
        """Modes and lengths of which there are cells."""
        held = {(cell.mode, cell.length) for cell in self.cells}
        return [(mode, length) for mode in self.modes for length in self.lengths if (mode, length) in held]

    def main(self, mode: str, length: int) -> str:
        """The task that stands for a mode and length: all of them where they are pooled, else the first."""
        held = {cell.task for cell in self.cells if (cell.mode, cell.length) == (mode, length)}
        return next(task for task in (ALL, *self.tasks) if task in held)

    @property
    def lost(self) -> list[CellRow]:
        """Cells whose whole interval lies below the full cache, worst first."""
        worse = [cell for cell in self.cells if cell.minus_full_high is not None and cell.minus_full_high < 0]
        return sorted((c for c in worse if c.task != ALL and c.method != "random"), key=lambda c: c.minus_full or 0)


@lru_cache(typed=True)
def budget_label(budget: BudgetAsked) -> str:
    """``10 %``, ``10 % of bytes``, ``512 slots`` or ``256MiB``."""
    if isinstance(budget, int):
        return f"{budget} slots"
    share = share_of(budget)
    return str(budget) if share is None else f"{100 * share:g} %" + (" of bytes" if isinstance(budget, str) else "")


def share_of(budget: BudgetAsked) -> float | None:
    """The share, of tokens or of bytes, that ``budget`` is; None for slots and for bytes."""
    asked = Budget.of(budget)
    return asked.share if asked.share is not None else asked.share_of_bytes


def arrange(evaluation: Evaluation, step: Callable[[str], None] = lambda what: None) -> Report:
    """Pools and orders what was read. ``step`` is told what comes next."""
    run, cells = evaluation.run, evaluation.cells
    pooled, notes = _pool(evaluation, step)
    tasks = _order(run.tasks, (cell.task for cell in cells))
    modes = _order(run.modes, (cell.mode for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    asked = list({budget_label(c.budget): c.budget for c in cells if c.method != "full"}.values()) or [1.0]
    asked.sort(key=_rank)
    shares = {one: share for one in asked if (share := share_of(one)) is not None}
    usual = min(shares, key=lambda one: abs(math.log(shares[one] / USUAL))) if shares else asked[0]
    budget = budget_label(usual)
    found = [*pooled, *cells]
    mode = modes[0]
    held = {(cell.length, cell.task) for cell in cells if cell.mode == mode}
    length = max((n for n, _ in held), key=lambda n: (sum(one == n for one, _ in held), n))  # where most was asked
    measured = {cell.task for cell in found if (cell.mode, cell.length) == (mode, length)}
    start = (next(task for task in (ALL, *tasks) if task in measured), mode, length, budget)
    names = _order(["full", *run.methods], (cell.method for cell in cells))
    report = Report(
        evaluation, found, tasks, lengths, modes, [], [budget_label(one) for one in asked], _positions(asked), start,
        [], _needles(evaluation.items), _failures(evaluation.items), [*notes, *_doubts(evaluation)],
    )  # fmt: skip
    ranked = _order([cell.method for cell in report.at(*start)], names)
    ranked = [name for name in ranked if name in {cell.method for cell in cells}]
    leading = [name for name in ranked if name not in BASELINES][:6]
    return replace(report, methods=ranked, chosen=[n for n in ranked if n in BASELINES or n in leading])


def peaks(rows: Sequence[LeakageRow]) -> list[LeakageRow]:
    """The row that leaks most, for each method, order and handling of spans; worst first."""
    return sorted(map(peak, curves(rows).values()), key=lambda row: -(row.leak or 0))


def front(points: Iterable[tuple[float, float, T]], small: bool) -> list[tuple[float, float, T]]:
    """Points (x, y, what) that no other beats in both: a larger y, and a smaller x if ``small``, else a larger one."""
    held: list[tuple[float, float, T]] = []
    for point in sorted(points, key=lambda p: (p[0] if small else -p[0], -p[1])):
        if not held or point[1] > held[-1][1]:
            held.append(point)
    return held


def _order(given: Sequence[str], found: Iterable[str]) -> list[str]:
    """What was found, in the given order, and after it what is not in that order."""
    held = list(dict.fromkeys(found))
    return [*(one for one in dict.fromkeys(given) if one in held), *(one for one in held if one not in given)]


def _rank(budget: BudgetAsked) -> tuple[int, float]:
    """Where a budget stands in a row of them: shares of the tokens, of the bytes, slots, then bytes."""
    one = Budget.of(budget)
    amounts = (one.share, one.share_of_bytes, one.slots, one.bytes)
    return next((kind, float(amount)) for kind, amount in enumerate(amounts) if amount is not None)


def _positions(asked: Sequence[BudgetAsked]) -> list[float]:
    """Where budgets stand on an axis from 0 to 1: by their logarithm where all are shares, else evenly."""
    if len(asked) < 2:
        return [0.5] * len(asked)
    shares = [math.log(share) for one in asked if (share := share_of(one)) is not None]
    if len(shares) == len(asked) and len({_rank(one)[0] for one in asked}) == 1:
        return [(one - shares[0]) / (shares[-1] - shares[0]) for one in shares]
    return [i / (len(asked) - 1) for i in range(len(asked))]


def _pool(evaluation: Evaluation, step: Callable[[str], None]) -> tuple[list[CellRow], list[str]]:
    """One cell for each mode, length, method and budget, over all tasks (``over_tasks``), a failed item as 0.

    The same items are drawn for every method: differences are paired. A method that was not given all of the items has
    no pooled score, which a note says.
    """
    panels: dict[tuple[str, int], dict[tuple[str, str], dict[tuple[str, int], ItemRow]]] = defaultdict(dict)
    for item in filter(lambda item: tasks.pooled(item.task), evaluation.items):
        own = panels[item.mode, item.length].setdefault((item.method, budget_label(item.budget)), {})
        own[item.task, item.seed] = item
    batches, parts = _grouped(evaluation.speed), _grouped(evaluation.cells)
    made, notes = [], []
    short: dict[tuple[str, int, int, int], list[str]] = defaultdict(list)  # methods that were not given every item
    for (mode, length), groups in panels.items():
        wanted = sorted(set().union(*groups.values()))
        if len({task for task, _ in wanted}) < 2:
            continue
        full = next((items for (method, _), items in groups.items() if method == "full"), {})
        for (method, budget), items in groups.items():
            step(f"{mode}, {length} tokens: {method} at {budget}")
            if len(items) < len(wanted):
                short[mode, length, len(items), len(wanted)].append(method)
                continue
            scores, pairs = defaultdict(list), defaultdict(list)
            for key in wanted:
                scores[key[0]].append(items[key].score or 0.0)
                if len(full) == len(wanted):
                    pairs[key[0]].append((items[key].score or 0.0) - (full[key].score or 0.0))
            score, low, high = mean_low_high(over_tasks(scores))
            minus, minus_low, minus_high = mean_low_high(over_tasks(pairs))
            of = [cell for cell in parts[mode, length, method, budget] if tasks.pooled(cell.task)]
            read, written = per_second(batches[mode, length, method, budget])
            made.append(
                CellRow(
                    task=ALL, length=length, mode=next(iter(items.values())).mode, method=method,
                    budget=next(iter(items.values())).budget, n=len(wanted),
                    failed=sum(one.score is None for one in items.values()), score=score, low=low, high=high,
                    minus_full=minus, minus_full_low=minus_low, minus_full_high=minus_high,
                    ratio=mean(c.ratio for c in of), bytes=mean(c.bytes for c in of),
                    full_bytes=mean(c.full_bytes for c in of),
                    peak_bytes=max((c.peak_bytes for c in of if c.peak_bytes is not None), default=None),
                    read_per_s=read, written_per_s=written, made_with=evaluation.run.environment,
                )
            )  # fmt: skip
    for (mode, length, given, wanted_items), methods in short.items():
        names = ", ".join(dict.fromkeys(methods))
        notes.append(
            f"{names} ({mode}, {length} tokens): given {given} of {wanted_items} items, hence no score over all tasks."
        )
    return made, notes


def _grouped(rows: Iterable[K]) -> dict[tuple[str, int, str, str], list[K]]:
    """Rows by mode, length, method and budget: those of all tasks together."""
    found: dict[tuple[str, int, str, str], list[K]] = defaultdict(list)
    for row in rows:
        found[row.mode, row.length, row.method, budget_label(row.budget)].append(row)
    return found


def _needles(items: Iterable[ItemRow]) -> list[Needle]:
    """Scores of the items that have a depth, by depth (in tenths) and length."""
    found: dict[tuple[str, str, str, str, float, int], list[float]] = defaultdict(list)
    for item in items:
        if "depth" in item.tags:
            depth = round(min(1.0, max(0.0, item.tags["depth"])), 1)
            key = (item.task, item.mode, item.method, budget_label(item.budget), depth, item.length)
            found[key].append(item.score or 0.0)
    return [Needle(*key, sum(scores) / len(scores), len(scores)) for key, scores in found.items()]


def _failures(items: Iterable[ItemRow]) -> list[tuple[str, str, int, list[str]]]:
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for item in items:
        if item.score is None:
            found[item.method, item.error or "no score, and no error given"][item.task] += 1
    rows = [(method, error, tasks.total(), list(tasks)) for (method, error), tasks in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def _key(row: CellKey) -> tuple[str, int, str, str, str]:
    return row.task, row.length, row.mode, row.method, budget_label(row.budget)


def _doubts(evaluation: Evaluation) -> list[str]:
    """What a reader should know before believing the numbers."""
    counts = Counter(_key(item) for item in evaluation.items)
    stale = [cell for cell in evaluation.cells if counts[_key(cell)] not in (cell.n, cell.n + cell.failed)]
    notes = []
    if stale:
        notes.append(
            f"{len(stale)} of {len(evaluation.cells)} cells count other items than items.jsonl holds, the first "
            f"{stale[0].method} on {stale[0].task}: the summary is older than the items, or from another run."
        )
    idle = [item for item in evaluation.items if not (item.compressed or item.error or item.budget == 1.0)]
    whole = Counter(item.method for item in idle if item.method != "full")
    for method, n in whole.items():
        notes.append(f"{method} compressed nothing in {n} items: read those scores as the full cache's.")
    missing = [name for name in BASELINES if name not in {cell.method for cell in evaluation.cells}]
    if missing:
        notes.append(f"Not measured, so there is nothing to compare with: {', '.join(missing)}.")
    return notes
