"""What slots that stay exact beside codes change at equal bytes, paired by task and context.

python -m benchmarks.frontier.exact > benchmarks/frontier/results/exact/tables.md
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.keepkv2.pooled import difference, ratio
from keepkv.measure.ledger import Ledger

from .run import Point
from .tables import cells, error, loss, name, of, said


def table(rows: list[Point], codec: str) -> list[str]:
    """Each option beside ``keepkv`` with ``codec`` alone."""
    base = f"keepkv:codec={codec}"
    lines = ["| asked | option | bytes | tokens kept | error × | KL − | right |", "|---|---|" + "---:|" * 5]
    arms = sorted({name(x) for x in rows if name(x).startswith(base)}, key=lambda arm: (len(arm), arm))
    for budget in sorted({x.budget for x in rows if x.budget}):
        alone = of(rows, "embedded", base, budget)
        for arm in arms:
            mine = of(rows, "embedded", arm, budget)
            mean = sum(x.ratio for x in mine) / len(mine), sum(x.slots for x in mine) / len(mine)
            changed = [
                said(ratio(cells(mine, error), cells(alone, error)), 3),
                said(difference(cells(mine, loss), cells(alone, loss))),
            ]
            right = f"{sum(sum(x.right) for x in mine)}/{sum(len(x.right) for x in mine)}"
            what = arm.removeprefix(f"{base},store.") if arm != base else "none"
            two = " | ".join(changed if arm != base else ["", ""])
            lines.append(f"| {budget:.0%} | `{what}` | {mean[0]:.2%} | {mean[1]:.0%} | {two} | {right} |")
    return lines


def main() -> None:
    rows: list[Point] = Ledger(Path(__file__).parent / "results/exact/rows.jsonl", Point).rows()
    for prefill in ("immediate", "deferred"):
        for codec in ("int4", "int2"):
            print(f"\n## {codec}, {prefill}\n")
            print("\n".join(table([x for x in rows if x.prefill == prefill], codec)))


if __name__ == "__main__":
    main()
