"""What every figure has in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from keepkv.report.page import MODES
from keepkv.report.style import FAINT, GREY, INK

LOOK = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": GREY,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#eceae3",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "svg.fonttype": "none",
    "svg.hashsalt": "keepkv",
    "savefig.dpi": 160,
}
HEAT = LinearSegmentedColormap.from_list("keepkv", ["#f4f2ec", "#1f5fc4"])
SPLIT = LinearSegmentedColormap.from_list("keepkv-split", ["#cf4a1f", "#f4f2ec", "#2563d9"])


def line(dash: str) -> Any:
    """A dash of SVG as matplotlib's."""
    return (0, tuple(map(float, dash.split()))) if dash else "-"


def where(mode: str, length: int) -> str:
    """``query-aware, 1,024 tokens``."""
    return f"{MODES[mode].split(':')[0].lower()}, {length:,} tokens"


def legend(figure: Figure, order: Sequence[str]) -> None:
    """Each name once, in the given order, beside the axes."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    figure.legend([found[name] for name in names], names, loc="outside right upper")


def panels(count: int, most: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` axes in rows of ``most`` at most, each of that size in inches, on common scales."""
    columns = min(most, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + 1.2, height * rows + 0.5), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def headed(figure: Figure, title: str) -> Figure:
    """The figure, with a title at its left."""
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    return figure
