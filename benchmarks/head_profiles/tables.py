"""The tables of the study's rows.

    python -m benchmarks.head_profiles.tables > benchmarks/head_profiles/results/tables.md

KL with its 95 % interval over contexts. Minus shuffled: what a profile has minus the mean of its shuffles, paired by
task and context; beaten: of how many shuffles the mean is larger. Minus uniform: the same pairs.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.real_models.tables import mean, within
from keepkv.measure.ledger import Ledger

from .run import Shared

Key = tuple[str, int]  # task and context


def table(rows: list[Shared]) -> list[str]:
    """One line for each arm, its shuffles together."""
    far: dict[str, dict[Key, float]] = defaultdict(dict)
    same: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        far[row.arm][row.task, row.context] = mean(row.kl)
        same[row.arm.partition("/")[0] + " shuffled" * ("/" in row.arm)] += row.same
    lines = ["| arm | KL | minus shuffled | beaten | minus uniform | same replies |", "|---" * 6 + "|"]
    for arm, found in far.items():
        if "/" in arm or len(found) < len(far["uniform"]):  # a run that was stopped
            continue
        seeds = [x for name, x in far.items() if name.startswith(f"{arm}/")]
        pairs = [found[key] - mean([x[key] for x in seeds]) for key in found] if seeds else []
        beaten = f"{sum(mean([*x.values()]) > mean([*found.values()]) for x in seeds)} of {len(seeds)}" if seeds else ""
        even = [x - far["uniform"][key] for key, x in found.items()] if arm != "uniform" else []
        cells = [within([*found.values()]), within(pairs, True) if pairs else "", beaten]
        cells += [within(even, True) if even else "", f"{100 * mean(same[arm]):.0f} %"]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
        if seeds:
            every = [mean([x[key] for x in seeds]) for key in found]
            lines.append(f"| `{arm}` shuffled | {within(every)} | | | | {100 * mean(same[arm + ' shuffled']):.0f} % |")
    return lines


def main() -> None:
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    for path in sorted(where.glob("*.jsonl")):
        rows = Ledger(path, Shared).rows()
        for asked, budget in sorted({(row.asked, row.budget) for row in rows}, reverse=True):
            mine = [row for row in rows if (row.asked, row.budget) == (asked, budget)]
            contexts, held = len({(row.task, row.context) for row in mine}), {row.held for row in mine}
            when = "the question is read first" if asked else "no question is known"
            assert len(held) == 1, "arms hold the same number of slots"
            ratio = mean([row.ratio for row in mine])
            print(f"\n## {path.stem}, {when}, {budget} slots a head: {contexts} contexts, {ratio:.3f} of the bytes\n")
            print("\n".join(table(mine)))


if __name__ == "__main__":
    main()
