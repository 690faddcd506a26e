"""Tasks whose contexts are drawn: documents, scenes, counts, copies, several images, video, and text before an image.

Made from seeds and of our own, shaped like the benchmarks that EffiVLM-Bench (arXiv 2506.00479) takes: never to be
compared with published numbers. A picture is ``SIDE`` pixels square, one mark in the context; how many tokens that is,
the model says.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from keepkv.tasks.base import Count, Item, Question, Task, TaskError
from keepkv.tasks.vision.glyphs import ALPHABET, HIGH, WIDE, draw
from keepkv.vision.mark import MARK

SIDE, SCALE = 96, 2
INK, PAPER = (20, 20, 20), (235, 235, 235)
COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50),
    "purple": (150, 60, 180), "orange": (245, 140, 30),
}  # fmt: skip
CELLS = 4  # of a scene, each way
LINES, TALL = 7, (HIGH + 1) * SCALE + 1  # of a page, and pixels of one
MOST = 16  # pictures of a context
PLACES = tuple(f"row {i // CELLS + 1} column {i % CELLS + 1}" for i in range(CELLS * CELLS))


def blank(colour: tuple[int, int, int] = PAPER) -> Tensor:
    """A picture (3,SIDE,SIDE) uint8 of one colour."""
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE).clone()


def page(lines: list[str]) -> Tensor:
    """A picture with ``lines`` of at most 11 letters on it."""
    frame = blank()
    for i, line in enumerate(lines):
        draw(frame, line, 2 + i * TALL, 4, INK, SCALE)
    return frame


def scene(things: dict[int, str]) -> Tensor:
    """A picture with a square of a colour in each of some cells."""
    frame, size = blank(), SIDE // CELLS
    for cell, colour in things.items():
        y, x = cell // CELLS * size + 3, cell % CELLS * size + 3
        frame[:, y : y + size - 6, x : x + size - 6] = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
    return frame


def code(rng: random.Random, size: int = 4) -> str:
    """A word that nobody guesses."""
    return "".join(rng.choice(ALPHABET) for _ in range(size))


def _stack(*frames: Tensor) -> Tensor:
    return torch.stack(frames)


def _checked(count: Count, context: str, length: int) -> str:
    if (tokens := count(context)) > length:
        raise TaskError(f"its picture and words are {tokens} tokens, and {length} were asked for: give longer contexts")
    return context


def _many(count: Count, length: int, parts: list[str], least: int = 2) -> int:
    """How many of ``parts``, one after the other, a context of ``length`` tokens holds."""
    held = next((n for n in range(len(parts), 0, -1) if count("".join(parts[:n])) <= length), 0)
    if held < least:
        tokens = count("".join(parts[:least]))
        raise TaskError(f"{least} pictures are {tokens} tokens, and {length} were asked for: give longer contexts")
    return held


def document(rng: random.Random, count: Count, length: int) -> Item:
    """A page of codes, every one of them asked for."""
    names = rng.sample(ALPHABET[10:], LINES)
    lines = {name: code(rng) for name in names}
    asked = tuple(Question(f"\nWhat is the code of {name}?", f" {value}") for name, value in lines.items())
    picture = page([f"{name} {value}" for name, value in lines.items()])
    context = _checked(count, f"A page with names and codes.\n{MARK}\n", length)
    return Item(context, asked, pictures=(_stack(picture),))


def sparse(rng: random.Random, count: Count, length: int) -> Item:
    """Three squares on an empty page."""
    colours, cells = rng.sample([*COLOURS], 3), rng.sample(range(CELLS * CELLS), 3)
    asked = []
    for colour, cell in zip(colours, cells, strict=True):
        asked.append(Question(f"\nWhere is the {colour} square?", f" {PLACES[cell]}", values=(PLACES[cell],)))
        asked.append(Question(f"\nWhich colour is the square in {PLACES[cell]}?", f" {colour}", values=(colour,)))
    context = _checked(count, f"A page of four by four cells.\n{MARK}\n", length)
    picture = scene(dict(zip(cells, colours, strict=True)))
    return Item(context, tuple(asked), pictures=(_stack(picture),))


def counting(rng: random.Random, count: Count, length: int) -> Item:
    """Squares of two colours, how many of each."""
    one, two = rng.sample([*COLOURS], 2)
    things = {cell: rng.choice((one, two)) for cell in rng.sample(range(CELLS * CELLS), rng.randint(3, 9))}
    asked = []
    for colour in (one, two):
        number = sum(x == colour for x in things.values())
        asked.append(Question(f"\nHow many {colour} squares are there?", f" {number}"))
    context = _checked(count, f"A page of four by four cells.\n{MARK}\n", length)
    return Item(context, tuple(asked), pictures=(_stack(scene(things)),))


def copying(rng: random.Random, count: Count, length: int) -> Item:
    """A page to be written down as a whole: a long reply."""
    lines = [code(rng, 6) for _ in range(LINES)]
    asked = Question("\nWrite down every line of the page, in order.", " " + " ".join(lines), graded=True)
    context = _checked(count, f"A page of codes.\n{MARK}\n", length)
    return Item(context, (asked,), pictures=(_stack(page(lines)),))


def images(rng: random.Random, count: Count, length: int) -> Item:
    """As many pages as fit, a code on each, two of which are asked for."""
    parts = [f"Page {i + 1}.\n{MARK}\n" for i in range(MOST)]
    held = _many(count, length, parts)
    codes = [code(rng) for _ in range(held)]
    asked = tuple(Question(f"\nWhat is the code on page {i + 1}?", f" {codes[i]}") for i in rng.sample(range(held), 2))
    return Item("".join(parts[:held]), asked, pictures=tuple(_stack(page([x])) for x in codes))


def video(rng: random.Random, count: Count, length: int) -> Item:
    """As many steps as fit of a page on which coloured squares appear, one after the other."""
    head, parts = "A video.\n", [MARK] * (4 * MOST)
    parts[0] = head + MARK
    held = _many(count, length - count("\n"), parts, least=4)
    when = sorted(rng.sample(range(held), 3))
    events = dict(zip(when, rng.sample([*COLOURS], 3), strict=True))
    cells = dict(zip(when, rng.sample(range(CELLS * CELLS), 3), strict=True))
    frames = [scene({cells[i]: events[i]} if i in events else {}) for i in range(held)]
    words = ("first", "second", "third")
    asked = tuple(
        Question(f"\nWhich colour was the {word} square?", f" {events[i]}", values=(events[i],))
        for word, i in zip(words, when, strict=True)
    )
    return Item(head + MARK * held + "\n", asked, pictures=(_stack(*frames),))


def text_before(rng: random.Random, count: Count, length: int) -> Item:
    """Codes in words, then a picture that nobody asks about: does what is spent on it hurt text?"""
    lines = {name: code(rng) for name in rng.sample(ALPHABET[10:], LINES)}
    said = "".join(f"The code of {name} is {value}.\n" for name, value in lines.items())
    asked = tuple(Question(f"\nWhat is the code of {name}?", f" {lines[name]}") for name in rng.sample([*lines], 3))
    context = _checked(count, f"{said}{MARK}\n", length)
    return Item(context, asked, pictures=(_stack(page([code(rng, 8) for _ in range(LINES)])),))


_HINT = "Answer with the code only."
TASKS = (
    Task("vision-document", "codes on a drawn page, all asked for", document, _HINT, sees=True),
    Task("vision-scene", "three squares on an empty page", sparse, "Answer in a few words.", sees=True),
    Task("vision-count", "how many squares of a colour", counting, sees=True),
    Task("vision-copy", "a drawn page to be written down", copying, "Answer with the lines only.", sees=True),
    Task("vision-images", "codes on several pages", images, _HINT, sees=True),
    Task("vision-video", "the order in which squares appear", video, "Answer with the colour only.", sees=True),
    Task("vision-text-before", "codes in words before a picture", text_before, _HINT, sees=True),
)
WIDEST = (SIDE - 4) // ((WIDE + 1) * SCALE)  # letters of a line
