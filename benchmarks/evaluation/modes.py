"""KeepKV's key modes against the same eviction without merging, on the same items, in pairs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from keepkv.measure import bootstrap

# Label of a merge, and the eviction that keeps the same slots up to the four bytes of votes that a merged slot has.
PAIRS = {
    "keepkv": "keydiff",
    "keepkv:key=bias": "keydiff",
    "keepkv:key=zip": "keydiff",
    "keepkv:key=code": "keydiff",
    "keepkv:score=snapkv": "snapkv",
    "keepkv:score=snapkv,threshold=None": "snapkv",
    "keepkv:score=snapkv,key=zip": "snapkv",
}


def key_modes(items: list[dict[str, Any]]) -> str:
    """Mean difference merge − eviction over all tasks of each mode and budget, with its 95 % bootstrap interval: tasks
    weigh the same, and items are drawn within tasks."""
    scores: dict[tuple[Any, ...], dict[Any, float]] = defaultdict(dict)
    for row in items:
        if row["error"] is None and row["task"] not in ("needle", "perplexity"):
            scores[row["mode"], row["budget"], row["method"]][row["task"], row["length"], row["seed"]] = row["score"]
    lines = ["Score of the merge minus score of the same eviction without it: same items, same bytes, same protection."]
    for mode in dict.fromkeys(key[0] for key in scores):
        budgets = [b for b in dict.fromkeys(key[1] for key in scores if key[0] == mode) if b != 1.0]
        lines += ["", f"## {mode}", "", "| merge | eviction | " + " | ".join(map(str, budgets)) + " |"]
        lines.append("|---" * (2 + len(budgets)) + "|")
        for merge, evict in PAIRS.items():
            cells = [_difference(scores[mode, b, merge], scores[mode, b, evict]) for b in budgets]
            lines.append(f"| `{merge}` | `{evict}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _difference(merged: dict[Any, float], evicted: dict[Any, float]) -> str:
    by_task: dict[Any, list[float]] = defaultdict(list)
    for key in sorted(merged.keys() & evicted.keys(), key=str):
        by_task[key[:2]].append(merged[key] - evicted[key])
    if not by_task:
        return ""
    estimates = [bootstrap(values, seed) for seed, values in enumerate(by_task.values())]
    mean = sum(one.mean for one in estimates) / len(estimates)
    # Tasks are independent: the variances of their means add up.
    spread = sum(((one.high or one.mean) - (one.low or one.mean)) ** 2 for one in estimates) ** 0.5 / 2 / len(estimates)
    text = f"{mean:+.3f} ±{spread:.3f}"
    return f"**{text}**" if abs(mean) > spread else text
