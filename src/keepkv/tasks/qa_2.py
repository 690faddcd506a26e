"""Questions that need two sentences of a text, which stand anywhere in it."""

import random

from keepkv.tasks.base import Count, Item, Task, weave
from keepkv.tasks.relations import VERBS, ask_beyond, follows, told, world


def build(rng: random.Random, count: Count, length: int, *, names: int | None = None, questions: int = 8) -> Item:
    """``names`` (by default one per 100 tokens, at least 2): each follows another one and has one relation."""
    people = world(rng, max(2, length // 100) if names is None else names)
    order = list(people)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    verb = {name: rng.choice(list(VERBS)) for name in order}
    facts = [told(name, verb[name], people[name][verb[name]]) for name in order]
    facts += [follows(name, after[name]) for name in order]
    asked = rng.sample(order, min(questions, len(order)))
    made = tuple(ask_beyond(n, after[n], verb[after[n]], people[after[n]][verb[after[n]]]) for n in asked)
    return Item(weave(rng, count, length, facts), made)


TASK = Task("qa-2", "questions that need two sentences", build, hint="Answer with one short sentence.")
