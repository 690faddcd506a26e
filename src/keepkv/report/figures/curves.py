"""Leakage against what was removed, and divergence against budget."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from keepkv.report.figures.look import legend, line
from keepkv.report.numbers import Report, budget_label, peaks
from keepkv.report.style import styles


def leakage(report: Report) -> Figure | None:
    """A panel for each order (across) and handling of spans (down), peaks ringed."""
    rows = [row for row in report.evaluation.leakage if row.leak is not None]
    if not rows:
        return None
    found = [(row.order, row.spans, row.method) for row in rows]
    orders, spans, methods = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    look = styles([*report.methods, *methods])
    figure = Figure(figsize=(3.1 * len(orders) + 1.6, 2.2 * len(spans) + 0.4), layout="constrained")
    grid = figure.subplots(len(spans), len(orders), squeeze=False, sharex=True, sharey=True)
    panels = {(kind, order): grid[y][x] for y, kind in enumerate(spans) for x, order in enumerate(orders)}
    for (kind, order), axes in panels.items():
        for method in methods:
            own = [row for row in rows if (row.method, row.order, row.spans) == (method, order, kind)]
            own.sort(key=lambda row: row.removed)
            points = [(row.removed, row.leak, row.leak_low, row.leak_high) for row in own]
            _curve(axes, points, look[method].colour, look[method].dash, method)
        axes.set(ylim=(0, 1.02), xlim=(0, 1))
        axes.set_title(f"{order}, spans: {kind}", fontsize=9)
    for peak in peaks(rows):
        style = {"ms": 9, "mfc": "none", "color": look[peak.method].colour, "clip_on": False}
        if peak.leak:
            panels[peak.spans, peak.order].plot(peak.removed, peak.leak, "o", **style)
    figure.supxlabel("share removed", fontsize=9)
    figure.supylabel("share of replies that leak", fontsize=9)
    legend(figure, report.methods)
    return figure


def fidelity(report: Report) -> Figure | None:
    """KL divergence against budget."""
    rows = [row for row in report.evaluation.fidelity if "kl" in row.metrics and row.method != "full"]
    if not rows:
        return None
    budgets = list(dict.fromkeys(budget_label(row.budget) for row in rows))
    names = list(dict.fromkeys(row.label for row in rows))
    look = styles([*report.methods, *names])
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in names:
        own = [row for row in rows if row.label == name]
        kls = [(budgets.index(budget_label(row.budget)), row.metrics["kl"]) for row in own]
        points = [(x, kl.mean, kl.low, kl.high) for x, kl in kls]
        _curve(axes, points, look[name].colour, look[name].dash, name)
    axes.set_xticks(range(len(budgets)), budgets)
    axes.set(xlabel="budget", ylabel="KL(full ‖ compressed), nats", ylim=(0, None), title="Fidelity to the full cache")
    legend(figure, report.methods)
    return figure


def _curve(axes: Any, points: list[tuple[Any, ...]], colour: str, dash: str, name: str) -> None:
    """A line through points (x, y, low, high), with its band where it has one."""
    axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, lw=1.5, ls=line(dash), label=name)
    banded = [p for p in points if p[2] is not None and p[3] is not None]
    axes.fill_between(*([p[i] for p in banded] for i in (0, 2, 3)), color=colour, alpha=0.1, lw=0)
