"""Facts, and the questions about them, that several tasks are made of."""

import random

from keepkv.tasks.base import Question


def fact(name: str, code: str) -> str:
    """The sentence that states one fact."""
    return f" The code of {name} is {code}."


def question(name: str, code: str) -> Question:
    """The question about one fact."""
    return Question(f"\nWhat is the code of {name}?", f" {code}")


def long_codes(rng: random.Random, n: int, groups: int) -> list[str]:
    """``n`` codes such as ``4821-9032`` of ``groups`` four-digit numbers: no two share their first number."""
    heads = rng.sample(range(1000, 10000), n)
    return ["-".join([str(head), *(str(rng.randrange(1000, 10000)) for _ in range(groups - 1))]) for head in heads]
