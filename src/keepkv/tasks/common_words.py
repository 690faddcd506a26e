"""A list of words in which one word is much more common than each of the others."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, TaskError
from keepkv.tasks.words import NOUNS


def build(rng: random.Random, count: Count, length: int, *, distinct: int = 12, ratio: float = 4.0) -> Item:
    """``distinct`` words fill the context; the common one occurs about ``ratio`` times as often as each other."""
    if not 2 <= distinct <= len(NOUNS) or ratio < 2:
        raise TaskError(f"need 2 to {len(NOUNS)} distinct words and ratio >= 2, got {distinct} and {ratio}")
    words = rng.sample(NOUNS, distinct)
    size = max(count(f" {word}") for word in words)
    total = (length - count("Words:") - count(".")) // size
    if total < 2 * distinct:
        raise TaskError(f"{distinct} words twice over do not fit in {length} tokens")
    common = max(2, round(total * ratio / (distinct - 1 + ratio)))
    others = [words[1 + i % (distinct - 1)] for i in range(total - common)]
    listed = [words[0]] * common + others
    rng.shuffle(listed)
    return Item(f"Words: {' '.join(listed)}.", (Question("\nWhich word is the most common?", f" {words[0]}"),))


TASK = Task("common-words", "name the most common word of a long list", build, hint="Answer with the word only.")
