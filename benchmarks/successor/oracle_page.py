"""The page of ``oracle.py``: error, its share of the best published rival's, and divergence, of every choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plan import FEW, OURS
from pooled import Cells, mean, ratio
from tables import markdown, number, share

RIVAL = "kvzip"
VALUES = ("output_error", "kl", "answer_kl", "ratio")
SOURCES = ("oracle", "half", "same task", "other tasks", "text again")
SHOWN = (OURS, *(f"{OURS} and {who} refit" for who in SOURCES))  # of each model
NOTE = (
    "4 first and 16 last tokens are kept by all. Means over tasks and models of the mean over contexts; shares of "
    f"`{RIVAL}`'s error with half of their 95 % interval (paired bootstrap over contexts, stratified by task and "
    "model); KL(full ‖ compressed) of the next token in nats, at all tokens and at those of answers. What is known: "
    "`oracle` the questions and answers that are measured, `half` the other half of the questions on the same text, "
    "`same task` 8 questions of that task about other texts, `other tasks` 12 of three other kinds of task about other "
    "texts, `text again` eight pieces of the text, 64 tokens each, read behind it; the last two can be had before any "
    "question, the last one without a guess at what is asked. Refits hold the same slots, and 1.5 % more bytes for "
    "their votes. `int8`: as many slots as the bytes of the budget hold; sizes are computed, all others measured."
)
Record = dict[str, Any]


def cells_of(held: Record, method: str, budget: float, value: str, tasks: Sequence[str], model: str = "") -> Cells:
    """``value`` of each context by model and task; of one model where it is named."""
    index = VALUES.index(value)
    return {
        (name, task): {seed: values[index] for seed, values in methods[method][str(budget)].items()}
        for name, found in held["cells"].items()
        for task, methods in found.items()
        if task in tasks and method in methods and model in ("", name)
    }


def shares(held: Record, method: str, tasks: Sequence[str], model: str = "") -> list[str]:
    """Of the rival's error on the same contexts, by budget."""
    if method == RIVAL:
        return [""] * len(FEW)
    both = ([cells_of(held, m, b, "output_error", tasks, model) for m in (method, RIVAL)] for b in FEW)
    found = [ratio(*pair) for pair in both]
    return [f"{number(x.value)} ± {number(x.half)}" if x else "–" for x in found]


def page(held: Record) -> str:
    """Every method on all contexts; and on those of several questions, where half of them may be known."""
    every = list(dict.fromkeys(task for found in held["cells"].values() for task in found))
    names = list(dict.fromkeys(m for found in held["cells"].values() for some in found.values() for m in some))
    several = [t for t in every if any("half search" in found.get(t, ()) for found in held["cells"].values())]
    versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    draws = ", ".join(f"{name} ({draw})" for name, draw in held["draws"].items())
    lines = ["# How small the output error could be", "", f"Models (draw of items) {draws}; 1,024 tokens; {versions}."]
    lines += [NOTE]
    for title, tasks in (("All contexts", every), ("Contexts of several questions", several)):
        cells = cells_of(held, OURS, FEW[0], "output_error", tasks)
        lines += ["", f"## {title} ({len(cells)} of model × task, {sum(map(len, cells.values()))} contexts)", ""]
        shown = [name for name in names if tasks is several or "half" not in name]
        means = ([number(mean(cells_of(held, m, b, v, tasks))) for v in VALUES[:3] for b in FEW] for m in shown)
        head = [f"{word}{share(b)}" for word in ("error, ", f"/ `{RIVAL}`'s, ", "KL, ", "answers, ") for b in FEW]
        rows = [[f"`{m}`", *x[:3], *shares(held, m, tasks), *x[3:]] for m, x in zip(shown, means, strict=True)]
        lines += markdown(["method", *head], rows)
    lines += ["", f"## Share of `{RIVAL}`'s error by model, contexts of several questions", ""]
    models = list(held["cells"])
    rows = [[f"`{m}`", *(x for model in models for x in shares(held, m, several, model))] for m in SHOWN]
    lines += markdown(["method", *(f"{model}, {share(b)}" for model in models for b in FEW)], rows)
    return "\n".join(lines) + "\n"
