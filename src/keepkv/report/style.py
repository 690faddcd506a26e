"""How a method is drawn, the same in every figure and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keepkv.evaluation.setup import BASELINES

# Apart from each other for the colour-blind as far as ten can be; the page has a lighter set for the dark.
PALETTE = ("#2563d9", "#dd5f1b", "#12876a", "#b0389a", "#b98900", "#0c93b8", "#7b4fd0", "#cc3344", "#648a00", "#8a5638")
INK, GREY, FAINT = "#1d2129", "#6f7784", "#a3aab5"
DASHES = ("", "6 3", "2 2", "8 3 2 3")  # of SVG; a colour comes again with the next dash


@dataclass(frozen=True)
class Style:
    """colour: hex; hue: index into the page's palette, or the name of a baseline; dash: of SVG, empty for a line."""

    colour: str
    hue: int | str
    dash: str


OF_BASELINES = {
    name: Style(colour, name, dash)
    for name, colour, dash in zip(BASELINES, (INK, FAINT, GREY), ("5 4", "1.5 3", ""), strict=True)
}


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """The style of each method, in order: the first ten, and so those that are seen first, have a colour each."""
    made = dict(OF_BASELINES)
    for i, name in enumerate(dict.fromkeys(name for name in methods if name not in BASELINES)):
        turn, hue = divmod(i, len(PALETTE))
        made[name] = Style(PALETTE[hue], hue, DASHES[turn % len(DASHES)])
    return made
