"""Score against budget, bytes and speed."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from keepkv.report.budgets import Axis, tick
from keepkv.report.figures.look import headed, legend, look, panels, where
from keepkv.report.numbers import Report, front
from keepkv.report.style import FAINT, INK, styles

OTHERS = "other methods"


def score(report: Report, mode: str, length: int) -> Figure | None:
    """Score against budget with intervals, one line for each method; shares and slots have an axis each."""
    task = report.main(mode, length)
    axes = report.axes(task, mode, length)
    if not axes:
        return None
    points = [len(axis.budgets) for axis in axes]
    figure = Figure(figsize=(min(8.5, 3.2 + 1.1 * sum(points)), 4.6), layout="constrained")
    grid = figure.subplots(1, len(axes), squeeze=False, sharey=True, width_ratios=[1 + n for n in points])[0]
    for axis, place in zip(axes, grid, strict=True):
        _scores(report, place, axis, task, mode, length, bands=True)
        place.set_xlabel(axis.title)
    grid[0].set_ylabel("score")
    legend(figure, report.methods)
    return headed(figure, f"Score against budget: {task}, {where(mode, length)}")


def tasks(report: Report, mode: str, length: int) -> Figure | None:
    """Score against budget, a small panel for each task, and for shares and slots where there are both."""
    shown = [(task, axis) for task in report.tasks for axis in report.axes(task, mode, length)]
    if len({task for task, _ in shown}) < 2:
        return None
    alike = len({axis.title for _, axis in shown}) == 1
    figure, grid = panels(len(shown), 5 if alike else 6, 2.4, 1.9, alike)
    for place, (task, axis) in zip(grid, shown, strict=True):
        _scores(report, place, axis, task, mode, length, bands=False)
        place.set_title(task if alike else f"{task}, {axis.title.split(': ')[1]}", fontsize=9 if alike else 7)
    legend(figure, report.methods)
    return headed(figure, f"Score against budget, {where(mode, length)}")


def pareto(report: Report, mode: str, length: int) -> Figure | None:
    """Score against real bytes, and against speed; the points that no other beats in both are joined, random left
    out."""
    task = report.main(mode, length)
    cells = [cell for cell in report.at(task, mode, length) if cell.score is not None]
    ratios = [cell.ratio for cell in cells if cell.ratio]
    if not ratios:
        return None
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    drawn = styles(report.chosen)
    for axes, column in ((left, "ratio"), (right, "written_per_s")):
        points = [(float(x), float(cell.score or 0), cell.method) for cell in cells if (x := getattr(cell, column))]
        others = [(x, y) for x, y, name in points if name not in report.chosen]
        if others:
            axes.plot(*zip(*others, strict=True), ".", color=FAINT, ms=4, label=OTHERS)
        for method in reversed(report.chosen):
            own = sorted((x, y) for x, y, name in points if name == method)
            axes.plot([x for x, _ in own], [y for _, y in own], label=method, **look(drawn[method]) | {"lw": 1})
        best = front([point for point in points if point[2] != "random"], small=column == "ratio")
        axes.step([x for x, _, _ in best], [y for _, y, _ in best], where="post", color=INK, lw=0.8, alpha=0.5)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if tick >= 0.9 * min(ratios)]
    left.set(xscale="log", xlabel="ratio: bytes held / bytes of the full cache", ylabel="score", ylim=(-0.02, 1.02))
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    right.set(xlabel="tokens written per second", xlim=(0, None))
    legend(figure, report.methods)
    return headed(figure, f"What a score costs: {task}, {where(mode, length)}")


def _scores(report: Report, axes: Any, axis: Axis, task: str, mode: str, length: int, bands: bool) -> None:
    budgets, table = report.table(task, mode, length)
    drawn = styles(report.chosen)
    for method in reversed(report.chosen):  # the best on top
        by_budget = dict(zip(budgets, table.get(method, []), strict=False))
        own = [(x, cell) for x, name in zip(axis.at, axis.budgets, strict=True) if (cell := by_budget.get(name))]
        own = [(x, cell) for x, cell in own if cell.score is not None]
        style = look(drawn[method], 4.5 if bands else 2.5)
        if method == "full" and own:
            own = [(-0.04, own[0][1]), (1.04, own[0][1])]
            style |= {"marker": None}
        at = [x for x, _ in own]
        axes.plot(at, [cell.score for _, cell in own], label=method, **style)
        low, high = [cell.low for _, cell in own], [cell.high for _, cell in own]
        if bands and None not in low + high:
            axes.fill_between(at, low, high, color=style["color"], alpha=0.08, lw=0)
    axes.set_xticks(axis.at, list(map(tick, axis.budgets)))
    axes.set(ylim=(-0.02, 1.02), xlim=(-0.05, 1.05))
