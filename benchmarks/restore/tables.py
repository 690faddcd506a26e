"""What restore slots gain: ``python -m benchmarks.restore.tables [FOLDER] > benchmarks/restore/results/tables.md``.

KL and right answers without and with restore slots, and the difference, paired by seed and context; 95 % intervals over
contexts.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.real_models.tables import mean, within
from keepkv.measure.ledger import Ledger

from .run import BUDGETS, OTHERS, TAUGHT, Answered

Key = tuple[str, int, int]  # task, seed, context


def line(method: str, name: str, chosen: tuple[str, ...], budget: float, rows: list[Answered]) -> str:
    """One line of the table; ``chosen``: the tasks that it is about."""
    cells: dict[str, dict[Key, Answered]] = defaultdict(dict)
    for row in rows:
        if row.method == method and row.task in chosen and row.budget in (budget, 1.0):
            kind = "full" if row.budget == 1.0 else "with" if row.restored else "without"
            cells[kind][row.task, row.seed, row.context] = row
    keys = sorted(cells["with"])
    far = {kind: [mean(cells[kind][key].kl) for key in keys] for kind in ("without", "with")}
    right = {kind: [mean([float(x) for x in cells[kind][key].right]) for key in keys] for kind in cells}
    pairs = {
        "kl": within([b - a for a, b in zip(far["without"], far["with"], strict=True)], signed=True),
        "right": within([b - a for a, b in zip(right["without"], right["with"], strict=True)], signed=True),
    }
    shown = [within(far["without"]), within(far["with"]), pairs["kl"], f"{mean(right['full']):.2f}"]
    shown += [f"{mean(right['without']):.2f}", f"{mean(right['with']):.2f}", pairs["right"]]
    return f"| `{method}` | {name} | {budget:g} | {len(keys)} | " + " | ".join(shown) + " |"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    rows = Ledger(folder / "rows.jsonl", Answered).rows()
    heads = ["method", "tasks", "budget", "contexts", "KL without", "KL with", "difference", "right: full cache"]
    heads += ["without", "with", "difference"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for method in dict.fromkeys(row.method for row in rows):
        for name, chosen in (("taught", TAUGHT), ("others", OTHERS), *((x, (x,)) for x in (*TAUGHT, *OTHERS))):
            for budget in BUDGETS:
                print(line(method, name, chosen, budget, rows))
    seeds, made = sorted({row.seed for row in rows}), rows[0].made_with
    print(f"\nSeeds {', '.join(map(str, seeds))}; {made.model}, {made.device}, {made.dtype}; {made.versions}.")


if __name__ == "__main__":
    main()
