"""One fact at a known depth: for the picture of depth against length."""

import random

from keepkv.tasks import niah_single_2
from keepkv.tasks.base import Count, Item, Task

DEPTHS = 11


def build(rng: random.Random, count: Count, length: int, *, depth: float | None = None) -> Item:
    """``depth`` in [0, 1]; by default one of ``DEPTHS`` evenly spaced ones."""
    place = rng.randrange(DEPTHS) / (DEPTHS - 1) if depth is None else depth
    made = niah_single_2.build(rng, count, length, depth=place)
    return Item(made.context, made.questions, tags={"depth": place})


TASK = Task("needle", "one fact at a known depth of real text", build)
