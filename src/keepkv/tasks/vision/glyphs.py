"""Digits and letters of three by five pixels, so that text can be drawn without a font."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE, HIGH = 3, 5
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# One digit of base 8 for each row, from the top; its bits from left to right.
_ROWS = (
    "75557 26227 71747 71717 55711 74717 74757 71244 75757 75717 25755 65656 34443 65556 74647 74644 34553 55755 "
    "72227 11152 55655 44447 57755 65555 25552 65644 75531 65655 34216 72222 55557 55552 55775 55255 55222 71247"
)


def _pixels(rows: str) -> list[list[int]]:
    return [[int(digit) >> shift & 1 for shift in (2, 1, 0)] for digit in rows]


GLYPHS = dict(zip(ALPHABET, map(_pixels, _ROWS.split()), strict=True))


def draw(frame: Tensor, text: str, top: int, left: int, colour: tuple[int, int, int], scale: int = 1) -> None:
    """Write ``text``, of ``ALPHABET`` and spaces, into ``frame`` (3,H,W) uint8, a pixel of a glyph ``scale`` wide."""
    ink = torch.tensor(colour, dtype=frame.dtype)[:, None, None]
    for i, letter in enumerate(text):
        if letter == " ":
            continue
        glyph = torch.tensor(GLYPHS[letter], dtype=torch.bool).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        x = left + i * (WIDE + 1) * scale
        part = frame[:, top : top + HIGH * scale, x : x + WIDE * scale]
        if part.shape[1:] != glyph.shape:
            raise ValueError(f"{text!r} at row {top}, column {left} does not fit a frame of {tuple(frame.shape[1:])}")
        part.copy_(torch.where(glyph, ink, part))


def read(frame: Tensor, top: int, left: int, count: int, scale: int = 1) -> str:
    """The ``count`` letters that ``draw`` wrote there on a plain background, whatever the colours."""
    said = ""
    for i in range(count):
        x = left + i * (WIDE + 1) * scale
        part = frame[:, top : top + HIGH * scale : scale, x : x + WIDE * scale : scale]
        marked = (part != frame[:, :1, :1]).any(0).int().tolist()
        said += next((name for name, glyph in GLYPHS.items() if glyph == marked), " ")
    return said
