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


def by_item(rows: list[Answered]) -> list[float]:
    """The score of each held-out context, mean over seeds."""
    found = defaultdict(list)
    for row in rows:
        found[row.item].append(row.score)
    return [sum(found[i]) / len(found[i]) for i in sorted(found)]


def shown(one: Estimate, sign: str = "") -> str:
    return f"{one.mean:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows.jsonl")
    rows = Ledger(parser.parse_args().rows, Answered).rows()
    for study in dict.fromkeys(row.study for row in rows):
        print(f"## {study}\n\n| model | seeds | cache | score | against untrained, paired | each seed |")
        print("|---|---|---|---|---|---|")
        for cache in CACHES:
            mine = [row for row in rows if row.study == study and row.cache == cache]
            base = by_item([row for row in mine if row.arm == "untrained"])
            for arm in ARMS:
                held = [row for row in mine if row.arm == arm]
                if not held:
                    continue
                scores, seeds = by_item(held), sorted({row.seed for row in held})
                change = [a - b for a, b in zip(scores, base, strict=True)]
                each = [[row.score for row in held if row.seed == seed] for seed in seeds]
                apart = "" if arm == "untrained" else shown(bootstrap(change), "+")
                alone = "" if arm == "untrained" else ", ".join(f"{sum(x) / len(x):.3f}" for x in each)
                print(f"| {arm} | {len(seeds)} | {cache} | {shown(bootstrap(scores))} | {apart} | {alone} |")
        took = {(r.arm, r.seed): r for r in rows if r.study == study and r.steps}
        for arm in ARMS[1:]:
            of_arm = [r for (name, _), r in took.items() if name == arm]
            if of_arm:
                said = ", ".join(f"{r.first:.3g} → {r.last:.3g}" for r in of_arm)
                print(f"\nLoss of {arm}, first and last of {of_arm[0].steps} steps: {said}.")
        print()


if __name__ == "__main__":
    main()
