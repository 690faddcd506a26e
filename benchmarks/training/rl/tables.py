"""The tables of the study's rows: scores with intervals, and in pairs between trainings.

python -m benchmarks.training.rl.tables [FOLDER] > benchmarks/training/rl/results/tables.md
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from keepkv.measure import bootstrap
from keepkv.measure.ledger import Ledger

from .run import ARMS, STUDIES, Replied

PAIRS = (("RL-sparse", "none"), ("RL-full", "none"), ("RL-sparse", "RL-full"))
CACHES, SCORES = ("compressed", "full"), ("greedy", "drawn")
Scores = dict[tuple[str, int], list[float]]  # of each arm and seed, in the order of the questions


def words(values: list[float]) -> str:
    """Mean and 95 % interval over questions; no interval where all are alike."""
    one = bootstrap(values)
    low, high = (one.mean if x is None else x for x in (one.low, one.high))
    return f"{one.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def scores(rows: list[Replied], cache: str, kind: str) -> Scores:
    """The scores of each training with one cache."""
    held: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.cache == cache:
            held[row.arm, row.seed][row.item] = getattr(row, kind)
    return {key: [found[i] for i in sorted(found)] for key, found in held.items()}


def over_seeds(held: Scores, arm: str) -> list[float]:
    """Of each question the mean over the seeds of ``arm``."""
    mine = [values for (name, _), values in held.items() if name == arm]
    return [sum(some) / len(some) for some in zip(*mine, strict=True)]


def arms_table(held: Scores) -> list[str]:
    """One line for each arm: mean over questions and seeds, and the mean of each seed."""
    lines = ["| training | score | of each seed |", "|---|---|---|"]
    for arm in ARMS:
        each = [sum(x) / len(x) for (name, _), x in sorted(held.items()) if name == arm]
        if each:
            said = words(over_seeds(held, arm)).replace("+", "")
            lines.append(f"| {arm} | {said} | {', '.join(f'{x:.3f}' for x in each)} |")
    return lines


def pairs_table(held: Scores) -> list[str]:
    """One line for each pair of arms: the difference, paired by question, and that of each seed."""
    lines = ["| difference | paired by question | of each seed |", "|---|---|---|"]
    known = {name for name, _ in held}
    for one, other in PAIRS:
        if {one, other} <= known:
            apart = [a - b for a, b in zip(over_seeds(held, one), over_seeds(held, other), strict=True)]
            each = []
            for (name, seed), mine in sorted(held.items()):
                theirs = held.get((other, 0 if other == "none" else seed))
                if name == one and theirs is not None:
                    each.append(sum(a - b for a, b in zip(mine, theirs, strict=True)) / len(mine))
            lines.append(f"| {one} − {other} | {words(apart)} | {', '.join(f'{x:+.3f}' for x in each)} |")
    return lines


def main(where: Path) -> None:
    rows = Ledger(where / "rows.jsonl", Replied).rows()
    for study in STUDIES:
        print(f"\n# {study}")
        for cache in CACHES:
            for kind in SCORES:
                held = scores([row for row in rows if row.study == study], cache, kind)
                replies = "most likely replies" if kind == "greedy" else "replies drawn at temperature 1"
                print(f"\n## Asked with the {cache} cache, {replies}\n")
                print("\n".join([*arms_table(held), "", *pairs_table(held)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
