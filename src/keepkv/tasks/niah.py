"""Facts hidden in a haystack, as in RULER, at known depths, and over several turns of one conversation."""

import random
from typing import Any

from keepkv.tasks.base import Count, Item, Question, Task, TaskError, weave
from keepkv.tasks.facts import codes, fact, fill, long_codes, names, question

NOISE = (
    " The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.",
)  # fmt: skip
DEPTHS = 11


def single_1(rng: random.Random, count: Count, length: int) -> Item:
    """One fact; the haystack repeats ``NOISE``."""
    haystack = NOISE * (1 + length // sum(count(piece) for piece in NOISE))
    return _single(rng, count, length, names(rng, 1), codes(rng, 1), haystack=haystack)


def single_2(rng: random.Random, count: Count, length: int, *, depth: float | None = None) -> Item:
    """One fact in real text. ``depth`` in [0, 1] fixes where it stands; by default it is anywhere."""
    return _single(rng, count, length, names(rng, 1), codes(rng, 1), depth=depth)


def single_3(rng: random.Random, count: Count, length: int, *, groups: int = 4) -> Item:
    """One fact whose value has ``groups`` groups of four digits: one lost group makes the reply wrong."""
    return _single(rng, count, length, names(rng, 1), long_codes(rng, 1, groups))


def needle(rng: random.Random, count: Count, length: int, *, depth: float | None = None) -> Item:
    """One fact at ``depth`` in [0, 1]; by default at one of ``DEPTHS`` evenly spaced ones."""
    place = rng.randrange(DEPTHS) / (DEPTHS - 1) if depth is None else depth
    made = single_2(rng, count, length, depth=place)
    return Item(made.context, made.questions, tags={"depth": place})


def multikey_1(
    rng: random.Random, count: Count, length: int, *, facts: int | None = None, questions: int = 8, alike: bool = False
) -> Item:
    """Many facts in real text, ``facts`` or one per 50 tokens (at least 4), of which ``questions`` are asked about.

    With ``alike`` the names share their words, which is harder.
    """
    n = max(4, length // 50) if facts is None else facts
    if n < 1 or questions < 1:
        raise TaskError(f"facts and questions must be at least 1, got {n} and {questions}")
    pairs = list(zip(names(rng, n, alike=alike), codes(rng, n), strict=True))
    asked = rng.sample(pairs, min(questions, n))
    return Item(weave(rng, count, length, [fact(*pair) for pair in pairs]), tuple(question(*pair) for pair in asked))


def multikey_2(rng: random.Random, count: Count, length: int, *, questions: int = 8, alike: bool = False) -> Item:
    """As many facts as fit and no other text; ``questions`` are asked about. ``alike``: the names share their words."""
    n = min(length // 8 + 1, 4000)  # a fact is longer than that in any tokenizer
    return _facts_alone(rng, count, length, names(rng, n, alike=alike), codes(rng, n), questions)


def multikey_3(rng: random.Random, count: Count, length: int, *, groups: int = 2, questions: int = 8) -> Item:
    """As many facts as fit and no other text; keys and values have ``groups`` groups of four digits."""
    n = min(length // 10 + 1, 4000)
    return _facts_alone(rng, count, length, long_codes(rng, n, groups), long_codes(rng, n, groups), questions)


def multivalue(rng: random.Random, count: Count, length: int, *, keys: int = 4, values: int = 2) -> Item:
    """``keys`` names with ``values`` codes each, stated far apart. A question asks for all codes of one."""
    order = [name for name in names(rng, keys) for _ in range(values)]
    rng.shuffle(order)
    numbers = codes(rng, len(order))
    stated = [fact(name, code) for name, code in zip(order, numbers, strict=True)]
    asked = []
    for name in dict.fromkeys(order):
        mine = tuple(code for other, code in zip(order, numbers, strict=True) if other == name)
        asked.append(Question(f"\nWhat are all codes of {name}?", f" {', '.join(mine)}", values=mine))
    return Item(weave(rng, count, length, stated, keep_order=True), tuple(asked))


def multiquery(
    rng: random.Random, count: Count, length: int, *, facts: int = 8, asked: int = 2, questions: int = 4
) -> Item:
    """``facts`` facts, and ``questions`` questions of ``asked`` names each; the answer gives each with its code."""
    if asked > facts:
        raise TaskError(f"a question cannot ask for {asked} of {facts} facts")
    pairs = list(zip(names(rng, facts), codes(rng, facts), strict=True))
    made = []
    for _ in range(questions):
        chosen = rng.sample(pairs, asked)
        prompt = f"\nWhat are the codes of {' and '.join(name for name, _ in chosen)}?"
        answer = " and ".join(f"{name} is {code}" for name, code in chosen)
        made.append(Question(prompt, f" {answer}", values=tuple(code for _, code in chosen)))
    return Item(weave(rng, count, length, [fact(*pair) for pair in pairs]), tuple(made))


def shared_context(rng: random.Random, count: Count, length: int, *, turns: int = 4) -> Item:
    """``turns`` questions about different facts, asked one after the other in one conversation."""
    made = multikey_1(rng, count, length, questions=turns)
    return Item(made.context, made.questions, conversation=True)


def _single(rng: random.Random, count: Count, length: int, name: list[str], code: list[str], **placed: Any) -> Item:
    pair = name[0], code[0]
    return Item(weave(rng, count, length, [fact(*pair)], **placed), (question(*pair),))


def _facts_alone(
    rng: random.Random, count: Count, length: int, keys: list[str], values: list[str], questions: int
) -> Item:
    pairs = list(zip(keys, values, strict=True))
    text, used = fill(count, length, [fact(*pair) for pair in pairs])
    asked = rng.sample(pairs[:used], min(questions, used))
    return Item(text, tuple(question(*pair) for pair in asked))


_EACH = "Answer as: NAME is NUMBER and NAME is NUMBER."
TASKS = (
    Task("niah-single-1", "one fact hidden in repeated sentences", single_1),
    Task("niah-single-2", "one fact hidden in real text", single_2),
    Task("niah-single-3", "one long value hidden in real text", single_3),
    Task("niah-multikey-1", "many facts in real text, one asked at a time", multikey_1),
    Task("niah-multikey-2", "a haystack of facts alone, one asked at a time", multikey_2),
    Task("niah-multikey-3", "facts alone, with long numbers as keys and values", multikey_3),
    Task("niah-multivalue", "several values per key, all asked together", multivalue, "Answer with the numbers only."),
    Task("niah-multiquery", "several keys in one question", multiquery, _EACH),
)
# For the picture of depth and length: over all tasks, ``niah-single-2`` stands for it.
NEEDLE = Task("needle", "one fact at a known depth of real text", needle, pooled=False)
SHARED_CONTEXT = Task("shared-context", "several turns of questions about one context", shared_context, turns=True)
