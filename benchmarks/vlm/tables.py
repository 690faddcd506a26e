"""The tables of the study from its rows: OP, loyalty and entries; and the frontiers of score against time.

python -m benchmarks.vlm.tables > benchmarks/vlm/results/tables.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from keepkv.evaluation.rows import ITEMS, ItemRow
from keepkv.evaluation.vision import Aggregate, aggregates
from keepkv.measure import bootstrap
from keepkv.measure.files import read_rows
from keepkv.metrics import frontier

from .speed import LatencyRow

NULL = "random"  # what every method is compared with, in pairs


def scores(rows: list[ItemRow], one: Aggregate, method: str | None = None) -> dict[tuple[str, int], float]:
    """Of each task and item; those of another ``method`` at the same budget where one is given."""
    key = (one.mode, one.length, method or one.method, one.budget)
    known = [x for x in rows if x.score is not None and (x.mode, x.length, x.method, x.budget) == key]
    return {(x.task, x.seed): x.score for x in known if x.score is not None}


def written(values: list[float], form: str) -> str:
    """Mean and 95 % interval."""
    if not values:
        return ""
    found = bootstrap(values)
    interval = "" if found.low is None else f" [{found.low:{form}}, {found.high:{form}}]"
    return f"{found.mean:{form}}{interval}"


def table(rows: list[ItemRow], found: list[Aggregate]) -> list[str]:
    lines = [
        f"| method | budget | entries, of all | score | less `{NULL}` | OP | OL | loyalty | failed |",
        "|---" * 9 + "|",
    ]
    for one in found:
        mine, null, loyal = scores(rows, one), scores(rows, one, NULL), one.loyalty
        pairs = [] if one.method == NULL else [x - null[at] for at, x in mine.items() if at in null]
        said = " | " if loyal is None else f"{loyal.macro:.1f} | {loyal.micro:.1f} [{loyal.low:.0f}, {loyal.high:.0f}]"
        entries = "" if one.entries is None else f"{one.entries:.0f}, {one.share:.3f}"
        lines.append(
            f"| `{one.method}` | {one.budget:g} | {entries} | {written([*mine.values()], '.2f')} | "
            f"{written(pairs, '+.2f')} | "
            f"{one.performance or 0:.3f} | {said} | {one.failed or ''} |"
        )
    return lines


def fronts(found: list[Aggregate], latency: list[LatencyRow], tokens: int) -> list[str]:
    """Of OP against speed-up, to the first token and for each further one, at prompts of about ``tokens``."""
    mine = {(x.method, x.budget): x for x in latency if abs(x.tokens - tokens) < 0.2 * tokens}
    full = next((x for (name, _), x in mine.items() if name == "full"), None)
    points = [(one, mine[one.method, one.budget]) for one in found if (one.method, one.budget) in mine]
    if full is None or not points:
        return ["No latencies of this length."]
    lines = [
        "| method | budget | OP | first token, × | each token, × | on the frontier of |",
        "|---|---|---|---|---|---|",
    ]
    speed = [(full.first.median / x.first.median, full.each.median / x.each.median) for _, x in points]
    ops = [one.performance or 0.0 for one, _ in points]
    first, each = (frontier([(s[i], op) for s, op in zip(speed, ops, strict=True)]) for i in (0, 1))
    for i, (one, _) in enumerate(points):
        on = [name for name, held in (("first", first), ("each", each)) if i in held]
        lines.append(
            f"| `{one.method}` | {one.budget:g} | {ops[i]:.3f} | {speed[i][0]:.2f} | {speed[i][1]:.2f} | "
            f"{', '.join(on)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="benchmarks/vlm/results")
    folder = Path(parser.parse_args().results)
    rows = read_rows(folder, ITEMS, ItemRow)
    latency = read_rows(folder, "latency.jsonl", LatencyRow)
    found = aggregates(rows)
    for mode, length in dict.fromkeys((one.mode, one.length) for one in found):
        own = [one for one in found if (one.mode, one.length) == (mode, length)]
        lost = ", ".join(sorted({name for one in own for name in one.left_out}))
        print(f"## {mode}, {length} tokens\n")
        print("\n".join(table(rows, own)))
        print(f"\nWithout a ratio, as the full cache scores 0: {lost or 'none'}.\n")
        print(f"### Score against time, {length} tokens\n")
        print("\n".join(fronts(own, latency, length)))
        print()


if __name__ == "__main__":
    main()
