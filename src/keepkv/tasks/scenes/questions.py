"""Questions about a scene, of one word in answer each, from a closed vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from keepkv.tasks.scenes.draw import COLOURS, SHAPES
from keepkv.tasks.scenes.story import CARD, WAYS, Event, Scene

PLACES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
MOST = 5  # that are counted
_TEXT = (
    "what colour was the ? where which way went number on came before how many things were there a is lamp now yes no"
)
WORDS = (*_TEXT.split(), *COLOURS, *SHAPES, CARD, *PLACES, *WAYS, *map(str, range(10)), "last")


@dataclass(frozen=True)
class Asked:
    """A question and its answer. about: frames that have to be seen for it; none: all of them."""

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


def _name(event: Event) -> str:
    return f"{event.colour} {event.shape}"


def _frames(*events: Event) -> tuple[int, ...]:
    return tuple(t for event in events for t in range(event.start, event.end))


def colour(scene: Scene) -> list[Asked]:
    """Of shapes that came once."""
    once = Counter(event.shape for event in scene.events)
    return [
        Asked("colour", f"what colour was the {x.shape} ?", x.colour, _frames(x))
        for x in scene.events if once[x.shape] == 1
    ]  # fmt: skip


def place(scene: Scene) -> list[Asked]:
    """Of what stood still."""
    return [
        Asked("place", f"where was the {_name(x)} ?", PLACES[x.path[0]], _frames(x))
        for x in scene.events if not x.way
    ]  # fmt: skip


def went(scene: Scene) -> list[Asked]:
    """Where what moved was last."""
    return [
        Asked("went", f"where went the {_name(x)} ?", PLACES[x.path[-1]], _frames(x)) for x in scene.events if x.way
    ]


def number(scene: Scene) -> list[Asked]:
    """On cards."""
    return [
        Asked("number", f"what number was on the {_name(x)} ?", str(x.digit), _frames(x))
        for x in scene.events if x.digit is not None
    ]  # fmt: skip


def last(scene: Scene) -> list[Asked]:
    """The order in which things came."""
    return [Asked("last", "what came last ?", x.shape, _frames(x)) for x in scene.events[-1:]]


def count(scene: Scene) -> list[Asked]:
    """Things of a colour."""
    made = []
    for hue in COLOURS:
        found = [event for event in scene.events if event.colour == hue]
        if len(found) <= MOST:
            made.append(Asked("count", f"how many things were {hue} ?", str(len(found)), _frames(*found)))
    return made


def seen(scene: Scene) -> list[Asked]:
    """Whether a shape came at all: of those that did as many as of those that did not, where there are."""
    came = {x.shape: tuple(t for y in scene.events if y.shape == x.shape for t in _frames(y)) for x in scene.events}
    rest = [shape for shape in SHAPES if shape not in came]
    told = {shape: came[shape] for shape in list(came)[: max(1, len(rest))]}
    return [Asked("seen", f"was there a {shape} ?", "yes", frames) for shape, frames in told.items()] + [
        Asked("seen", f"was there a {shape} ?", "no") for shape in rest[: len(told)]
    ]


def lamp(scene: Scene) -> list[Asked]:
    """What changed: its colour now, and before the last change."""
    now = Asked("now", "what colour is the lamp now ?", scene.lamp[-1][1], (scene.length - 1,))
    if len(scene.lamp) < 2:
        return [now]
    return [now, Asked("changed", "what colour was the lamp before ?", scene.lamp[-2][1], (scene.lamp[-1][0] - 1,))]


MAKERS: tuple[Callable[[Scene], list[Asked]], ...] = (colour, place, went, number, last, count, seen, lamp)
KINDS = ("colour", "place", "went", "number", "last", "count", "seen", "now", "changed")


def questions(scene: Scene) -> list[Asked]:
    """All that can be asked about ``scene``, kind by kind."""
    return [asked for make in MAKERS for asked in make(scene)]
