"""One fact in a haystack of the same few sentences over and over."""

import random

from keepkv.tasks.base import Count, Item, Task, weave
from keepkv.tasks.facts import fact, question
from keepkv.tasks.words import codes, names

NOISE = (
    " The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.",
)  # fmt: skip


def build(rng: random.Random, count: Count, length: int) -> Item:
    """The haystack repeats ``NOISE``."""
    [name], [code] = names(rng, 1), codes(rng, 1)
    haystack = NOISE * (1 + length // sum(count(piece) for piece in NOISE))
    return Item(weave(rng, count, length, [fact(name, code)], haystack=haystack), (question(name, code),))


TASK = Task("niah-single-1", "one fact hidden in repeated sentences", build)
