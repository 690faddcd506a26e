"""The page of ``oracle.py``: error, its share of the best published rival's, and divergence, of every choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plan import FEW, OURS
from pooled import Cells, mean, ratio
from tables import markdown, number, share

RIVAL = "kvzip"
VALUES = ("output_error", "kl", "answer_kl", "ratio")
Record = dict[str, Any]


def cells_of(held: Record, method: str, budget: float, value: str, tasks: Sequence[str]) -> Cells:
    """``value`` of each context by model and task."""
    index = VALUES.index(value)
    return {
        (model, task): {seed: values[index] for seed, values in methods[method][str(budget)].items()}
        for model, found in held["cells"].items()
        for task, methods in found.items()
        if task in tasks and method in methods
    }


def page(held: Record) -> str:
    """Every method on all contexts; and on those of several questions, where half of them may be known."""
    every = [task for found in held["cells"].values() for task in found]
    names = [m for found in held["cells"].values() for methods in found.values() for m in methods]
    several = [t for found in held["cells"].values() for t, methods in found.items() if "half search" in methods]
    halves = [name for name in dict.fromkeys(names) if "half" in name]
    others = [name for name in dict.fromkeys(names) if "half" not in name]
    versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    draws = ", ".join(f"{name} ({draw})" for name, draw in held["draws"].items())
    lines = ["# How small the output error could be", "", f"Models (draw of items) {draws}; {versions}."]
    for title, tasks, shown in (
        ("All contexts", list(dict.fromkeys(every)), others),
        ("Contexts of several questions", list(dict.fromkeys(several)), [*others, *halves]),
    ):
        cells = cells_of(held, OURS, FEW[0], "output_error", tasks)
        lines += ["", f"## {title} ({len(cells)} of model × task, {sum(map(len, cells.values()))} contexts)", ""]
        rows = []
        for name in shown:
            own = {b: cells_of(held, name, b, "output_error", tasks) for b in FEW}
            apart = [ratio(own[b], cells_of(held, RIVAL, b, "output_error", tasks)) for b in FEW]
            rows.append([
                f"`{name}`", *(number(mean(own[b])) for b in FEW),
                *(f"{number(x.value)} ± {number(x.half)}" if x and name != RIVAL else "" for x in apart),
                *(number(mean(cells_of(held, name, b, "kl", tasks))) for b in FEW),
            ])  # fmt: skip
        head = [f"{word}{share(b)}" for word in ("error, ", f"/ `{RIVAL}`'s, ", "KL, ") for b in FEW]
        lines += markdown(["method", *head], rows)
    return "\n".join(lines) + "\n"
