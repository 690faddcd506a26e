"""Draws the figures of README and the site from rows of studies: ``python docs/site/figures.py``."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks/keepkv2/results/real.jsonl.gz"
SHOWN = {  # colour, mark and dash: no two lines differ by colour alone
    "keepkv2": ("#1f86c7", "circle", ""),
    "kvzip": ("#d55e00", "square", "9 3"),
    "expected-attention": ("#189a72", "triangle", "4 2.5"),
    "snapkv": ("#b8629b", "diamond", "9 2.5 2 2.5"),
    "random": ("#85888c", "circle", "1.5 3"),
}
BUDGETS = (0.2, 0.3, 0.5)

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 58, 168, 24, 52
# On the site the figure takes the theme's colours; as a picture, those of the reader's system.
STYLE = """
.figure-answers text { font: 14px system-ui, sans-serif; fill: var(--md-default-fg-color, #1f2328) }
.figure-answers .soft { fill: var(--md-default-fg-color--light, #57606a) }
.figure-answers line { stroke: var(--md-default-fg-color--lighter, #d0d7de); stroke-opacity: 0.6 }
@media (prefers-color-scheme: dark) {
  .figure-answers text { fill: var(--md-default-fg-color, #e6edf3) }
  .figure-answers .soft { fill: var(--md-default-fg-color--light, #9ea7b3) }
  .figure-answers line { stroke: var(--md-default-fg-color--lighter, #3d444d) }
}"""


def rows() -> list[dict[str, Any]]:
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def curves(found: Iterable[dict[str, Any]]) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """For each method that is shown (share of the bytes, mean score) by budget, and the score of the full cache."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        cells[row["method"], row["budget"]].append(row)
    lines = {
        method: [
            (mean(row["ratio"] for row in cells[method, budget]), mean(row["score"] for row in cells[method, budget]))
            for budget in BUDGETS
        ]
        for method in SHOWN
    }
    return lines, mean(row["score"] for row in cells["full", 1.0])


def across(share: float) -> float:
    return LEFT + share / 0.55 * (WIDTH - LEFT - RIGHT)


def down(score: float) -> float:
    return TOP + (1 - score) * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, said: str, anchor: str = "start", kind: str = "soft") -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{said}</text>'


def level(score: float, style: str = "") -> str:
    return f'<line x1="{LEFT}" y1="{down(score):.1f}" x2="{WIDTH - RIGHT}" y2="{down(score):.1f}" style="{style}"/>'


def mark(shape: str, x: float, y: float, colour: str) -> str:
    outlines = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "triangle": ((0, -6), (6, 5), (-6, 5)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    }
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in outlines[shape])
    return f'<polygon points="{points}" fill="{colour}"/>'


def apart(places: dict[str, float], least: float = 18) -> dict[str, float]:
    """Heights of labels, moved down where they would overlap."""
    found: dict[str, float] = {}
    lowest = -least
    for name in sorted(places, key=places.__getitem__):
        lowest = found[name] = max(places[name], lowest + least)
    return found


def answers() -> str:
    """Answers by the share of the bytes, one line a method."""
    lines, full = curves(rows())
    drawn = [
        *(text(across(share), HEIGHT - 30, f"{share:.0%}", "middle") for share in (0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        *(text(LEFT - 8, down(score) + 5, f"{score:.0%}", "end") for score in (0, 0.25, 0.5, 0.75, 1)),
        *(level(score) for score in (0, 0.25, 0.5, 0.75, 1)),
        level(full, "stroke-width: 2; stroke-dasharray: 6 4"),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "of the full cache’s bytes are kept", "middle"),
        text(LEFT + 6, TOP - 8, "of the questions are answered right"),
    ]
    ends = {method: down(points[-1][1]) for method, points in lines.items()} | {"the full cache": down(full)}
    beside = apart(ends)
    drawn += [text(WIDTH - RIGHT + 28, y + 5, name, kind="name") for name, y in beside.items()]
    for method, points in lines.items():
        colour, shape, dash = SHOWN[method]
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        look = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
        drawn.append(f'<polyline points="{path}" fill="none" {look}/>')
        drawn += [mark(shape, across(x), down(y), colour) for x, y in points]
        drawn.append(mark(shape, WIDTH - RIGHT + 16, beside[method], colour))
    said = "; ".join(f"{method} {', '.join(f'{y:.0%}' for _, y in points)}" for method, points in lines.items())
    label = f"Questions answered right at {', '.join(f'{b:.0%}' for b in BUDGETS)} of the bytes: {said}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="figure-answers" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'{start} role="img" aria-label="{label}">\n<style>{STYLE}</style>\n' + "\n".join(drawn) + "\n</svg>\n"


if __name__ == "__main__":
    (ROOT / "docs/assets/answers.svg").write_text(answers(), encoding="utf-8")
