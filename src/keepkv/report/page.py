"""The page: a template with the numbers in it as JSON. Nothing in it is fetched from anywhere.

What is drawn is drawn by the page's own script from that JSON; without scripts the tables of scores and figures made
by ``figures`` are shown instead. Every string from data reaches the page through ``html.escape`` or as text.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

from keepkv.evaluation.rows import CellRow, MapRow
from keepkv.evaluation.setup import BASELINES
from keepkv.measure.interval import Z
from keepkv.report.budgets import TITLES, budget_label, places
from keepkv.report.notes import FEW
from keepkv.report.numbers import SAME, Report, peaks
from keepkv.report.pool import ALL
from keepkv.report.style import OF_BASELINES, OTHERS, SERIES, palette

COLUMNS = (
    "n", "failed", "score", "low", "high", "minus_full", "minus_full_low", "minus_full_high", "ratio", "bytes",
    "full_bytes", "peak_bytes", "read_per_s", "written_per_s", "leaked",
)  # fmt: skip
LEAKAGE = (
    "order", "spans", "removed", "n", "leak", "leak_low", "leak_high", "directive", "directive_low", "directive_high",
    "keep_defence", "keep_directive",
)  # fmt: skip
MODES = {
    "agnostic": "Query-agnostic: the context is compressed before any question is seen.",
    "aware": "Query-aware: the question is in the prompt when it is compressed.",
    "decode": "Decode: what the model itself writes is compressed as it goes on.",
}
MAPS_LIMIT = 2_500_000  # characters; maps beyond them are left out, and the page says so
# One character for each token's survival, in 64ths: four times shorter than numbers.
STEPS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def page(report: Report, figures: Sequence[str] = ()) -> str:
    """The whole document. figures: SVGs for readers without scripts."""
    parts = {
        "title": escape(f"keepkv: {report.evaluation.run.model}"),
        "style": palette() + _part("page.css"),
        "headline": _headline(report),
        "notes": _notes(report),
        "summary": "".join(_summary(report, *panel) for panel in report.panels()),
        "figures": "".join(f"<figure>{svg}</figure>" for svg in figures),
        # A closing tag within a string would end the script.
        "data": json.dumps(_finite(data(report)), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
        "script": "".join(_part(f"{name}.js") for name in ("elements", "charts", "page", "sections", "start")),
    }
    text = _part("page.html")
    # In one pass, so that nothing in the data is taken for a place to fill.
    pieces = text.split("{{")
    return pieces[0] + "".join(parts[piece.partition("}}")[0]] + piece.partition("}}")[2] for piece in pieces[1:])


def data(report: Report) -> dict[str, Any]:
    """What the page's script draws from, as plain data; tasks, modes, methods and budgets as indices into lists."""
    ev = report.evaluation
    methods = list(dict.fromkeys([*report.methods, *report.also, *(m.method for m in ev.maps)]))
    tasks = [ALL, *report.tasks]
    budgets = list(dict.fromkeys([*report.budgets, *(budget_label(c.budget) for c in report.cells)]))
    cell_of = {id(cell): i for i, cell in enumerate(report.cells)}
    maps, left_out = _maps(report, methods)
    task, mode, length, budget = report.start
    return {
        "tasks": tasks,
        "modes": [[mode, MODES[mode]] for mode in report.modes],
        "lengths": report.lengths,
        "methods": [{"name": m, "base": m in BASELINES} for m in methods],
        "series": [asdict(one) for one in SERIES],
        "baselines": {name: asdict(one) for name, one in OF_BASELINES.items()},
        "others": [asdict(one) for one in OTHERS],
        "measured": [methods.index(m) for m in report.methods],
        "budgets": budgets,
        "asked": len(report.budgets),
        "axes": TITLES,
        "places": places(cell.budget for cell in ev.cells),
        "fidelity_places": places(row.budget for row in ev.fidelity),
        "same": SAME,
        "few": FEW,
        "z": Z,
        "start": {"task": task, "mode": mode, "length": length, "budget": budget, "methods": report.chosen},
        "columns": COLUMNS,
        "cells": [
            [tasks.index(c.task), report.modes.index(c.mode), report.lengths.index(c.length), methods.index(c.method)]
            + [budgets.index(budget_label(c.budget)), *(_short(getattr(c, name)) for name in COLUMNS)]
            for c in report.cells
        ],
        "needles": [
            [tasks.index(p.task), report.modes.index(p.mode), methods.index(p.method), budgets.index(p.budget)]
            + [p.depth, p.length, _short(p.score), p.n]
            for p in report.needles
            if p.budget in budgets
        ],
        "maps": maps,
        "maps_left_out": left_out,
        "failures": [[m, e, n, t] for m, e, n, t in report.failures],
        "losses": [[methods.index(one.method), one.below, one.cells, cell_of[id(one.worst)]] for one in report.losses],
        "leakage": [
            {"method": methods.index(row.method)} | {name: getattr(row, name) for name in LEAKAGE} for row in ev.leakage
        ],
        "peaks": [ev.leakage.index(row) for row in peaks(ev.leakage)],
        "fidelity": [
            {"method": methods.index(row.label), "budget": budget_label(row.budget), "ratio": row.ratio}
            | {"segments": row.segments, "context": row.context}
            | {name: [one.mean, one.low, one.high] for name, one in row.metrics.items()}
            for row in ev.fidelity
        ],
    }


def _part(name: str) -> str:
    return (files(__package__) / "template" / name).read_text(encoding="utf-8")


def _headline(report: Report) -> str:
    run = report.evaluation.run
    made = run.environment
    commit, _, state = (made.revision or "").partition("-")
    facts = {
        "Model": run.model,
        "Tasks": f"{len(report.tasks)}",
        "Items per cell": _items(report),
        "Tokens": ", ".join(f"{length:,}" for length in report.lengths),
        "Methods": f"{len(report.methods)}",
        "Budgets": ", ".join(report.budgets),
        "Seeds": ", ".join(map(str, run.seeds)),
        "Device": f"{made.device}, {made.dtype}",
        "Versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
        "Revision": "not from a repository" if made.revision is None else commit[:10] + (f", {state}" if state else ""),
    }
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())


def _items(report: Report) -> str:
    """How many items most cells have, and the fewest and most."""
    counts = Counter(cell.n for cell in report.cells if cell.task != ALL and cell.n)
    if len(counts) < 2:
        return f"{max(counts, default=0)}"
    return f"{counts.most_common(1)[0][0]} as a rule, {min(counts)} to {max(counts)}"


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    lines = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<aside class="notes" aria-label="Notes on this run"><ul>{lines}</ul></aside>'


def _breakable(name: str) -> str:
    """The name of a method in HTML, which may go on in a new line after a separator and nowhere else."""
    return re.sub(r"([:,/=])", r"\1<wbr>", escape(name))


def _summary(report: Report, mode: str, length: int) -> str:
    """The scores of a mode and length as a table: what a reader without scripts has."""
    task = report.main(mode, length)
    budgets, table = report.table(task, mode, length)
    budget = report.start[3] if report.start[3] in budgets else None
    ranked = {cell.method for cell in report.at(task, mode, length, budget)}
    head = "".join(f"<th scope=col>{escape(budget)}</th>" for budget in budgets)
    rows = [
        f"<tr><th scope=row>{_breakable(method)}</th>{''.join(map(_score, cells))}</tr>"
        for method, cells in table.items()
        if method in ranked
    ]
    where = f"{MODES[mode].split(':')[0]}, {length:,} tokens, {task}"
    return (
        f'<table class="summary" data-mode="{escape(mode)}" data-length="{length}"><caption>{escape(where)}</caption>'
        f"<thead><tr><th scope=col>method</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _score(cell: CellRow | None) -> str:
    if cell is None or cell.score is None:
        return "<td>–</td>"
    spread = "" if cell.low is None or cell.high is None else f" <small>{cell.low:.2f}–{cell.high:.2f}</small>"
    return f"<td>{cell.score:.3f}{spread}</td>"


def _maps(report: Report, methods: list[str]) -> tuple[dict[str, Any], int]:
    """Maps, each text once, and how many are left out. Shorter texts and the budget shown first come first."""
    texts: list[dict[str, Any]] = []
    known: dict[Any, int] = {}
    rows: list[list[Any]] = []
    size = 0
    shown = report.start[3]

    def turn(one: MapRow) -> tuple[int, bool, int]:
        return one.length, one.method != "full" and budget_label(one.budget) != shown, report.modes.index(one.mode)

    ordered = sorted(report.evaluation.maps, key=turn)
    for one in ordered:
        key = (tuple(one.tokens), tuple(one.questions))
        fresh = sum(len(token) + 3 for token in one.tokens) if key not in known else 0
        size += fresh + len(one.survival) + 4 * sum(map(len, one.kept)) + 40
        if size > MAPS_LIMIT:
            break
        if key not in known:
            known[key] = len(texts)
            seen = {"vision": one.vision, "grid": one.grid} if one.vision and one.grid else {}
            texts.append({"tokens": one.tokens, "questions": one.questions, "answers": one.answers, **seen})
        survival = "".join(STEPS[round(63 * min(1.0, max(0.0, value)))] for value in one.survival)
        where = [one.task, one.mode, one.length, methods.index(one.method), budget_label(one.budget)]
        rows.append([*where, known[key], one.kept, survival])
    return {"texts": texts, "rows": rows, "steps": STEPS}, len(ordered) - len(rows)


def _short(value: float | None) -> float | None:
    """Six digits: no chart or table shows more."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def _finite(value: Any) -> Any:
    """JSON has no infinity: null in its place."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
