"""One fact with a long value in a haystack of real text."""

import random

from keepkv.tasks.base import Count, Item, Task, weave
from keepkv.tasks.facts import fact, long_codes, question
from keepkv.tasks.words import names


def build(rng: random.Random, count: Count, length: int, *, groups: int = 4) -> Item:
    """The value has ``groups`` groups of four digits: one lost group makes the reply wrong."""
    [name], [code] = names(rng, 1), long_codes(rng, 1, groups)
    return Item(weave(rng, count, length, [fact(name, code)]), (question(name, code),))


TASK = Task("niah-single-3", "one long value hidden in real text", build)
