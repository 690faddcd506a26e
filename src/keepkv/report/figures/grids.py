"""Grids: methods by tasks, needles, budgets by head, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from keepkv.evaluation.rows import CellRow, MapRow
from keepkv.report.budgets import budget_label
from keepkv.report.figures.look import HEAT, SPLIT, folded, headed, ink_on, panels, shades, where
from keepkv.report.numbers import Report
from keepkv.report.page import MODES
from keepkv.report.pool import ALL


def heat(report: Report, mode: str, length: int) -> Figure | None:
    """Method by task at the budget shown first: score, and difference from the full cache."""
    budget = report.start[3]
    shown = [task for task in [ALL, *report.tasks] if report.at(task, mode, length, budget)]
    if len(shown) < 2:
        return None
    found = {(cell.method, task): cell for task in shown for cell in report.at(task, mode, length, budget)}
    ranked = [cell.method for cell in report.at(shown[0], mode, length, budget)]
    methods = list(dict.fromkeys([*ranked, *(name for name, _ in found)]))
    figure = Figure(figsize=(0.84 * len(shown) + 3.2, 0.27 * len(methods) + 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column, colours, least, most in ((left, "score", HEAT, 0, 1), (right, "minus_full", SPLIT, -0.8, 0.8)):
        values = [[_value(found.get((method, task)), column) for task in shown] for method in methods]
        image = axes.imshow(values, cmap=colours, vmin=least, vmax=most, aspect="auto")
        shades_of = image.to_rgba(image.get_array())
        figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=24, pad=0.02)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    text = f"{value:.2f}".replace("0.", ".")
                    ink = ink_on(shades_of[y, x])
                    # Within its field: the layout need not ask each of a thousand texts how wide it is.
                    axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=ink, in_layout=False)
        axes.set_xticks(range(len(shown)), shown, rotation=90)
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(False)
    left.set_title("score")
    right.set_title("difference from full")
    return headed(figure, f"At a budget of {budget}, {where(mode, length)}")


def needle(report: Report) -> Figure | None:
    """Score by depth and length, a grid for each method, at the budget and mode shown first."""
    _, mode, _, budget = report.start
    own = [p for p in report.needles if p.mode == mode and (p.method == "full" or p.budget == budget)]
    if not own:
        return None
    own = [place for place in own if place.task == own[0].task]
    depths, lengths = sorted({p.depth for p in own}), sorted({p.length for p in own})
    found = {(p.method, p.depth, p.length): p.score for p in own}

    def fill(axes: Any, method: str) -> Any:
        values = [[found.get((method, depth, length), math.nan) for length in lengths] for depth in depths]
        image = axes.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        return image

    methods = [name for name in report.methods if any(p.method == name for p in own)]
    figure = _grids(methods, fill, ("tokens of context", "depth: 0 % is the start", "score"))
    return headed(figure, f"{own[0].task}: depth by length, {MODES[mode].split(':')[0].lower()}, budget {budget}")


def kept(report: Report) -> Figure | None:
    """Slots kept by layer and KV head, a grid for each method, of the first text of the view shown first."""
    found = _maps(report)
    counts = [count for one in found.values() for layer in one.kept for count in layer]
    if not counts:
        return None
    heads = max(len(layer) for one in found.values() for layer in one.kept)

    def fill(axes: Any, method: str) -> Any:
        layers = found[method].kept
        rows = [[*layer, *[math.nan] * (heads - len(layer))] for layer in layers]
        axes.set_xticks(range(heads))
        return axes.imshow(rows, cmap=HEAT, vmin=0, vmax=max(counts), aspect="auto")

    title = f"{next(iter(found.values())).task}: slots kept by layer and KV head"
    figure = _grids(list(found), fill, ("KV head", "layer", "slots"))
    return headed(figure, f"{title}, budget {report.start[3]}")


def survival(report: Report) -> Figure | None:
    """Which tokens of a text survived, a strip for each method."""
    found = _maps(report)
    if not found or len({len(one.survival) for one in found.values()}) != 1:
        return None
    figure = Figure(figsize=(9, 0.28 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    rows = [[math.sqrt(max(0.0, value)) for value in one.survival] for one in found.values()]
    image = axes.imshow(rows, cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(found)), list(found))
    axes.grid(False)
    axes.set_xlabel("token")
    shades(figure, image, "root of the share of\nlayers and heads that hold it")
    return headed(figure, f"{next(iter(found.values())).task}: tokens that survive, budget {report.start[3]}")


def seen(report: Report) -> Figure | None:
    """Which cells of what was seen survived, mean over its steps, a grid for each method."""
    found = {name: one for name, one in _maps(report).items() if one.grid and one.vision}
    if not found:
        return None

    def fill(axes: Any, method: str) -> Any:
        one = found[method]
        rows, columns = one.grid or [1, 1]
        held = [one.survival[i] for i in one.vision or ()]
        cells = [held[i :: rows * columns] for i in range(rows * columns)]
        means = [sum(own) / max(1, len(own)) for own in cells]
        values = [means[i * columns : (i + 1) * columns] for i in range(rows)]
        return axes.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto")

    figure = _grids(list(found), fill, ("column", "row", "share of layers and\nheads that hold it"))
    return headed(figure, f"{next(iter(found.values())).task}: where in a step tokens survive, {report.start[3]}")


def _maps(report: Report) -> dict[str, MapRow]:
    """The map of each method, in rank order, on the first text of the mode, length and budget shown first."""
    _, mode, length, budget = report.start
    here = [one for one in report.evaluation.maps if (one.mode, one.length) == (mode, length)]
    own = {one.method: one for one in here if one.task == here[0].task and budget_label(one.budget) == budget}
    return {name: own[name] for name in report.methods if name in own and name != "full"}


def _grids(methods: list[str], fill: Callable[[Any, str], Any], titles: tuple[str, str, str]) -> Figure:
    """A grid for each method, which ``fill`` draws and returns. titles: of what goes across and down, and of the
    shades."""
    figure, grid = panels(len(methods), 6, 1.7, 2.1)
    images = []
    for axes, method in zip(grid, methods, strict=True):
        images.append(fill(axes, method))
        axes.grid(False)
        axes.set_title(folded(method, 20), fontsize=8)
    across, down, shade = titles
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(down, fontsize=9)
    shades(figure, images[0], shade)
    return figure


def _value(cell: CellRow | None, column: str) -> float:
    value = getattr(cell, column) if cell else None
    return math.nan if value is None else float(value)
