"""What a reader should know before believing the numbers, and what failed."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import mode

from keepkv.evaluation.rows import CellKey, ItemRow
from keepkv.evaluation.setup import BASELINES
from keepkv.measure.interval import Z
from keepkv.report.budgets import budget_label
from keepkv.report.pool import Short
from keepkv.report.read import Evaluation

FEW = 30  # items; with fewer, an interval over items says too little
Failure = tuple[str, str, int, list[str]]  # method, error, how many items, on which tasks


def notes(evaluation: Evaluation, short: dict[str, Short]) -> list[str]:
    """Sentences, the most important first."""
    return [*_few(evaluation), *_unpooled(short), *_stale(evaluation), *_idle(evaluation), *_missing(evaluation)]


def failures(items: Iterable[ItemRow]) -> list[Failure]:
    """Failed items by method and cause, most first. Errors that differ in their numbers alone are one cause, and those
    numbers read ``…``."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for item in items:
        if item.score is None:
            error = item.error or "no score, and no error given"
            found[item.method, re.sub(r"\d+", "0", error)].append((error, item.task))
    rows = [
        (method, _common([error for error, _ in own]), len(own), list(dict.fromkeys(task for _, task in own)))
        for (method, _), own in found.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def spread_of(items: int) -> float:
    """Half the width of the widest 95 % interval that a share of ``items`` can have."""
    return Z / (2 * math.sqrt(items + Z * Z))  # Wilson's, of a half


def listed(names: Sequence[str], most: int = 3) -> str:
    """``a, b and 4 more``."""
    names = list(dict.fromkeys(names))
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def _common(errors: Sequence[str]) -> str:
    parts = zip(*(re.split(r"(\d+)", error) for error in dict.fromkeys(errors)), strict=True)
    return "".join(part[0] if len(set(part)) == 1 else "…" for part in parts)


def _few(evaluation: Evaluation) -> list[str]:
    counts = [cell.n for cell in evaluation.cells if cell.n]
    usual = mode(counts) if counts else FEW
    if usual >= FEW:
        return []
    return [
        f"{usual} item{'s' * (usual > 1)} per cell: a task's score is known to ± {spread_of(usual):.1f} at worst, "
        "whatever its interval over so few items says. Read smaller differences as chance."
    ]


def _unpooled(short: dict[str, Short]) -> list[str]:
    """One sentence for all methods that were given the same part of the items."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for method, places in short.items():
        given = tuple(
            f"{given} of {wanted} items ({where}, {length:,} tokens)"
            for (where, length), (given, wanted) in places.items()
        )
        groups[given].append(method)
    return [
        f"{listed(methods)}: given {', '.join(given)}, hence no score over all tasks there."
        for given, methods in groups.items()
    ]


def _stale(evaluation: Evaluation) -> list[str]:
    counts = Counter(_key(item) for item in evaluation.items)
    stale = [cell for cell in evaluation.cells if counts[_key(cell)] not in (cell.n, cell.n + cell.failed)]
    if not stale:
        return []
    return [
        f"{len(stale)} of {len(evaluation.cells)} cells count other items than items.jsonl holds, the first "
        f"{stale[0].method} on {stale[0].task}: the summary is older than the items, or from another run."
    ]


def _idle(evaluation: Evaluation) -> list[str]:
    idle = [item for item in evaluation.items if not (item.compressed or item.error or item.budget == 1.0)]
    whole = Counter(item.method for item in idle if item.method != "full")
    return [
        f"{method} compressed nothing in {n} items: read those scores as the full cache's."
        for method, n in whole.items()
    ]


def _missing(evaluation: Evaluation) -> list[str]:
    missing = [name for name in BASELINES if name not in {cell.method for cell in evaluation.cells}]
    return [f"Not measured, so there is nothing to compare with: {', '.join(missing)}."] if missing else []


def _key(row: CellKey) -> tuple[str, int, str, str, str]:
    return row.task, row.length, row.mode, row.method, budget_label(row.budget)
