"""The scores as a table of Markdown, for a README or a discussion."""

from __future__ import annotations

from keepkv.evaluation.rows import CellRow
from keepkv.report.numbers import Report
from keepkv.report.page import MODES

MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_|[]#~$@"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def markdown(report: Report) -> str:
    """One table for each mode and length: methods by rank, budgets across."""
    run = report.evaluation.run
    made = run.environment
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    seeds = ", ".join(map(str, run.seeds))
    lines = [
        f"# Scores of {plain_text(run.model)}",
        "",
        f"{run.items} items per task, length and seed; seeds {seeds}; {plain_text(made.device)}, "
        f"{plain_text(made.dtype)}; {plain_text(versions)}; revision {plain_text(made.revision or 'unknown')}.",
        "",
        "Score with its 95 % interval over items, and in brackets the ratio: bytes held by bytes of the full cache. A "
        "failed item counts as 0 in scores over all tasks. The texts are our own: never compare with published RULER "
        "numbers.",
    ]
    for note in report.notes:
        lines += ["", f"> {plain_text(note)}"]
    for mode, length in report.panels():
        lines += [
            "",
            f"## {MODES[mode].split(':')[0]}, {length:,} tokens, {plain_text(report.main(mode, length))}",
            "",
            MODES[mode],
            "",
        ]
        lines += _table(report, mode, length)
    return "\n".join(lines) + "\n"


def _table(report: Report, mode: str, length: int) -> list[str]:
    budgets, table = report.table(report.main(mode, length), mode, length)
    rows = [f"| method | {' | '.join(map(plain_text, budgets))} |", "|---" + "|---:" * len(budgets) + "|"]
    for method, cells in table.items():
        rows.append(f"| {plain_text(method)} | {' | '.join(map(_cell, cells))} |")
    return rows


def _cell(cell: CellRow | None) -> str:
    if cell is None or cell.score is None:
        return "–"
    spread = "" if cell.low is None or cell.high is None else f" {cell.low:.2f}–{cell.high:.2f}"
    ratio = "" if cell.ratio is None else f" ({cell.ratio:.3f})"
    failed = f", {cell.failed} failed" if cell.failed else ""
    return f"{cell.score:.3f}{spread}{ratio}{failed}"


def plain_text(text: str) -> str:
    """Nothing of ``text`` is read as Markdown or HTML."""
    text = " ".join(text.split()).translate(MARKS)
    return text.replace("://", ":\\//").replace("www.", "www\\.")  # which would become links by themselves
