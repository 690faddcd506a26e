"""Draws the figures of README and the site from rows of studies: ``python docs/site/figures.py``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks/defaults/results/rows.jsonl"
SHARED = 7  # contexts
MODELS = ("SmolLM2-135M-Instruct", "Gemma-3-270M")
SHOWN = {  # colour, mark and dash: no two lines differ by colour alone
    "kvzip": ("#d55e00", "square", "9 3"),
    "keepkv2:allocate=adakv": ("#1f86c7", "circle", ""),
    "keepkv2": ("#189a72", "triangle", "4 2.5"),
    "snapkv": ("#b8629b", "diamond", "9 2.5 2 2.5"),
    "random": ("#85888c", "circle", "1.5 3"),
}
NAMES = {"kvzip": "many-questions (kvzip)", "keepkv2:allocate=adakv": "auto"}

WIDTH, HEIGHT = 860, 360
PANEL, GAP, LEFT, TOP, BOTTOM = 280, 40, 52, 62, 54
MOST = 0.45  # of the bytes, at the right edge
# On the site the figure takes the theme's colours; as a picture, those of the reader's system.
STYLE = """
.figure-NAME text { font: 14px system-ui, sans-serif; fill: var(--md-default-fg-color, #1f2328) }
.figure-NAME .soft { fill: var(--md-default-fg-color--light, #57606a) }
.figure-NAME line { stroke: var(--md-default-fg-color--lighter, #d0d7de); stroke-opacity: 0.6 }
@media (prefers-color-scheme: dark) {
  .figure-NAME text { fill: var(--md-default-fg-color, #e6edf3) }
  .figure-NAME .soft { fill: var(--md-default-fg-color--light, #9ea7b3) }
  .figure-NAME line { stroke: var(--md-default-fg-color--lighter, #3d444d) }
}"""


def rows() -> list[dict[str, Any]]:
    """Of the contexts of which every method was measured, compressed before any question was seen."""
    found = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    return [row for row in found if not row.get("aware") and row["context"] < SHARED]


def curves(model: str) -> dict[str, list[tuple[float, float]]]:
    """For each method that is shown (budget, share of the full cache's right replies that are kept)."""
    kept: dict[str, dict[float, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows():
        if row["model"] == model:
            kept[row["method"]][row["budget"]] += [
                same for same, known in zip(row["same"], row["known"], strict=True) if known
            ]
    return {method: [(budget, mean(same)) for budget, same in sorted(kept[method].items())] for method in SHOWN}


def across(panel: int, share: float) -> float:
    return LEFT + panel * (PANEL + GAP) + share / MOST * PANEL


def down(score: float) -> float:
    return TOP + (1 - score) * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, said: str, anchor: str = "start", kind: str = "soft") -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{said}</text>'


def level(panel: int, score: float) -> str:
    y = f"{down(score):.1f}"
    return f'<line x1="{across(panel, 0):.0f}" y1="{y}" x2="{across(panel, MOST):.0f}" y2="{y}"/>'


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


def drawn(panel: int, model: str) -> list[str]:
    """One model: a line a method."""
    parts = [text(across(panel, 0), TOP - 14, model, kind="name")]
    parts += [text(across(panel, x), HEIGHT - 30, f"{x:.0%}", "middle") for x in (0, 0.1, 0.2, 0.3, 0.4)]
    parts += [level(panel, score) for score in (0, 0.25, 0.5, 0.75, 1)]
    for method, points in curves(model).items():
        colour, shape, dash = SHOWN[method]
        path = " ".join(f"{across(panel, x):.1f},{down(y):.1f}" for x, y in points)
        look = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" fill="none" {look}/>')
        parts += [mark(shape, across(panel, x), down(y), colour) for x, y in points]
    return parts


def answers() -> str:
    """What is kept of the full cache's replies, by the share of the bytes."""
    parts = [text(LEFT - 8, down(score) + 5, f"{score:.0%}", "end") for score in (0, 0.25, 0.5, 0.75, 1)]
    parts.append(text(LEFT, 18, "Replies that stay as with the full cache, of those that were right"))
    for panel, model in enumerate(MODELS):
        parts += drawn(panel, model)
    legend = across(len(MODELS) - 1, MOST) + 24
    last = curves(MODELS[-1])
    for place, (method, (colour, shape, _)) in enumerate(SHOWN.items()):
        parts.append(mark(shape, legend, TOP + 12 + 24 * place, colour))
        parts.append(text(legend + 14, TOP + 17 + 24 * place, NAMES.get(method, method), kind="name"))
    parts.append(text(LEFT, HEIGHT - 8, "of the full cache’s bytes are kept"))
    said = "; ".join(
        f"{model}: " + ", ".join(f"{method} {points[-1][1]:.0%}" for method, points in curves(model).items())
        for model in MODELS
    )
    label = f"Right replies of the full cache that are kept at {last['random'][-1][0]:.0%} of the bytes. {said}"
    return picture("answers", label, parts)


def picture(name: str, label: str, parts: list[str]) -> str:
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="figure-{name}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = STYLE.replace("NAME", name)
    return f'{start} role="img" aria-label="{label}">\n<style>{style}</style>\n' + "\n".join(parts) + "\n</svg>\n"


# --- bytes against error ---------------------------------------------------------------------------------------------

BYTES = ROOT / "benchmarks/frontier/results/rows.jsonl"
ALONE, EVERY = "eviction alone", "codes alone"
ARMS = {  # of the study, by what a line is called
    "keepkv2": ALONE,
    "keepkv2:codec=int8": "both, 8 bits",
    "keepkv2:codec=hadamard": "both, 4 bits",
    **{f"full:codec={codec}": EVERY for codec in ("hadamard", "lloyd-max,codec.bits=2")},
}
LOOKS = {
    ALONE: ("#d55e00", "square", "9 3"),
    "both, 8 bits": ("#189a72", "triangle", "4 2.5"),
    "both, 4 bits": ("#1f86c7", "circle", ""),
    EVERY: ("#b8629b", "diamond", "1.5 3"),
}
WORST = 0.6  # error at the upper edge
SIDE = 0.4  # of the bytes, at the right edge


def errors(model: str) -> dict[str, list[tuple[float, float]]]:
    """For each line (share of the bytes, error of attention outputs), means over contexts."""
    found: dict[str, dict[tuple[str, float | None], list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in map(json.loads, BYTES.read_text("utf-8").splitlines()):
        if row["model"] == model and row["arm"] in ARMS and (row["budget"] or 0) < SIDE:
            found[ARMS[row["arm"]]][row["arm"], row["budget"]].append((row["ratio"], row["output_error"]))
    return {
        line: sorted((mean(x for x, _ in held), mean(y for _, y in held)) for held in points.values())
        for line, points in found.items()
    }


def frontier() -> str:
    """The error of attention outputs, by the share of the bytes."""

    def at(panel: int, x: float, y: float) -> tuple[float, float]:
        return across(panel, x / SIDE * MOST), down(min(1.0, y / WORST))

    parts = [text(LEFT - 8, down(y / WORST) + 5, f"{y:g}", "end") for y in (0, 0.2, 0.4, 0.6)]
    parts.append(text(LEFT, 18, "Error of attention outputs on later questions, ‖o′−o‖ / ‖o‖: lower is better"))
    for panel, model in enumerate(("embedded", MODELS[0])):
        parts.append(text(across(panel, 0), TOP - 14, model, kind="name"))
        parts += [text(at(panel, x, 0)[0], HEIGHT - 30, f"{x:.0%}", "middle") for x in (0, 0.1, 0.2, 0.3, 0.4)]
        parts += [level(panel, y / WORST) for y in (0, 0.2, 0.4, 0.6)]
        for line, points in errors(model).items():
            colour, shape, dash = LOOKS[line]
            places = [at(panel, x, y) for x, y in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            look = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{path}" fill="none" {look}/>')
            parts += [mark(shape, x, y, colour) for x, y in places]
    for place, (line, (colour, shape, _)) in enumerate(LOOKS.items()):
        parts.append(mark(shape, across(1, MOST) + 24, TOP + 12 + 24 * place, colour))
        parts.append(text(across(1, MOST) + 38, TOP + 17 + 24 * place, line, kind="name"))
    parts.append(text(LEFT, HEIGHT - 8, "of the full cache’s bytes are held"))
    said = "; ".join(
        f"{model}: "
        + ", ".join(f"{line} {points[0][1]:.2f} at {points[0][0]:.0%}" for line, points in errors(model).items())
        for model in ("embedded", MODELS[0])
    )
    return picture("frontier", f"Error of attention outputs by the share of the bytes. {said}", parts)


FIGURES = {"answers": answers, "frontier": frontier}

if __name__ == "__main__":
    for name, drawing in FIGURES.items():
        (ROOT / f"docs/assets/{name}.svg").write_text(drawing(), encoding="utf-8")
