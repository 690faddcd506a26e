"""One context, several turns: what was asked before stays, and the context is compressed only once."""

import random

from keepkv.tasks import niah_multikey_1
from keepkv.tasks.base import Count, Item, Task


def build(rng: random.Random, count: Count, length: int, *, turns: int = 4) -> Item:
    """``turns`` questions about different facts, asked one after the other in one conversation."""
    made = niah_multikey_1.build(rng, count, length, questions=turns)
    return Item(made.context, made.questions, conversation=True)


TASK = Task("shared-context", "several turns of questions about one context", build, turns=True)
