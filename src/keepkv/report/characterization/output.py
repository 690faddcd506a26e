"""Sections as a page and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from keepkv.measure.ledger import replace_text
from keepkv.report.markdown import plain_text
from keepkv.report.style import palette

MORE = ".top,main,footer{max-width:1200px}figure{background:#fff;padding:8px;border-radius:10px;max-width:900px}"


@dataclass(frozen=True)
class Section:
    """A heading, what it says, and a table; the first ``left`` columns are text. figures: SVG elements."""

    title: str
    words: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    left: int = 1
    figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pages:
    """A document. lead: what it is, in a sentence. facts: names and values. notes: what to know before believing it."""

    title: str
    lead: str
    facts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()


def write_pages(pages: Pages, folder: Path, name: str = "report") -> tuple[Path, Path]:
    """``name.html`` and ``name.md`` in ``folder``."""
    page, text = folder / f"{name}.html", folder / f"{name}.md"
    replace_text(page, html(pages))
    replace_text(text, markdown(pages))
    return page, text


def html(pages: Pages) -> str:
    """One page with everything in it."""
    style = palette() + (files("keepkv.report") / "template" / "page.css").read_text(encoding="utf-8") + MORE
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(x)}</dd></div>" for name, x in pages.facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in pages.notes)
    notes = f'<aside class="notes" aria-label="Notes"><ul>{notes}</ul></aside>' if notes else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(pages.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header class="top"><p class="mark-line">{"<i></i>" * 8} keepkv</p><h1>{escape(pages.title)}</h1>'
        f'<p class="lead">{escape(pages.lead)}</p><dl class="facts">{facts}</dl>{notes}</header>\n<main>\n'
        + "\n".join(map(_section, pages.sections))
        + "\n</main>\n<footer><p>Made by keepkv. This page fetches nothing.</p></footer>\n</body>\n</html>\n"
    )


def markdown(pages: Pages) -> str:
    """The same without figures."""
    facts = "; ".join(f"{name}: {value}" for name, value in pages.facts.items())
    lines = [f"# {plain_text(pages.title)}", "", plain_text(pages.lead)]
    lines += ["", plain_text(facts)] if facts else []
    for note in pages.notes:
        lines += ["", f"> {plain_text(note)}"]
    for one in (one for one in pages.sections if one.rows or not one.figures):
        lines += ["", f"## {plain_text(one.title)}"]
        lines += ["", plain_text(one.words)] if one.words else []
        if one.rows:
            marks = "|---" * one.left + "|---:" * (len(one.columns) - one.left) + "|"
            lines += ["", f"| {' | '.join(map(plain_text, one.columns))} |", marks]
            lines += [f"| {' | '.join(map(plain_text, row))} |" for row in one.rows]
    return "\n".join(lines) + "\n"


def _section(one: Section) -> str:
    parts = [f"<section><h2>{escape(one.title)}</h2>"]
    if one.words:
        parts.append(f'<p class="sub">{escape(one.words)}</p>')
    parts += [f"<figure>{figure}</figure>" for figure in one.figures]
    if one.rows:
        head = "".join(f"<th scope=col>{escape(name)}</th>" for name in one.columns)
        body = "".join(f"<tr>{''.join(_cell(i, one.left, x) for i, x in enumerate(row))}</tr>" for row in one.rows)
        parts.append(
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(one.title)}"><table><thead><tr>{head}'
            f"</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return "".join(parts) + "</section>"


def _cell(i: int, left: int, text: str) -> str:
    if i == 0:
        return f"<th scope=row>{escape(text)}</th>"
    return f'<td class="{"word" if i < left else "number"}">{escape(text)}</td>'
