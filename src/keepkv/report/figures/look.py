"""What every figure has in common."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from keepkv.report.page import MODES
from keepkv.report.style import FAINT, GREY, INK, Style

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
    "figure.dpi": 160,
    "figure.facecolor": "white",
}
MARKERS = {
    "disc": "o", "square": "s", "up": "^", "diamond": "D", "down": "v", "plus": "P", "star": "*", "cross": "X",
    "pentagon": "p",
}  # fmt: skip
HEAT = LinearSegmentedColormap.from_list("keepkv", ["#f4f2ec", "#1f5fc4"])
SPLIT = LinearSegmentedColormap.from_list("keepkv-split", ["#cf4a1f", "#f4f2ec", "#2563d9"])


def look(style: Style, size: float = 4.5) -> dict[str, Any]:
    """Arguments of a line and its marks, of ``size`` points. Dashes of SVG are in pixels, here in line widths."""
    dash = (0, tuple(float(part) / 2 for part in style.dash.split())) if style.dash else "-"
    marks = {"marker": MARKERS[style.mark], "ms": size * (1.4 if style.mark == "star" else 1)}
    marks |= {"mfc": "white", "mew": 1.1} if style.hollow else {"mec": "white", "mew": 0.6}
    return {"color": style.colour, "lw": 1.6, "ls": dash, **marks}


def ink_on(shade: Sequence[float]) -> str:
    """Black or white: which is read better on a colour, red, green and blue in 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade[:3]]
    return "white" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179 else "black"


def folded(name: str, width: int) -> str:
    """The name of a method in lines of ``width`` characters, broken after a separator and nowhere else."""
    parts = re.sub(r"([:,/=])", r"\1 ", name)
    lines = wrap(parts, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line.replace(" ", "") for line in lines)


def shades(figure: Figure, image: Any, label: str) -> None:
    """The scale of an image, at the right of all axes."""
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.7, aspect=18, pad=0.02)
    bar.set_label(label, color=GREY)
    bar.outline.set_visible(False)


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


def panels(count: int, most: int, width: float, height: float, alike: bool = True) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` axes in rows of ``most`` at most, each of that size in inches. Whoever draws gives all of
    them the same scale of y, and of x where they are ``alike``, which is then written at the edge alone.

    They do not share their axes: with those matplotlib takes a time that grows with the square of their number.
    """
    columns = min(most, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + 1.2, height * rows + 0.5), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[:count]:
        place = axes.get_subplotspec()
        axes.tick_params(labelleft=place.is_first_col(), labelbottom=not alike or place.is_last_row())
    return figure, grid[:count]


def headed(figure: Figure, title: str) -> Figure:
    """The figure, with a title at its left."""
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    return figure
