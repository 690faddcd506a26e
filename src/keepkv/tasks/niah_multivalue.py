"""Each name has several codes, stated far apart; a question asks for all of them, in the order of the text."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, weave
from keepkv.tasks.facts import fact
from keepkv.tasks.words import codes, names


def build(rng: random.Random, count: Count, length: int, *, keys: int = 4, values: int = 2) -> Item:
    """``keys`` names with ``values`` codes each, and one question per name."""
    order = [name for name in names(rng, keys) for _ in range(values)]
    rng.shuffle(order)
    numbers = codes(rng, len(order))
    stated = [fact(name, code) for name, code in zip(order, numbers, strict=True)]
    asked = []
    for name in dict.fromkeys(order):
        mine = tuple(code for other, code in zip(order, numbers, strict=True) if other == name)
        asked.append(Question(f"\nWhat are all codes of {name}?", f" {', '.join(mine)}", values=mine))
    return Item(weave(rng, count, length, stated, keep_order=True), tuple(asked))


TASK = Task(
    "niah-multivalue", "several values per key, all asked together", build, hint="Answer with the numbers only."
)
