"""The tables of the study's rows: KL with its interval over contexts, and replies kept, by model and budget.

python -m benchmarks.defaults.tables [FOLDER] > benchmarks/defaults/results/tables.md
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from keepkv.measure import bootstrap
from keepkv.measure.ledger import Ledger

from .run import BUDGETS, Kept


def table(rows: list[Kept]) -> list[str]:
    """One line for each method, the least KL over all budgets first."""
    cells: dict[str, dict[float, list[Kept]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.method][row.budget].append(row)
    heads = [f"KL at {100 * budget:g} %" for budget in BUDGETS] + [f"kept at {100 * budget:g} %" for budget in BUDGETS]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    found = []
    for method, held in cells.items():
        losses = [bootstrap([sum(row.kl) / len(row.kl) for row in held[budget]]) for budget in BUDGETS]
        kept = []
        for budget in BUDGETS:
            replies = [same for row in held[budget] for same, known in zip(row.same, row.known, strict=True) if known]
            kept.append(f"{sum(replies)}/{len(replies)}")
        words = [f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" if one.low is not None else f"{one.mean:.3f}"
                 for one in losses]  # fmt: skip
        found.append((sum(one.mean for one in losses), f"| `{method}` | {' | '.join(words + kept)} |"))
    return lines + [line for _, line in sorted(found)]


def alike(rows: list[Kept]) -> list[set[int]]:
    """Contexts by the methods that were measured on them: a table compares methods on the same ones."""
    methods: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        methods[row.context].add(row.method)
    groups: dict[frozenset[str], set[int]] = defaultdict(set)
    for context, held in methods.items():
        groups[frozenset(held)].add(context)
    return list(groups.values())


def main() -> None:
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    rows = Ledger(where / "rows.jsonl", Kept).rows()
    for aware in (False, True):
        for model in dict.fromkeys(row.made_with.model for row in rows if row.aware == aware):
            mine = [row for row in rows if row.aware == aware and row.made_with.model == model]
            seen = "with the question in sight" if aware else "before the question is seen"
            for contexts in alike(mine):
                print(f"\n## {model}, compressed {seen}: contexts {min(contexts)} to {max(contexts)}\n")
                print("\n".join(table([row for row in mine if row.context in contexts])))


if __name__ == "__main__":
    main()
