"""Figures as matplotlib draws them, of the same numbers as the page; needs the extra ``plots``.

Each function below takes the report, and some a mode and a length, and returns a figure, or None where there is nothing
to draw. ``all_figures`` names them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from keepkv.report.figures.curves import fidelity, leakage
from keepkv.report.figures.grids import heat, kept, needle, seen, survival
from keepkv.report.figures.look import LOOK
from keepkv.report.figures.scores import pareto, score, tasks
from keepkv.report.numbers import Report

PANELS: tuple[Callable[[Report, str, int], Figure | None], ...] = (score, tasks, pareto, heat)
WHOLE: tuple[Callable[[Report], Figure | None], ...] = (needle, kept, survival, seen, leakage, fidelity)


def all_figures(report: Report, step: Callable[[str], None] = lambda what: None) -> Iterator[tuple[str, Figure]]:
    """Name and figure, one after the other. ``step`` is told of each of ``PANELS`` and ``WHOLE`` before it is drawn."""
    with matplotlib.rc_context(LOOK):
        for build in PANELS:
            step(f"figures {build.__name__}")
            for mode, length in report.panels():
                if figure := build(report, mode, length):
                    yield f"{build.__name__}-{mode}-{length}", figure
        for whole in WHOLE:
            step(f"figure {whole.__name__}")
            if figure := whole(report):
                yield whole.__name__, figure


def png(figure: Figure) -> bytes:
    """The picture: the same bytes for the same numbers."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # savefig would draw everything twice
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """An element to put into a page: text stays text, and nothing refers to anything outside of it."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
