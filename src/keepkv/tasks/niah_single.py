"""One fact in a haystack of real text."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, weave
from keepkv.tasks.words import codes, names


def fact(name: str, code: str) -> str:
    """The sentence that states one fact."""
    return f" The code of {name} is {code}."


def question(name: str, code: str) -> Question:
    """The question about one fact."""
    return Question(f"\nWhat is the code of {name}?", f" {code}")


def build(rng: random.Random, count: Count, length: int, *, depth: float | None = None) -> Item:
    """``depth`` in [0, 1] fixes where the fact stands; by default it is anywhere."""
    [name], [code] = names(rng, 1), codes(rng, 1)
    return Item(weave(rng, count, length, [fact(name, code)], depth=depth), (question(name, code),))


TASK = Task("niah-single", "one fact hidden in real text", build)
