"""One fact in a haystack of real text."""

import random

from keepkv.tasks.base import Count, Item, Task, weave
from keepkv.tasks.facts import fact, question
from keepkv.tasks.words import codes, names


def build(rng: random.Random, count: Count, length: int, *, depth: float | None = None) -> Item:
    """``depth`` in [0, 1] fixes where the fact stands; by default it is anywhere."""
    [name], [code] = names(rng, 1), codes(rng, 1)
    return Item(weave(rng, count, length, [fact(name, code)], depth=depth), (question(name, code),))


TASK = Task("niah-single-2", "one fact hidden in real text", build)
