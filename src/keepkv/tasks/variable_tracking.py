"""Chains of assignments scattered over the text; the question asks for the value at the end of a chain."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, TaskError, weave
from keepkv.tasks.words import NOUNS, codes


def build(
    rng: random.Random, count: Count, length: int, *, chains: int = 4, hops: int = 2, every: bool = False
) -> Item:
    """``chains`` chains of ``hops`` assignments each (1 hop = the value itself), stated in order.

    One question per chain, about its last variable; with ``every``, one per variable.
    """
    if chains < 1 or hops < 1 or chains * hops > len(NOUNS):
        raise TaskError(f"chains × hops must be between 1 and {len(NOUNS)}, got {chains} × {hops}")
    nouns, numbers = rng.sample(NOUNS, chains * hops), codes(rng, chains)
    left = [nouns[i * hops : (i + 1) * hops] for i in range(chains)]
    stated, at = [], [0] * chains
    while open_chains := [i for i in range(chains) if at[i] < hops]:
        i = rng.choice(open_chains)
        value = numbers[i] if at[i] == 0 else left[i][at[i] - 1]
        stated.append(f" Let {left[i][at[i]]} be {value}.")
        at[i] += 1
    asked = [(noun, code) for chain, code in zip(left, numbers, strict=True) for noun in chain[0 if every else -1 :]]
    rng.shuffle(asked)
    questions = tuple(Question(f"\nWhat is {noun}?", f" {code}") for noun, code in asked)
    return Item(weave(rng, count, length, stated, keep_order=True), questions)


TASK = Task("variable-tracking", "follow a chain of assignments to its value", build)
