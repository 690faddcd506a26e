"""Page, figures and Markdown table, written to a directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from keepkv.report.markdown import markdown
from keepkv.report.numbers import Report
from keepkv.report.page import page
from keepkv.report.read import ReportError


@dataclass(frozen=True)
class Written:
    """Where everything lies. figures: empty without matplotlib, which the extra ``plots`` brings."""

    page: Path
    table: Path
    figures: list[Path]


def steps() -> int:
    """How often ``write`` calls its ``step``."""
    if not find_spec("matplotlib"):
        return 1
    from keepkv.report.figures import PANELS, WHOLE

    return len(PANELS) + len(WHOLE) + 1


def write(report: Report, into: str | Path, step: Callable[[str], None] = lambda what: None) -> Written:
    """``into/report.html``, ``into/report.md`` and ``into/figures/*.png``. ``step`` is told what comes next.

    Raises ``ReportError`` where ``into`` cannot be written to.
    """
    folder = Path(into).expanduser()
    made = Written(folder / "report.html", folder / "report.md", [])
    inlined: list[str] = []
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        if find_spec("matplotlib"):
            from keepkv.report.figures import all_figures, png, svg

            for name, figure in all_figures(report, step):
                made.figures.append(folder / "figures" / f"{name}.png")
                made.figures[-1].write_bytes(png(figure))
                if name.startswith("score-"):  # for readers without scripts
                    inlined.append(svg(figure))
        step("page")
        made.table.write_text(markdown(report), encoding="utf-8")
        made.page.write_text(page(report, inlined), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    return made
