"""Replies long enough for what the model itself writes to fill the cache: copying, sorting, sums with scratch work."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, TaskError
from keepkv.tasks.facts import NOUNS


def _fit(count: Count, length: int, per_step: int) -> int:
    if (steps := (length - 12) // per_step) < 2:
        raise TaskError(f"{length} tokens leave no room for two steps")
    return steps


def copy(rng: random.Random, count: Count, length: int, *, steps: int | None = None) -> Item:
    """A list of words, to be repeated. ``length`` is of the list; the reply is as long again."""
    n = _fit(count, length, max(count(f" {word}") for word in NOUNS)) if steps is None else steps
    words = " ".join(rng.choice(NOUNS) for _ in range(n))
    return Item(f"Words: {words}.", (Question("\nWhich words are these?", f" {words}", graded=True),))


def sort(rng: random.Random, count: Count, length: int, *, steps: int | None = None) -> Item:
    """Different two-digit numbers, to be put in order."""
    n = min(80, _fit(count, length, max(count(f" {number}") for number in range(10, 100)))) if steps is None else steps
    numbers = rng.sample(range(10, 100), n)
    question = Question("\nWhat is their order?", " " + " ".join(map(str, sorted(numbers))), graded=True)
    return Item(f"Numbers: {' '.join(map(str, numbers))}.", (question,))


def add(rng: random.Random, count: Count, length: int, *, steps: int | None = None) -> Item:
    """A sum of many one-digit terms modulo 90, with every intermediate result written down."""
    n = _fit(count, length, count(" + 5")) if steps is None else steps
    total = rng.randrange(10, 100)
    said, scratch = [f" {total}"], []
    for _ in range(n):
        term = rng.randrange(1, 10)
        result = total + term if total + term < 100 else total + term - 90
        said.append(f" + {term}")
        scratch.append(f" {total} + {term} is {result}")
        total = result
    return Item(f"Sum:{''.join(said)}.", (Question("\nWhat is the sum?", ",".join(scratch), graded=True),))


KINDS = {"copy": copy, "sort": sort, "add": add}


def build(rng: random.Random, count: Count, length: int, *, kind: str | None = None) -> Item:
    """``kind``: copy, sort or add; by default any of them. Numbers stay below 100: past it, 90 is taken away."""
    if kind is not None and kind not in KINDS:
        raise TaskError(f"no kind {kind!r}; known: {', '.join(KINDS)}")
    chosen = rng.choice(list(KINDS)) if kind is None else kind
    made = KINDS[chosen](rng, count, length)
    return Item(made.context, made.questions, tags={"kind": float(list(KINDS).index(chosen))})


TASK = Task(
    "long-decode",
    "replies as long as the context: copying, sorting, sums with scratch work",
    build,
    hint="",
    decodes=True,
)
