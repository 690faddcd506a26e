"""Pixels of a scene: a room of three by three cells, and the things that stand in one of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROWS, CELL = 3, 16  # cells a side, pixels a cell's side
CELLS, SIDE = ROWS * ROWS, ROWS * CELL
NOISE = 5.0  # of the camera, standard deviation in levels of 255

COLOURS = {
    "red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 240), "yellow": (240, 220, 40),
    "pink": (245, 110, 220), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("ball", "ring", "square", "frame", "diamond", "cross", "star", "arrow")
# Three columns and five rows of each digit.
_DIGITS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
)  # fmt: skip


@cache
def mask(shape: str) -> Tensor:
    """Where ``shape`` is, bool (CELL,CELL)."""
    line = (torch.arange(CELL) - (CELL - 1) / 2) / 6.5
    v, u = torch.meshgrid(line, line, indexing="ij")
    square, round_, across = torch.maximum(u.abs(), v.abs()), (u * u + v * v).sqrt(), (u.abs() - v.abs()).abs()
    return {
        "ball": round_ < 0.9,
        "ring": (round_ < 1.0) & (round_ > 0.6),
        "square": square < 0.85,
        "frame": (square < 1.0) & (square > 0.6),
        "diamond": u.abs() + v.abs() < 1.0,
        "cross": (torch.minimum(u.abs(), v.abs()) < 0.3) & (square < 1.0),
        "star": ((across < 0.35) | (round_ < 0.4)) & (square < 1.0),
        "arrow": (v > -1.0) & (v < 1.0) & (u.abs() < (v + 1.0) / 2),
        "all": square < 2.0,
        "lamp": (square < 1.0) & ((v < 0.1) | (u.abs() < 0.3)),
    }[shape]


@cache
def digit(number: int) -> Tensor:
    """Where the strokes of ``number`` are, bool (CELL,CELL)."""
    bits = torch.tensor([int(x) for x in _DIGITS[number]], dtype=torch.bool).view(5, 3)
    out = torch.zeros(CELL, CELL, dtype=torch.bool)
    out[3:13, 5:11] = bits.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return out


def room(generator: torch.Generator) -> Tensor:
    """A still, dim background, float (3,SIDE,SIDE)."""
    coarse = 30 + 60 * torch.rand(1, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)[0]


def paint(frames: Tensor, cell: int, where: Tensor, colour: tuple[int, int, int]) -> None:
    """Colour the pixels ``where`` (CELL,CELL) of a cell of ``frames`` (…,3,SIDE,SIDE) in place."""
    top, left = cell // ROWS * CELL, cell % ROWS * CELL
    part = frames[..., top : top + CELL, left : left + CELL]
    part[..., where] = torch.tensor(colour, dtype=frames.dtype)[:, None]
