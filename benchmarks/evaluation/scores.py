"""Tables of an evaluation's cells in Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from keepkv import tasks
from keepkv.evaluation.summary import over_tasks
from keepkv.measure import Estimate
from keepkv.report.budgets import budget_label

Record = dict[str, Any]
PEER = "kvpress/"
MODES = {
    "agnostic": "Compressed before the question is seen",
    "aware": "Compressed with the question in sight",
    "decode": "Compressed while a long reply is decoded",
}


def tables(cells: list[Record], items: list[Record], run: Record) -> str:
    """One table per mode and budget: methods down, by their mean over tasks, and tasks across."""
    scores: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in items:
        scores[row["mode"], row["method"], row["budget"]][row["task"]].append(row["score"] or 0.0)
    given = {mode: _pooled(by_task) for (mode, method, _), by_task in scores.items() if method == "full"}
    means = {key: over_tasks(by_task) if _pooled(by_task) == given[key[0]] else None for key, by_task in scores.items()}
    made_with = run["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made_with["versions"].items())
    lines = [
        f"Embedded model, {made_with['device']}, {made_with['dtype']}; {versions}; seeds {run['seeds']}.",
        "Scores with the half width of their 95 % bootstrap interval over contexts. Every method keeps the same "
        f"{run['sinks']} sinks and {run['window']} recent tokens; budgets are shares of the bytes of a plain cache. "
        "Tasks weigh the same in the mean. Text of our own: not to be compared with published RULER numbers.",
    ]
    for mode, words in MODES.items():
        mine = [cell for cell in cells if cell["mode"] == mode and cell["task"] != "needle"]
        mine = [cell for cell in mine if not cell["method"].startswith(PEER)]
        for budget in dict.fromkeys(cell["budget"] for cell in mine if cell["method"] != "full"):
            over_all = {m: means[mode, m, 1.0 if m == "full" else budget] for m in _methods(mine, budget)}
            lines += ["", f"## {words}, {budget_label(budget)}", "", *_table(mine, budget, over_all)]
        lines += _common(words, {key[1:]: by_task for key, by_task in scores.items() if key[0] == mode})
    return "\n".join(lines) + "\n"


def _common(words: str, scores: dict[tuple[str, Any], dict[str, list[float]]]) -> list[str]:
    """Where some methods were not given every task: means over the tasks that all were given, methods down."""
    scores = {key: by_task for key, by_task in scores.items() if not key[0].startswith(PEER)}
    common = set.intersection(*map(_pooled, scores.values())) if scores else set()
    counted = sorted(common)
    if len(counted) < 2 or all(_pooled(by_task) == common for by_task in scores.values()):
        return []
    found = {key: over_tasks({name: by_task[name] for name in counted}) for key, by_task in scores.items()}
    budgets = [b for b in dict.fromkeys(b for _, b in scores) if b != 1.0]
    methods = [m for m in dict.fromkeys(m for m, _ in scores) if m == "full" or (m, budgets[0]) in found]
    rows = {m: [found.get((m, 1.0 if m == "full" else b)) for b in budgets] for m in methods}
    order = {m: row[1].mean if row[1] else -1.0 for m, row in rows.items()}
    lines = [
        "",
        f"## {words}: every method, over the tasks that all were given",
        "",
        f"Means over {', '.join(counted)}.",
        "",
    ]
    lines += ["| method | " + " | ".join(map(budget_label, budgets)) + " |", "|---" * (1 + len(budgets)) + "|"]
    for method in sorted(methods, key=lambda m: (m != "full", -order[m])):
        lines.append(f"| {method} | " + " | ".join(map(_mean, rows[method])) + " |")
    return lines


def _pooled(names: Iterable[str]) -> set[str]:
    return {name for name in names if tasks.pooled(name)}


def _methods(cells: list[Record], budget: Any) -> list[str]:
    return list(dict.fromkeys(cell["method"] for cell in cells if cell["budget"] == budget or cell["method"] == "full"))


def _table(cells: list[Record], budget: Any, means: dict[str, Estimate | None]) -> list[str]:
    chosen = [cell for cell in cells if cell["budget"] == budget or cell["method"] == "full"]
    tasks = list(dict.fromkeys(cell["task"] for cell in chosen))
    found = {(cell["method"], cell["task"]): cell for cell in chosen}
    counts = [f"{task} ({found['full', task]['n']}/{found['full', task]['questions']})" for task in tasks]
    lines = ["| method | bytes | mean | " + " | ".join(counts) + " |", "|---" * (3 + len(tasks)) + "|"]
    order = {name: one.mean if one else -1.0 for name, one in means.items()}
    for method in sorted(means, key=lambda name: (name != "full", -order[name])):
        mine = [found.get((method, task)) for task in tasks]
        ratios = [cell["ratio"] for cell in mine if cell and cell["ratio"] is not None]
        row = " | ".join(_cell(cell) for cell in mine)
        ratio = sum(ratios) / len(ratios) if ratios else float("nan")
        lines.append(f"| {method} | {ratio:.3f} | {_mean(means[method])} | {row} |")
    lines += ["", "In brackets: contexts / questions of a cell. The mean leaves out perplexity and multi-instruction."]
    return lines


def _mean(found: Estimate | None) -> str:
    if found is None:
        return "–"
    half = "" if found.low is None or found.high is None else f" ±{(found.high - found.low) / 2:.3f}"
    return f"**{found.mean:.3f}**{half}"


def _cell(cell: Record | None) -> str:
    if cell is None:
        return "–"
    if cell["score"] is None:
        return "failed"
    half = "" if cell["low"] is None else f" ±{(cell['high'] - cell['low']) / 2:.2f}"
    return f"{cell['score']:.3f}{half}" + (f" ({cell['failed']} failed)" if cell["failed"] else "")


def peers(items: list[Record]) -> str:
    """kvpress' scores beside ours on the same items, as many slots per head: mean over items, by mode and budget."""
    held = {_item(row): row for row in items if row["error"] is None}
    failed = Counter(row["method"] for row in items if row["error"] is not None and row["method"].startswith(PEER))
    groups: dict[tuple[Any, ...], list[tuple[Record, Record]]] = defaultdict(list)
    for row in items:
        if row["error"] is None and row["method"].startswith(PEER):
            ours = row["method"].removeprefix(PEER)
            if (mine := held.get(_item(row | {"method": ours}))) is not None:
                groups[row["mode"], ours, row["budget"]].append((row, mine))
    lines = [
        "kvpress 0.5.5 in its own environment, on the first items of each task: the same prompts, weights and slots.",
        "Ours keep the sinks and recent tokens that every method keeps here; kvpress keeps what a press defines, for",
        "most of them neither, which decides where the question stands at the end. With options that mean the same,",
        "replies are compared in agreement-kvpress.json. bytes: measured, as a share of a plain cache.",
        "",
        "| mode | method | budget | items | kvpress | keepkv | kvpress' bytes | our bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (mode, method, budget), pairs in sorted(groups.items(), key=str):
        theirs, ours = ([pair[k] for pair in pairs] for k in (0, 1))
        scores = " | ".join(f"{sum(row['score'] for row in rows) / len(rows):.3f}" for rows in (theirs, ours))
        sizes = " | ".join(f"{sum(row['ratio'] for row in rows) / len(rows):.3f}" for rows in (theirs, ours))
        lines.append(f"| {mode} | {method} | {budget} | {len(pairs)} | {scores} | {sizes} |")
    lines += ["", *(f"{count} items failed in {method}." for method, count in sorted(failed.items()))]
    return "\n".join(lines) + "\n"


def _item(row: Record) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("task", "length", "mode", "method", "budget", "seed"))
