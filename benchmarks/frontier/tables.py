"""The tables of the study's rows: the frontier by model, what codes change at equal bytes, and what a rule does.

python -m benchmarks.frontier.tables [FOLDER] > benchmarks/frontier/results/tables.md
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks.keepkv2.pooled import Cells, Interval, difference, ratio
from keepkv.measure import bootstrap
from keepkv.measure.ledger import Ledger

from .run import Point

Value = Callable[[Point], float]


def error(row: Point) -> float:
    return row.output_error


def loss(row: Point) -> float:
    return sum(row.kl) / len(row.kl)


def score(row: Point) -> float:
    """Share of the questions that are answered right."""
    return sum(row.right) / len(row.right)


def full_score(row: Point) -> float:
    return sum(row.known) / len(row.known)


def name(row: Point) -> str:
    """The arm with the default method by its short name."""
    return row.arm.replace("keepkv2:allocate=adakv,", "auto:").replace("keepkv2:allocate=adakv", "auto")


def of(rows: list[Point], model: str, arm: str, budget: float | None) -> list[Point]:
    return [x for x in rows if x.made_with.model == model and name(x) == arm and x.budget == budget]


def cells(rows: list[Point], value: Value) -> Cells:
    """By task, the value of each context."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row.task][row.context] = value(row)
    return found


def said(found: Interval | None, digits: int = 2) -> str:
    if found is None:
        return ""
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def spread(values: list[float], digits: int = 3) -> str:
    found = bootstrap(values)
    mean = f"{found.mean:.{digits}f}"
    return mean if found.low is None else f"{mean} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def frontier(rows: list[Point], model: str) -> list[str]:
    """Every arm at every budget, the least error first."""
    lines = ["| asked | arm | contexts | bytes | tokens kept | output error | KL | right |", "|---|---|" + "---:|" * 6]
    mine = [row for row in rows if row.made_with.model == model]
    for budget in sorted({x.budget for x in mine if x.budget}) + [None]:
        arms = {name(x) for x in mine if x.budget == budget}
        held = {arm: of(mine, model, arm, budget) for arm in arms}
        for arm, x in sorted(held.items(), key=lambda one: sum(map(error, one[1])) / len(one[1])):
            mean = sum(row.ratio for row in x) / len(x), sum(row.slots for row in x) / len(x)
            right = f"{sum(sum(row.right) for row in x)}/{sum(len(row.right) for row in x)}"
            lines.append(
                f"| {'codes alone' if budget is None else f'{budget:.0%}'} | `{arm}` | {len(x)} | {mean[0]:.1%} | "
                f"{mean[1]:.0%} | {spread(list(map(error, x)))} | {spread(list(map(loss, x)))} | {right} |"
            )
    return lines


def pairs(rows: list[Point], model: str, base: str) -> list[str]:
    """What codes change of ``base`` at equal bytes, paired by context."""
    lines = [
        f"| asked | `{base}` with | error × | KL − | right − | right, of the full cache's |", "|---|---|" + "---:|" * 4,
    ]  # fmt: skip
    arms = sorted({name(x) for x in rows if x.made_with.model == model and name(x).startswith(f"{base}:codec")})
    for budget in sorted({x.budget for x in rows if x.budget and x.made_with.model == model}):
        alone = of(rows, model, base, budget)
        for arm in ["", *arms]:
            mine = of(rows, model, arm, budget) if arm else alone
            if not mine:
                continue
            kinds = ((ratio, error, 2), (difference, loss, 3), (difference, score, 2)) if arm else ()
            one = [said(of_(cells(mine, value), cells(alone, value)), digits) for of_, value, digits in kinds]
            known = said(ratio(cells(mine, score), cells(mine, full_score)))
            what = arm.removeprefix(f"{base}:") or "eviction alone"
            lines.append(f"| {budget:.0%} | `{what}` | {' | '.join(one or ['', '', ''])} | {known} |")
    return lines


def main() -> None:
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    rows: list[Point] = Ledger(where / "rows.jsonl", Point).rows()
    for model in dict.fromkeys(str(row.made_with.model) for row in rows):
        mine = [row for row in rows if row.made_with.model == model]
        made = mine[0].made_with
        print(f"\n## {model}\n\n{made.device}, {made.dtype}, {made.versions}; "
              f"tasks {', '.join(dict.fromkeys(x.task for x in mine))}; "
              f"{min(x.tokens for x in mine)} to {max(x.tokens for x in mine)} tokens.\n")  # fmt: skip
        print("\n".join(frontier(rows, model)))
        for base in ("keepkv2", "auto"):
            print(f"\n### {model}: `{base}` with codes beside itself, at equal bytes\n")
            print("\n".join(pairs(rows, model, base)))


if __name__ == "__main__":
    main()
