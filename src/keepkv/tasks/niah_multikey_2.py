"""A haystack made of facts alone: everything looks like what will be asked."""

import random

from keepkv.tasks.base import Count, Item, Task
from keepkv.tasks.facts import fact, question
from keepkv.tasks.lists import fill
from keepkv.tasks.words import codes, names


def build(rng: random.Random, count: Count, length: int, *, questions: int = 8, alike: bool = False) -> Item:
    """As many facts as fit, of which ``questions`` are asked about. With ``alike`` the names share their words."""
    n = length // 8 + 1  # a fact is longer than that in any tokenizer
    pairs = list(zip(names(rng, min(n, 4000), alike=alike), codes(rng, min(n, 4000)), strict=True))
    text, used = fill(count, length, [fact(*pair) for pair in pairs])
    asked = rng.sample(pairs[:used], min(questions, used))
    return Item(text, tuple(question(*pair) for pair in asked))


TASK = Task("niah-multikey-2", "a haystack of facts alone, one asked at a time", build)
