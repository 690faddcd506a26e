"""The tables of the study's rows: facts recalled and divergence, with intervals, and in pairs to the random choice.

python -m benchmarks.long_decode.tables [FOLDER] > benchmarks/long_decode/results/tables.md
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from keepkv.measure import bootstrap
from keepkv.measure.ledger import Ledger

from .run import BUDGETS, REPLY, Recalled

NULL = "random-attention"
OLD = REPLY // 2  # tokens from which a fact is old


def share(row: Recalled) -> float:
    """Of the facts of a context, those recalled."""
    return sum(row.right) / len(row.right)


def words(values: list[float], digits: int = 3) -> str:
    one = bootstrap(values)
    low, high = (one.mean if x is None else x for x in (one.low, one.high))
    return f"{one.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def by_age(rows: list[Recalled], old: bool) -> str:
    """Recalled of the facts that are old, or of those that are not, over all contexts."""
    found = [hit for row in rows for n, hit in zip(row.ages, row.right, strict=True) if (n >= OLD) == old]
    return f"{sum(found) / len(found):.3f}"


def table(rows: dict[str, list[Recalled]]) -> list[str]:
    """One line for each method, who recalls most first. rows: of each method, in the order of the contexts."""
    heads = ["method", "recalled", f"− `{NULL}`", f"younger than {OLD}", "older", "KL"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    null = [share(row) for row in rows[NULL]]
    for name, mine in sorted(rows.items(), key=lambda pair: -sum(map(share, pair[1]))):
        shares = [share(row) for row in mine]
        apart = words([a - b for a, b in zip(shares, null, strict=True)]) if name != NULL else ""
        cells = [f"`{name}`", words(shares), apart, by_age(mine, False), by_age(mine, True)]
        lines.append("| " + " | ".join([*cells, words([row.kl for row in mine], 4)]) + " |")
    return lines


def main(where: Path) -> None:
    rows = [row for row in Ledger(where / "rows.jsonl", Recalled).rows() if row.right]
    full = [row for row in rows if row.method == "full"]
    facts, known = sum(len(row.right) for row in full), words(list(map(share, full)))
    print(f"{len(full)} contexts with {facts} facts behind the prompt, of which the full cache recalls {known}.")
    for budget in BUDGETS:
        held: dict[str, list[Recalled]] = defaultdict(list)
        for row in rows:
            if row.budget == budget:
                held[row.method].append(row)
        print(f"\n## {budget} slots\n")
        print("\n".join(table(held)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
