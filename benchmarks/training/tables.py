"""Tables of the study, from its rows.

python -m benchmarks.training.tables > benchmarks/training/results/tables.md
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from benchmarks.training.run import ARMS, CACHES, Answered
from keepkv.measure.interval import Estimate, bootstrap
from keepkv.measure.ledger import Ledger

RESULTS = Path(__file__).parent / "results"


def by_item(rows: list[Answered], what: str) -> list[float]:
    """``what`` of each held-out context, mean over seeds."""
    found = defaultdict(list)
    for row in rows:
        found[row.item].append(getattr(row, what))
    return [sum(found[i]) / len(found[i]) for i in sorted(found)]


def shown(one: Estimate, sign: str = "") -> str:
    return f"{one.mean:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def compared(held: list[Answered], base: list[Answered], what: str) -> tuple[str, str]:
    """A mean over contexts, and its change against ``base``, paired by context."""
    if not held:
        return "", ""
    mine, theirs = by_item(held, what), by_item(base, what)
    change = [a - b for a, b in zip(mine, theirs, strict=True)]
    apart = "" if held[0].arm == base[0].arm else shown(bootstrap(change), "+")
    return f"{sum(mine) / len(mine):.3f}", apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows.jsonl")
    rows = Ledger(parser.parse_args().rows, Answered).rows()
    for study in dict.fromkeys(row.study for row in rows):
        print(f"## {study}\n\n| cache | model | seeds | score | change | KL | change | said | change |")
        print("|---|---|---|---|---|---|---|---|---|")
        for cache in CACHES:
            mine = [row for row in rows if row.study == study and row.cache == cache]
            base = [row for row in mine if row.arm == "untrained"]
            for arm in ARMS:
                held = [row for row in mine if row.arm == arm]
                cells = [cell for what in ("score", "kl", "said") for cell in compared(held, base, what)]
                if held:
                    print(f"| {cache} | {arm} | {len({row.seed for row in held})} | {' | '.join(cells)} |")
        took = {(r.arm, r.seed): r for r in rows if r.study == study and r.steps}
        for arm in ARMS[1:]:
            of_arm = [r for (name, _), r in took.items() if name == arm]
            if of_arm:
                said = ", ".join(f"{r.first:.3g} → {r.last:.3g}" for r in of_arm)
                print(f"\nLoss of {arm}, first and last of {of_arm[0].steps} steps: {said}.")
        print()


if __name__ == "__main__":
    main()
