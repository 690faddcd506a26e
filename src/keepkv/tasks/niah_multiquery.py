"""Several names in one question; the answer gives each with its code."""

import random

from keepkv.tasks.base import Count, Item, Question, Task, TaskError, weave
from keepkv.tasks.facts import fact
from keepkv.tasks.words import codes, names


def build(rng: random.Random, count: Count, length: int, *, facts: int = 8, asked: int = 2, questions: int = 4) -> Item:
    """``facts`` facts, and ``questions`` questions of ``asked`` names each."""
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


TASK = Task(
    "niah-multiquery", "several keys in one question", build, hint="Answer as: NAME is NUMBER and NAME is NUMBER."
)
