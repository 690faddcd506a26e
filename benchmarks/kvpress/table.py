"""Rows of the tables: all comparisons of one pair, summed up."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from .outcome import Comparison

TIE = 1e-4  # relative difference of scores below which the order is a matter of rounding


@dataclass
class Row:
    """All comparisons of one pair."""

    name: str
    why: str = ""
    comparisons: list[Comparison] = field(default_factory=list)
    full: list[float] = field(default_factory=list)  # logit difference of the two plain caches, same prompts
    errors: list[str] = field(default_factory=list)
    bytes: list[tuple[float, float, float]] = field(default_factory=list)  # ratio, kvpress' share, keepkv's share

    def summary(self) -> dict[str, Any]:
        heads = [x for c in self.comparisons for x in c.heads]
        worst = max((c.gap for c in self.comparisons), default=math.nan)
        return {
            "method": self.name,
            "runs": len(self.comparisons),
            "heads": len(heads),
            "jaccard_mean": mean(heads) if heads else math.nan,
            "jaccard_min": min(heads, default=math.nan),
            "heads_equal": sum(x == 1 for x in heads),
            "slots": sum(c.slots for c in self.comparisons),
            "slots_differing": sum(c.differing for c in self.comparisons),
            "score_gap_max": worst,
            "logits_max": max((c.logits for c in self.comparisons), default=math.nan),
            "logits_max_same_sets": max((c.logits for c in self.comparisons if not c.differing), default=math.nan),
            "logits_spread": mean(c.spread for c in self.comparisons) if self.comparisons else math.nan,
            "full_cache_logits_max": max(self.full, default=math.nan),
            "bytes": self.shares(),
            "refused": sorted(set(self.errors)),
            "why": self.cause(worst),
        }

    def shares(self) -> list[dict[str, float]]:
        """Mean share of the plain cache's bytes that each library holds, per ratio."""
        rows = []
        for ratio in sorted({x[0] for x in self.bytes}):
            theirs, mine = zip(*((t, m) for r, t, m in self.bytes if r == ratio), strict=True)
            rows.append({"ratio": ratio, "kvpress": mean(theirs), "keepkv": mean(mine)})
        return rows

    def cause(self, worst: float) -> str:
        if not any(c.differing for c in self.comparisons):
            return ""
        if worst <= TIE:
            return f"ties: swapped slots score the same to {worst:.0e}"
        return self.why or "UNEXPLAINED"


_HEAD = (
    f"{'method':50} {'runs':>4} {'heads =':>11} {'J mean':>7} {'J min':>6} {'slots ≠':>12} {'gap':>8} "
    f"{'Δlogits':>8} {'Δ same':>8}  cause"
)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{title}\n{_HEAD}\n{'-' * len(_HEAD)}")
    for r in rows:
        equal = f"{r['heads_equal']}/{r['heads']}"
        slots = f"{r['slots_differing']}/{r['slots']}"
        print(
            f"{r['method']:50} {r['runs']:4} {equal:>11} {r['jaccard_mean']:7.4f} {r['jaccard_min']:6.3f} {slots:>12} "
            f"{r['score_gap_max']:8.1e} {r['logits_max']:8.1e} {r['logits_max_same_sets']:8.1e}  {r['why']}"
        )
        for error in r["refused"]:
            print(f"{'':50} refused: {error}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The same as a Markdown table, for docs/peers.md."""
    lines = [
        "| method | runs | heads with equal sets | Jaccard, mean | Jaccard, min | slots that differ | logits |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['runs']} | {r['heads_equal']} of {r['heads']} | {r['jaccard_mean']:.4f} | "
            f"{r['jaccard_min']:.3f} | {r['slots_differing']} of {r['slots']} | {r['logits_max']:.0e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    document = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for title, rows in document["tables"].items():
        print(f"\n### {title}\n\n{markdown(rows)}")
