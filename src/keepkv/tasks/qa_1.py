"""Questions about one sentence of a text: who needs, calls, wants or sees what."""

import random

from keepkv.tasks.base import Count, Item, Task, weave
from keepkv.tasks.relations import VERBS, ask, told, world


def build(rng: random.Random, count: Count, length: int, *, names: int | None = None, questions: int = 8) -> Item:
    """``names`` (by default one per 100 tokens, at least 2) are told of, with two relations each."""
    people = world(rng, max(2, length // 100) if names is None else names)
    known = [(name, verb, what[verb]) for name, what in people.items() for verb in rng.sample(list(VERBS), 2)]
    asked = rng.sample(known, min(questions, len(known)))
    return Item(weave(rng, count, length, [told(*one) for one in known]), tuple(ask(*one) for one in asked))


TASK = Task("qa-1", "questions about one sentence among similar ones", build, hint="Answer with one short sentence.")
