"""A list of words whose counts fall steeply; the three most frequent are asked."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, TaskError
from keepkv.tasks.words import NOUNS


def build(
    rng: random.Random, count: Count, length: int, *, distinct: int = 12, asked: int = 3, alpha: float = 1.2
) -> Item:
    """The k-th of ``distinct`` words occurs in proportion to k^-``alpha``; the first ones differ in their numbers."""
    if not asked < distinct <= len(NOUNS):
        raise TaskError(f"need more than {asked} and at most {len(NOUNS)} distinct words, got {distinct}")
    words = rng.sample(NOUNS, distinct)
    size = max(count(f" {word}") for word in words)
    total = (length - count("Words:") - count(".")) // size
    weights = [k**-alpha for k in range(1, distinct + 1)]
    times = [max(1, int(total * weight / sum(weights))) for weight in weights]
    if sum(times) > total or len(set(times[: asked + 1])) <= asked:
        raise TaskError(f"{distinct} words in clearly different numbers do not fit in {length} tokens")
    listed = [word for word, n in zip(words, times, strict=True) for _ in range(n)]
    rng.shuffle(listed)
    top = tuple(words[:asked])
    question = Question("\nWhich words are the most frequent?", f" {', '.join(top)}", values=top)
    return Item(f"Words: {' '.join(listed)}.", (question,))


TASK = Task(
    "frequent-words", "name the three most frequent words of a long list", build, hint="Answer with the words only."
)
