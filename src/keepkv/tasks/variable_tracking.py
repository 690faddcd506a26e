"""Chains of assignments scattered over the text; the question asks for the value at the end of a chain."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, TaskError, weave
from keepkv.tasks.facts import NOUNS, codes


def build(
    rng: random.Random, count: Count, length: int, *, chains: int = 4, hops: int = 2, every: bool = False
) -> Item:
    """``chains`` chains of ``hops`` assignments each (1 hop = the value itself), stated in order.

    One question per chain, about its last variable; with ``every``, one per variable. An answer walks the chain down
    to the value, which is what counts.
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
    asked = [(i, hop) for i in range(chains) for hop in range(0 if every else hops - 1, hops)]
    rng.shuffle(asked)
    questions = tuple(_question(left[i][hop::-1], numbers[i]) for i, hop in asked)
    return Item(weave(rng, count, length, stated, keep_order=True), questions)


def _question(walk: list[str], code: str) -> Question:
    """About the first variable of ``walk``, each of which was set to the next one, and the last to ``code``."""
    steps = zip(walk, [*walk[1:], code], strict=True)
    return Question(f"\nWhat is {walk[0]}?", f" {', '.join(f'{a} is {b}' for a, b in steps)}", values=(code,))


TASK = Task(
    "variable-tracking",
    "follow a chain of assignments to its value",
    build,
    hint="Answer as: NAME is NAME, NAME is NUMBER.",
)
