"""What happens in a scene, and its frames."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from keepkv.tasks.scenes.draw import CELLS, COLOURS, NOISE, ROWS, SHAPES, digit, mask, paint, room

CARD = "card"
WAYS = {"left": -1, "right": 1, "up": -ROWS, "down": ROWS}
LONGEST = 4  # frames of an event
THINGS = [(shape, colour) for shape in SHAPES for colour in COLOURS] + [(CARD, colour) for colour in COLOURS]


@dataclass(frozen=True)
class Event:
    """A thing that is seen for some frames. start: the first. path: its cell in each. digit: on a card. way: where to
    it moves, if it does."""

    start: int
    path: tuple[int, ...]
    shape: str
    colour: str
    digit: int | None = None
    way: str = ""

    @property
    def end(self) -> int:
        """The first frame without it."""
        return self.start + len(self.path)


@dataclass(frozen=True)
class Scene:
    """A video of ``length`` frames, made anew whenever it is looked at. events: in order, one at a time. corner: cell
    of the lamp. lamp: from which frame on it has which colour, in order."""

    seed: int
    length: int
    events: tuple[Event, ...]
    corner: int
    lamp: tuple[tuple[int, str], ...]
    noise: float = field(default=NOISE, compare=False)

    @cached_property
    def _room(self) -> Tensor:
        return room(torch.Generator().manual_seed(self.seed))

    def frames(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Frames from ``start`` up to ``stop``, uint8 (N,3,SIDE,SIDE); the same whatever else was looked at."""
        stop = self.length if stop is None else min(stop, self.length)
        out = self._room.repeat(max(0, stop - start), 1, 1, 1)
        ends = [first for first, _ in self.lamp[1:]] + [self.length]
        for (first, colour), end in zip(self.lamp, ends, strict=True):
            paint(out[max(0, first - start) : max(0, end - start)], self.corner, mask("lamp"), COLOURS[colour])
        for event in self.events:
            for at, cell in enumerate(event.path, event.start - start):
                if 0 <= at < len(out):
                    _show(event, out[at], cell)
        for at, frame in enumerate(out, start):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + at + 1)
            frame += self.noise * torch.randn(frame.shape, generator=generator)
        return out.round_().clamp_(0, 255).to(torch.uint8)

    def until(self, stop: int) -> Scene:
        """What has been seen of it after ``stop`` frames; what is in sight then is not over and left out."""
        events = tuple(event for event in self.events if event.end <= stop)
        lamp = tuple(change for change in self.lamp if change[0] < stop)
        return replace(self, length=min(stop, self.length), events=events, lamp=lamp)


def _show(event: Event, frame: Tensor, cell: int) -> None:
    if event.digit is None:
        paint(frame, cell, mask(event.shape), COLOURS[event.colour])
    else:
        paint(frame, cell, mask("all"), COLOURS[event.colour])
        paint(frame, cell, digit(event.digit), (0, 0, 0))


def story(
    rng: random.Random, length: int, events: int, changes: int = 1, starts: list[int] | None = None, cards: float = 0.25
) -> Scene:
    """A scene of ``length`` frames with so many events, each of another thing, and as many ``changes`` of the lamp.

    starts: their first frames, at least ``LONGEST`` apart; None: anywhere. cards: share of events that are cards.
    """
    if starts is None:
        free = length - LONGEST * events
        if free < 0:
            raise ValueError(f"{events} events of up to {LONGEST} frames do not fit in {length}")
        gaps = sorted(rng.randint(0, free) for _ in range(events))
        starts = [gap + LONGEST * i for i, gap in enumerate(gaps)]
    corner = rng.choice((0, ROWS - 1, CELLS - ROWS, CELLS - 1))
    shown: list[Event] = []
    left = rng.sample(THINGS, len(THINGS))
    for start in starts:
        want = rng.random() < cards
        thing = next((x for x in left if (x[0] == CARD) == want), left[0])
        left.remove(thing)
        shown.append(_event(rng, start, thing, corner))
    colours = [rng.choice(list(COLOURS))]
    while len(colours) <= changes:
        colours.append(rng.choice([x for x in COLOURS if x != colours[-1]]))
    times = [0, *sorted(rng.sample(range(1, length), changes))]
    return Scene(rng.getrandbits(40), length, tuple(shown), corner, tuple(zip(times, colours, strict=True)))


def _event(rng: random.Random, start: int, thing: tuple[str, str], corner: int) -> Event:
    shape, colour = thing
    if shape != CARD and rng.random() < 0.4:
        way = rng.choice(list(WAYS))
        lines = [[cell for cell in _line(way, i) if cell != corner] for i in range(ROWS)]
        path = tuple(rng.choice([line for line in lines if len(line) == ROWS]))
        return Event(start, path, shape, colour, way=way)
    cell = rng.choice([x for x in range(CELLS) if x != corner])
    number = rng.randrange(10) if shape == CARD else None
    return Event(start, (cell,) * rng.randint(2, LONGEST), shape, colour, number)


def _line(way: str, i: int) -> list[int]:
    step = WAYS[way]
    cells = range(i * ROWS, (i + 1) * ROWS) if abs(step) == 1 else range(i, CELLS, ROWS)
    return list(cells) if step > 0 else list(reversed(cells))
