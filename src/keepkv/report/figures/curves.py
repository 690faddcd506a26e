"""Leakage against what was removed, and divergence against budget."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from keepkv.report.budgets import axes as axes_of
from keepkv.report.budgets import budget_label, tick
from keepkv.report.figures.look import headed, legend, look
from keepkv.report.numbers import Report, peaks
from keepkv.report.style import MOST, OF_BASELINES, Style, styles


def leakage(report: Report) -> Figure | None:
    """A panel for each order (across) and handling of spans (down), peaks ringed."""
    rows = [row for row in report.evaluation.leakage if row.leak is not None]
    if not rows:
        return None
    found = [(row.order, row.spans, row.method) for row in rows]
    orders, spans, methods = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    drawn = _drawn(report, methods)
    figure = Figure(figsize=(3.1 * len(orders) + 1.6, 2.2 * len(spans) + 0.4), layout="constrained")
    grid = figure.subplots(len(spans), len(orders), squeeze=False, sharex=True, sharey=True)
    panels = {(kind, order): grid[y][x] for y, kind in enumerate(spans) for x, order in enumerate(orders)}
    for (kind, order), axes in panels.items():
        for method, style in drawn.items():
            own = [row for row in rows if (row.method, row.order, row.spans) == (method, order, kind)]
            own.sort(key=lambda row: row.removed)
            points = [(row.removed, row.leak, row.leak_low, row.leak_high) for row in own]
            _curve(axes, points, style, method)
        axes.set(ylim=(0, 1.02), xlim=(0, 1))
        axes.set_title(f"{order}, spans: {kind}", fontsize=9)
    for peak in peaks(rows):
        if peak.leak and peak.method in drawn:
            ring = {"ms": 11, "mfc": "none", "color": drawn[peak.method].colour, "clip_on": False}
            panels[peak.spans, peak.order].plot(peak.removed, peak.leak, "o", **ring)
    figure.supxlabel("share removed", fontsize=9)
    figure.supylabel("share of replies that leak", fontsize=9)
    legend(figure, report.methods)
    return figure


def fidelity(report: Report) -> Figure | None:
    """KL divergence against budget."""
    rows = [row for row in report.evaluation.fidelity if "kl" in row.metrics and row.method != "full"]
    if not rows:
        return None
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row.label, []).append(row.metrics["kl"].mean)
    names = sorted(means, key=lambda name: sum(means[name]) / len(means[name]))
    shown = axes_of(row.budget for row in rows)
    points = [len(axis.budgets) for axis in shown]
    figure = Figure(figsize=(min(9.5, 4.5 + 1.2 * sum(points)), 3.8), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False, sharey=True, width_ratios=[1 + n for n in points])[0]
    for axis, axes in zip(shown, grid, strict=True):
        places = dict(zip(axis.budgets, axis.at, strict=True))
        for name, style in _drawn(report, names).items():
            own = [row for row in rows if row.label == name and budget_label(row.budget) in places]
            kls = sorted((places[budget_label(row.budget)], i) for i, row in enumerate(own))
            found = [(x, own[i].metrics["kl"]) for x, i in kls]
            _curve(axes, [(x, kl.mean, kl.low, kl.high) for x, kl in found], style, name)
        axes.set_xticks(axis.at, list(map(tick, axis.budgets)))
        axes.set(xlabel=axis.title, ylim=(0, None), xlim=(-0.05, 1.05))
    grid[0].set(ylabel="KL(full ‖ compressed), nats: lower is better")
    legend(figure, names)
    return headed(figure, "Fidelity to the full cache")


def _drawn(report: Report, methods: list[str]) -> dict[str, Style]:
    """How methods are drawn that a figure has: those with a colour first, then others in grey, ten at most."""
    known = [name for name in methods if name in report.chosen or name in OF_BASELINES]
    others = [name for name in methods if name not in known][: MOST + len(OF_BASELINES) - len(known)]
    found = styles(report.chosen, others)
    return {name: found[name] for name in methods if name in known or name in others}


def _curve(axes: Any, points: list[tuple[Any, ...]], style: Style, name: str) -> None:
    """A line through points (x, y, low, high), with its band where it has one."""
    axes.plot([p[0] for p in points], [p[1] for p in points], label=name, **look(style))
    banded = [p for p in points if p[2] is not None and p[3] is not None]
    axes.fill_between(*([p[i] for p in banded] for i in (0, 2, 3)), color=style.colour, alpha=0.1, lw=0)
