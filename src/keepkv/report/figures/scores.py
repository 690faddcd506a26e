"""Score against budget, bytes and speed."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from keepkv.report.figures.look import headed, legend, line, panels, where
from keepkv.report.numbers import Report, budget_label, front
from keepkv.report.style import FAINT, INK, styles

OTHERS = "other methods"


def score(report: Report, mode: str, length: int) -> Figure:
    """Score against budget with intervals, one line for each method."""
    task = report.main(mode, length)
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    _scores(report, axes, task, mode, length, bands=True)
    axes.set(xlabel="budget", ylabel="score", title=f"Score against budget: {task}, {where(mode, length)}")
    legend(figure, report.methods)
    return figure


def tasks(report: Report, mode: str, length: int) -> Figure | None:
    """Score against budget, a small panel for each task."""
    shown = [task for task in report.tasks if report.at(task, mode, length)]
    if len(shown) < 2:
        return None
    figure, grid = panels(len(shown), 5, 2.4, 1.9)
    for axes, task in zip(grid, shown, strict=True):
        _scores(report, axes, task, mode, length, bands=False)
        axes.set_title(task, fontsize=9)
    legend(figure, report.methods)
    return headed(figure, f"Score against budget, {where(mode, length)}")


def pareto(report: Report, mode: str, length: int) -> Figure | None:
    """Score against real bytes, and against speed; the points that no other beats in both are joined."""
    task = report.main(mode, length)
    cells = [cell for cell in report.at(task, mode, length) if cell.score is not None]
    ratios = [cell.ratio for cell in cells if cell.ratio]
    if not ratios:
        return None
    order = {budget: i for i, budget in enumerate(report.budgets)}
    cells.sort(key=lambda cell: order.get(budget_label(cell.budget), -1))
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column in ((left, "ratio"), (right, "written_per_s")):
        points = [(float(x), float(cell.score or 0), cell.method) for cell in cells if (x := getattr(cell, column))]
        for method in reversed(report.methods):
            own = [(x, y) for x, y, name in points if name == method]
            look = _look(report, method) | {"lw": 1, "marker": "o", "ms": 4 if method in report.chosen else 2}
            axes.plot([x for x, _ in own], [y for _, y in own], **look)
        best = front(points, small=column == "ratio")
        axes.step([x for x, _, _ in best], [y for _, y, _ in best], where="post", color=INK, lw=0.8, alpha=0.5)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if tick >= 0.9 * min(ratios)]
    left.set(xscale="log", xlabel="ratio: bytes held / bytes of the full cache", ylabel="score", ylim=(-0.02, 1.02))
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    right.set(xlabel="tokens written per second", xlim=(0, None))
    left.set_title(f"What a score costs: {task}, {where(mode, length)}")
    legend(figure, report.methods)
    return figure


def _scores(report: Report, axes: Any, task: str, mode: str, length: int, bands: bool) -> None:
    table = report.table(task, mode, length)
    for method in reversed(report.methods):  # the best on top
        cells, at = table.get(method, []), report.positions
        if method == "full":
            cells, at = cells[:1] * 2, [-0.04, 1.04]
        own = [(x, cell) for x, cell in zip(at, cells, strict=False) if cell is not None and cell.score is not None]
        at, look, shown = [x for x, _ in own], _look(report, method), method in report.chosen
        dotted = shown and bands and method != "full"
        axes.plot(at, [cell.score for _, cell in own], marker="o" if dotted else None, ms=4, **look)
        low, high = [cell.low for _, cell in own], [cell.high for _, cell in own]
        if bands and shown and None not in low + high:
            axes.fill_between(at, low, high, color=look["color"], alpha=0.1, lw=0)
    axes.set_xticks(report.positions, report.budgets)
    axes.set(ylim=(-0.02, 1.02), xlim=(-0.05, 1.05))


def _look(report: Report, method: str) -> dict[str, Any]:
    """Arguments of a line. As on the page, the methods that are not shown first are there, and faint."""
    style = styles(report.methods)[method]
    if method not in report.chosen:
        return {"color": FAINT, "lw": 0.6, "ls": line(style.dash), "label": OTHERS}
    return {"color": style.colour, "lw": 1.8, "ls": line(style.dash), "label": method}
