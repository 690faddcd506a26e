"""Many facts of one kind in a haystack of real text; each question asks for one of them."""

import random

from keepkv.tasks.base import Count, Item, Task, TaskError, weave
from keepkv.tasks.facts import fact, question
from keepkv.tasks.words import codes, names


def build(
    rng: random.Random, count: Count, length: int, *, facts: int | None = None, questions: int = 8, alike: bool = False
) -> Item:
    """``facts`` defaults to one per 50 tokens of context (at least 4), of which ``questions`` are asked about.

    With ``alike`` the names share their words, which is harder.
    """
    n = max(4, length // 50) if facts is None else facts
    if n < 1 or questions < 1:
        raise TaskError(f"facts and questions must be at least 1, got {n} and {questions}")
    pairs = list(zip(names(rng, n, alike=alike), codes(rng, n), strict=True))
    asked = rng.sample(pairs, min(questions, n))
    return Item(weave(rng, count, length, [fact(*pair) for pair in pairs]), tuple(question(*pair) for pair in asked))


TASK = Task("niah-multikey-1", "many facts in real text, one asked at a time", build)
