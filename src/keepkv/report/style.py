"""How a method is drawn, the same in every figure and on the page.

At most ten methods are drawn at once: three baselines in ink and grey, and seven that were chosen, each in a colour of
its own. The colours stay apart under protanopia, deuteranopia and tritanopia, and no two methods differ by colour
alone: each has a mark and a dash too. A method that is drawn without having been chosen is grey, with a hollow mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepkv.evaluation.setup import BASELINES

INK, GREY, FAINT, PAPER = "#1d2129", "#6f7784", "#a3aab5", "#fbfaf7"
# Blue, vermilion, green, plum, sky, olive, lavender; on white, and for the page in the dark.
LIGHT = ("#0353bb", "#ee4a0c", "#0f9647", "#882e70", "#1a93f8", "#595300", "#a384bc")
DARK = ("#107cee", "#f07955", "#a6d39b", "#d13d5f", "#2fafff", "#fcb200", "#8c6da5")
NEUTRAL = {
    "light": {"ink": INK, "grey": GREY, "bg": PAPER},
    "dark": {"ink": "#eceae4", "grey": "#9aa2ae", "bg": "#14161a"},
}
MARKS = ("disc", "square", "up", "diamond", "down", "plus", "star")
DASHES = ("", "9 3", "4 2.5", "", "9 3", "4 2.5", "9 2.5 2 2.5")  # of SVG; empty for a line without gaps
MOST = len(LIGHT)


@dataclass(frozen=True)
class Style:
    """name: of the colour in the page's palette. colour: hex, on white. mark: of ``MARKS``, cross or pentagon."""

    name: str
    colour: str
    mark: str
    dash: str
    hollow: bool = False


SERIES = tuple(Style(f"s{i}", *look) for i, look in enumerate(zip(LIGHT, MARKS, DASHES, strict=True)))
OTHERS = tuple(replace(one, name="grey", colour=GREY, hollow=True) for one in (*SERIES[1:], SERIES[0]))
OF_BASELINES = {
    "full": Style("ink", INK, "pentagon", "5 4"),
    "random": Style("grey", GREY, "disc", "1.5 3", hollow=True),
    "snapkv": Style("grey", GREY, "cross", ""),
}
assert tuple(OF_BASELINES) == BASELINES


def styles(chosen: Sequence[str], others: Sequence[str] = ()) -> dict[str, Style]:
    """The style of each method: baselines have their own, ``chosen`` a colour each, in order, ``others`` are grey."""
    own = [name for name in dict.fromkeys(chosen) if name not in BASELINES]
    rest = [name for name in dict.fromkeys(others) if name not in BASELINES and name not in own]
    rest += own[MOST:]
    greys = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}
    return dict(OF_BASELINES) | dict(zip(own, SERIES, strict=False)) | greys


def palette() -> str:
    """The colours as variables of CSS; paper stays light."""
    rules = []
    for scheme, colours in (("light", LIGHT), ("dark", DARK)):
        given = {f"s{i}": colour for i, colour in enumerate(colours)} | NEUTRAL[scheme]
        rules.append(":root{" + ";".join(f"--{name}:{colour}" for name, colour in given.items()) + "}")
    return f"{rules[0]}@media screen and (prefers-color-scheme:dark){{{rules[1]}}}"
