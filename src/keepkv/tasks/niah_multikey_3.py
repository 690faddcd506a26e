"""A haystack made of facts alone, whose keys and values are long numbers."""

import random

from keepkv.tasks.base import Count, Item, Task
from keepkv.tasks.facts import fact, long_codes, question
from keepkv.tasks.lists import fill


def build(rng: random.Random, count: Count, length: int, *, groups: int = 2, questions: int = 8) -> Item:
    """As many facts as fit; keys and values have ``groups`` groups of four digits."""
    n = min(length // 10 + 1, 4000)
    pairs = list(zip(long_codes(rng, n, groups), long_codes(rng, n, groups), strict=True))
    text, used = fill(count, length, [fact(*pair) for pair in pairs])
    asked = rng.sample(pairs[:used], min(questions, used))
    return Item(text, tuple(question(*pair) for pair in asked))


TASK = Task("niah-multikey-3", "facts alone, with long numbers as keys and values", build)
