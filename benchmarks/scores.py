"""Tables of an evaluation's cells in Markdown."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
# In the table, not in the mean: on another scale, and in plain English, which the embedded model does not follow.
UNLIKE = ("perplexity", "multi-instruction")
MODES = {
    "agnostic": "Compressed before the question is seen",
    "aware": "Compressed with the question in sight",
    "decode": "Compressed while a long reply is decoded",
}


def tables(cells: list[Record], run: Record) -> str:
    """One table per mode and budget: methods down, by their mean over tasks, and tasks across."""
    made_with = run["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made_with["versions"].items())
    lines = [
        f"Embedded model, {made_with['device']}, {made_with['dtype']}; {versions}; seeds {run['seeds']}.",
        "Scores with the half width of their 95 % bootstrap interval over contexts. Every method keeps the same "
        f"{run['sinks']} sinks and {run['window']} recent tokens; budgets are shares of the bytes of a plain cache. "
        "Text of our own: not to be compared with published RULER numbers.",
    ]
    for mode, words in MODES.items():
        mine = [cell for cell in cells if cell["mode"] == mode and cell["task"] not in ("needle",)]
        for budget in dict.fromkeys(cell["budget"] for cell in mine if cell["method"] != "full"):
            lines += ["", f"## {words}, budget {budget}", "", *_table(mine, budget)]
    return "\n".join(lines) + "\n"


def _table(cells: list[Record], budget: Any) -> list[str]:
    chosen = [cell for cell in cells if cell["budget"] == budget or cell["method"] == "full"]
    tasks = list(dict.fromkeys(cell["task"] for cell in chosen))
    found = {(cell["method"], cell["task"]): cell for cell in chosen}
    means = {}
    for method in dict.fromkeys(cell["method"] for cell in chosen):
        mine = [found[method, task] for task in tasks if (method, task) in found and task not in UNLIKE]
        scored = [cell["score"] for cell in mine if cell["score"] is not None]
        means[method] = sum(scored) / len(scored) if scored else float("nan")
    counts = [f"{task} ({found['full', task]['n']}/{found['full', task]['questions']})" for task in tasks]
    lines = ["| method | bytes | mean | " + " | ".join(counts) + " |", "|---" * (3 + len(tasks)) + "|"]
    for method in sorted(means, key=lambda name: (name != "full", -means[name])):
        mine = [found.get((method, task)) for task in tasks]
        ratios = [cell["ratio"] for cell in mine if cell and cell["ratio"] is not None]
        row = " | ".join(_cell(cell) for cell in mine)
        lines.append(f"| {method} | {sum(ratios) / len(ratios):.3f} | **{means[method]:.3f}** | {row} |")
    lines += ["", "In brackets: contexts / questions of a cell. The mean leaves out perplexity and multi-instruction."]
    return lines


def _cell(cell: Record | None) -> str:
    if cell is None or cell["score"] is None:
        return "failed"
    half = "" if cell["low"] is None else f" ±{(cell['high'] - cell['low']) / 2:.2f}"
    return f"{cell['score']:.3f}{half}" + (f" ({cell['failed']} failed)" if cell["failed"] else "")
