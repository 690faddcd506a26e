"""Lists of words some of which are more common than others, which are asked."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, TaskError
from keepkv.tasks.facts import NOUNS


def common(rng: random.Random, count: Count, length: int, *, distinct: int = 12, ratio: float = 4.0) -> Item:
    """``distinct`` words fill the context; the common one occurs about ``ratio`` times as often as each other."""
    if not 2 <= distinct <= len(NOUNS) or ratio < 2:
        raise TaskError(f"need 2 to {len(NOUNS)} distinct words and ratio >= 2, got {distinct} and {ratio}")
    words, total = _drawn(rng, count, length, distinct)
    if total < 2 * distinct:
        raise TaskError(f"{distinct} words twice over do not fit in {length} tokens")
    often = max(2, round(total * ratio / (distinct - 1 + ratio)))
    listed = [words[0]] * often + [words[1 + i % (distinct - 1)] for i in range(total - often)]
    return _asked(rng, listed, Question("\nWhich word is the most common?", f" {words[0]}"))


def frequent(
    rng: random.Random, count: Count, length: int, *, distinct: int = 12, asked: int = 3, alpha: float = 1.2
) -> Item:
    """The k-th of ``distinct`` words occurs in proportion to k^-``alpha``; the first ones differ in their numbers."""
    if not asked < distinct <= len(NOUNS):
        raise TaskError(f"need more than {asked} and at most {len(NOUNS)} distinct words, got {distinct}")
    words, total = _drawn(rng, count, length, distinct)
    weights = [k**-alpha for k in range(1, distinct + 1)]
    times = [max(1, int(total * weight / sum(weights))) for weight in weights]
    if sum(times) > total or len(set(times[: asked + 1])) <= asked:
        raise TaskError(f"{distinct} words in clearly different numbers do not fit in {length} tokens")
    listed = [word for word, n in zip(words, times, strict=True) for _ in range(n)]
    top = tuple(words[:asked])
    return _asked(rng, listed, Question("\nWhich words are the most frequent?", f" {', '.join(top)}", values=top))


def _drawn(rng: random.Random, count: Count, length: int, distinct: int) -> tuple[list[str], int]:
    """The words of a list, and how many of them fit in it, repeats included."""
    words = rng.sample(NOUNS, distinct)
    return words, (length - count("Words:") - count(".")) // max(count(f" {word}") for word in words)


def _asked(rng: random.Random, listed: list[str], question: Question) -> Item:
    rng.shuffle(listed)
    return Item(f"Words: {' '.join(listed)}.", (question,))


TASKS = (
    Task("common-words", "name the most common word of a long list", common, "Answer with the word only."),
    Task(
        "frequent-words", "name the three most frequent words of a long list", frequent, "Answer with the words only."
    ),
)
