"""The tables of the study's rows, by model, task and budget.

    python -m benchmarks.real_models.tables > benchmarks/real_models/results/tables.md
    python -m benchmarks.real_models.tables benchmarks/real_models/results/sight --beside long-document > …

KL with its 95 % interval over contexts, and replies that stay the same to the last token, of those in which the full
cache has the answer. Pairs: the KL of an arm minus that of one of ours, paired by task and context.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from keepkv.measure import bootstrap
from keepkv.measure.ledger import Ledger

from .items import TASKS
from .run import Kept


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def within(values: list[float], signed: bool = False) -> str:
    """Mean and interval in words; bold where a difference leaves zero out."""
    one = bootstrap(values)
    sign = "+" if signed else ""
    if one.low is None or one.high is None:
        return f"{one.mean:{sign}.3f}"
    text = f"{one.mean:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"
    return f"**{text}**" if signed and (one.low > 0 or one.high < 0) else text


def table(rows: list[Kept], budgets: list[float], beside: str) -> list[str]:
    """One line for each arm, the least KL first, and its pairs with the arm ``beside``."""
    cells: dict[str, dict[float, list[Kept]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.arm][row.budget].append(row)
    ours = {(row.task, row.context, row.budget): mean(row.kl) for row in rows if row.arm == beside}
    heads = [f"{word} at {100 * b:g} %" for word in ("KL", f"minus {beside}", "kept") for b in budgets]
    lines = ["| arm | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    found = []
    for arm, held in cells.items():
        if set(held) != set(budgets):
            continue
        losses = [within([mean(row.kl) for row in held[b]]) for b in budgets]
        pairs = []
        for b in budgets:
            both = [mean(x.kl) - ours[x.task, x.context, b] for x in held[b] if (x.task, x.context, b) in ours]
            pairs.append(within(both, signed=True) if both and arm != beside else "")
        kept = []
        for b in budgets:
            same = [s for row in held[b] for s, known in zip(row.same, row.known, strict=True) if known]
            kept.append(f"{sum(same)}/{len(same)}")
        order = mean([mean(row.kl) for b in budgets for row in held[b]])
        found.append((order, f"| `{arm}` | {' | '.join(losses + pairs + kept)} |"))
    return lines + [line for _, line in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", default=Path(__file__).parent / "results", help="a folder")
    parser.add_argument("--beside", default="keepkv3", help="the arm that is taken from each other")
    given = parser.parse_args()
    for path in sorted(given.rows.glob("*.jsonl")):
        rows = Ledger(path, Kept).rows()
        budgets = sorted({row.budget for row in rows})
        for task in (None, *TASKS):
            mine = [row for row in rows if task in (None, row.task)]
            if mine:
                contexts = len({(row.task, row.context) for row in mine})
                print(f"\n## {path.stem}, {task or 'all tasks'}: {contexts} contexts\n")
                print("\n".join(table(mine, budgets, given.beside)))


if __name__ == "__main__":
    main()
