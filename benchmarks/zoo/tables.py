"""The tables of the study's rows: by model and mode, who wins, and named rivals task by task.

    python -m benchmarks.zoo.tables > benchmarks/zoo/results/tables.md

The score of a context is the share of the full cache's right answers that stay right; tasks weigh the same. Intervals
are 95 %, bootstrapped over contexts within tasks; differences are paired by task and context, bold where zero is out.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.keepkv2.pooled import Cells, Interval, difference
from keepkv.evaluation.setup import MODES
from keepkv.measure.ledger import Ledger

from .arms import FULL
from .run import BUDGETS, TASKS, Scored

RESULTS = Path(__file__).parent / "results"
OURS = "keepkv2"
NULLS = ("random", "protected-lru")
CODED = "codec="
RIVALS = {  # the strongest of 2026 by their names, each in its strongest form, and those of ours
    "keepkv2": OURS, "KVzip+": "kvzip:plus=true,allocate=pooled", "KVzip": "kvzip:allocate=pooled",
    "KVgrad": "kvgrad", "KVCompose": "kvcompose", "CurDKV": "curdkv", "CurDKV, AdaKV": "adakv:score=curdkv",
    "Compactor": "compactor", "KeyDiff": "keydiff", "SnapKV": "snapkv", "KVzap": "kvzap", "keepkv3": "keepkv3",
    "auto": "auto", "keepkv2, 4 bits": "keepkv2:codec=hadamard", "KVzip, 4 bits": "kvzip:codec=hadamard",
}  # fmt: skip


def scores(rows: list[Scored], budget: float) -> dict[str, Cells]:
    """By arm, of each model and task: the score of each context in which the full cache has answers. What is not
    compressed to a budget counts at each. A task with one such context alone tells no spread: it is left out where
    others have more."""
    cells: dict[str, dict[Any, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        right = row.right[row.budgets.index(budget) if budget in row.budgets else 0]
        if right:
            cells[row.arm][row.made_with.model, row.task][row.context] = sum(right) / len(right)
    return {arm: {key: x for key, x in mine.items() if len(x) > 1} or dict(mine) for arm, mine in cells.items()}


def mean(cells: Cells) -> Interval | None:
    """The mean with its interval."""
    return difference(cells, {key: dict.fromkeys(items, 0.0) for key, items in cells.items()})


def above(found: Interval | None) -> bool:
    return found is not None and found.low > 0


def below(found: Interval | None) -> bool:
    return found is not None and found.high < 0


def percent(found: Interval | None, signed: bool = False) -> str:
    """Whole per cent, bold where a difference leaves zero out; a share that is drawn out ends at 0 and at 100."""
    if found is None:
        return ""
    sign, least = ("+", -1) if signed else ("", 0)
    value, *ends = (f"{100 * min(max(x, least), 1):{sign}.0f}" for x in (found.value, found.low, found.high))
    text = value if found.low != found.low else f"{value} [{', '.join(ends)}]"
    return f"**{text}**" if signed and (above(found) or below(found)) else text


def held(rows: list[Scored], arm: str) -> str:
    """The share of the bytes that is held for each that was asked for, mean over contexts, in per cent."""
    mine = [row for row in rows if row.arm == arm]
    shares = zip(*(row.ratio for row in mine), strict=True)
    return " / ".join(f"{100 * sum(share) / len(mine):.1f}" for share in shares)


def table(rows: list[Scored]) -> list[str]:
    """Every arm at every budget, the best mean first."""
    by_budget = {b: scores(rows, b) for b in BUDGETS}
    heads = [f"{word} {b:.0%}" for word in ("at", f"minus {OURS},") for b in BUDGETS]
    lines = ["| arm | " + " | ".join(heads) + " | held |", "|---" * (2 + len(heads)) + "|"]
    found = []
    for arm in by_budget[BUDGETS[0]]:
        one = [mean(by_budget[b][arm]) for b in BUDGETS]
        pairs = [difference(by_budget[b][arm], by_budget[b].get(OURS, {})) for b in BUDGETS]
        cells = [percent(x) for x in one] + ["" if arm == OURS else percent(x, signed=True) for x in pairs]
        order = -sum(x.value for x in one if x)
        found.append((order, f"| `{arm}` | {' | '.join(cells)} | {held(rows, arm)} |"))
    return lines + [line for _, line in sorted(found)]


def winners(rows: list[Scored]) -> Iterator[str]:
    """At each budget, in words: who is ahead of keepkv2, and who is not ahead of a choice that knows nothing."""
    for budget in BUDGETS:
        cells = scores(rows, budget)
        arms = [arm for arm in cells if CODED not in arm and arm not in (FULL, OURS, *NULLS)]
        to = {name: {arm: difference(cells[arm], cells[name]) for arm in arms} for name in (OURS, *NULLS)}
        ahead = [arm for arm in arms if above(to[OURS][arm])]
        level = [arm for arm in arms if arm not in ahead and not below(to[OURS][arm])]
        yield f"- **{budget:.0%}.** Ahead of `{OURS}`: {names(ahead)}. Level with it: {names(level)}."
        for null in NULLS:
            lost = [arm for arm in arms if not above(to[null][arm])]
            yield f"  Not ahead of `{null}`, {len(lost)} of {len(arms)}: {names(lost)}."


def names(arms: list[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms) or "none"


def by_task(rows: list[Scored], budget: float) -> list[str]:
    """The named rivals, task by task: mean over models and contexts, in per cent."""
    cells = scores(rows, budget)
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    lines = ["| " + " | ".join(("", *tasks)) + " |", "|---" * (1 + len(tasks)) + "|"]
    for name, arm in RIVALS.items():
        if arm in cells:
            mine = [{key: x for key, x in cells[arm].items() if key[1] == task} for task in tasks]
            shown = (mean(x) for x in mine)
            lines.append(f"| {name} | " + " | ".join(f"{100 * x.value:.0f}" if x else "" for x in shown) + " |")
    return lines


def rows_in(folder: Path) -> list[Scored]:
    return [row for path in sorted(folder.glob("*.jsonl")) for row in Ledger(path, Scored).rows()]


def page(rows: list[Scored]) -> str:
    """All tables in Markdown."""
    models = list(dict.fromkeys(row.made_with.model for row in rows))
    lines = ["Shares of the full cache's right answers that stay right, in per cent, [95 %]; see the README."]
    for mode in MODES:
        for model in [*models, None] if len(models) > 1 else models:
            mine = [row for row in rows if row.mode == mode and model in (None, row.made_with.model)]
            if mine:
                full = [row for row in mine if row.arm == FULL]
                known, asked = sum(len(row.right[0]) for row in full), sum(row.questions for row in full)
                lines += ["", f"## {model or 'all models'}, {mode}: {len(full)} contexts", ""]
                lines += [f"The full cache answers {known} of {asked} questions.", "", *table(mine), "", *winners(mine)]
                for budget in BUDGETS[:2]:
                    lines += ["", f"By task at {budget:.0%}:", "", *by_task(mine, budget)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(rows_in(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)), end="")
