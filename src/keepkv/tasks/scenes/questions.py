"""Questions about a scene, of one word in answer each, from a closed vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from keepkv.tasks.scenes.draw import COLOURS, SHAPES
from keepkv.tasks.scenes.story import CARD, THINGS, WAYS, Event, Scene

PLACES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
MOST = 5  # that are counted
_TEXT = (
    "what colour was the ? where which way went number on came before how many things were there a is lamp now yes no"
)
WORDS = (*_TEXT.split(), *COLOURS, *SHAPES, CARD, *PLACES, *WAYS, *map(str, range(10)))


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


def way(scene: Scene) -> list[Asked]:
    """Of what moved."""
    return [Asked("way", f"which way went the {_name(x)} ?", x.way, _frames(x)) for x in scene.events if x.way]


def number(scene: Scene) -> list[Asked]:
    """On cards."""
    return [
        Asked("number", f"what number was on the {_name(x)} ?", str(x.digit), _frames(x))
        for x in scene.events if x.digit is not None
    ]  # fmt: skip


def before(scene: Scene) -> list[Asked]:
    """The order in which things came."""
    pairs = zip(scene.events, scene.events[1:], strict=False)
    return [Asked("before", f"what came before the {_name(b)} ?", a.shape, _frames(a, b)) for a, b in pairs]


def count(scene: Scene) -> list[Asked]:
    """Things of a colour."""
    made = []
    for hue in COLOURS:
        found = [event for event in scene.events if event.colour == hue]
        if len(found) <= MOST:
            made.append(Asked("count", f"how many things were {hue} ?", str(len(found)), _frames(*found)))
    return made


def seen(scene: Scene) -> list[Asked]:
    """Whether a thing came at all: as many that did as did not, and these with a colour and a shape that came."""
    came = [(x.shape, x.colour) for x in scene.events]
    shapes, colours = {x for x, _ in came}, {x for _, x in came}
    rest = [x for x in THINGS if x not in came and x[0] in shapes and x[1] in colours]
    rest = [rest[(scene.seed + 7 * i) % len(rest)] for i in range(min(len(rest), len(came)))]
    told = {f"{x.colour} {x.shape}": _frames(x) for x in scene.events}
    return [Asked("seen", f"was there a {name} ?", "yes", frames) for name, frames in told.items()] + [
        Asked("seen", f"was there a {c} {shape} ?", "no") for shape, c in dict.fromkeys(rest)
    ]


def lamp(scene: Scene) -> list[Asked]:
    """What changed: its colour now, and before the last change."""
    now = Asked("now", "what colour is the lamp now ?", scene.lamp[-1][1], (scene.length - 1,))
    if len(scene.lamp) < 2:
        return [now]
    return [now, Asked("changed", "what colour was the lamp before ?", scene.lamp[-2][1], (scene.lamp[-1][0] - 1,))]


MAKERS: tuple[Callable[[Scene], list[Asked]], ...] = (colour, place, way, number, before, count, seen, lamp)
KINDS = ("colour", "place", "way", "number", "before", "count", "seen", "now", "changed")


def questions(scene: Scene) -> list[Asked]:
    """All that can be asked about ``scene``, kind by kind."""
    return [asked for make in MAKERS for asked in make(scene)]
