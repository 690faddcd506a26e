"""A line of blocks over a document: how much of each stretch survived in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, sqrt

from rich.text import Text

# Height grows with the square root of the share: at small budgets that is where the differences are.
_BARS = " ▁▂▃▄▅▆▇█"
LEGEND = "height: root of the share of (layer, head) that hold the tokens; ▃ is 14 %, █ all"


def cells(survival: Sequence[float], width: int) -> list[float]:
    """The mean of ``survival`` over ``width`` equal stretches (fewer where there are fewer tokens)."""
    width = min(width, len(survival))
    edges = [i * len(survival) // width for i in range(width + 1)]
    return [sum(survival[a:b]) / (b - a) for a, b in pairwise(edges)]


def cell_of(token: int, tokens: int, width: int) -> int:
    """The stretch that holds ``token``."""
    width = min(width, tokens)
    return next(i for i in range(width) if token < (i + 1) * tokens // width)


def strip(shares: Sequence[float], marks: dict[int, bool]) -> Text:
    """One line; ``marks`` are the cells that hold a fact, and whether it was answered right: green or red."""
    line = Text()
    for i, share in enumerate(shares):
        bar = _BARS[ceil(8 * sqrt(share) - 1e-9)]
        line.append(bar, "cyan" if i not in marks else "bold green" if marks[i] else "bold red")
    return line


def pointers(marked: set[int], width: int) -> Text:
    """The line above the strips that points at the facts."""
    return Text("".join("▼" if i in marked else " " for i in range(width)), "bold")
