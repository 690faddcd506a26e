"""Facts, and the questions about them, that several tasks are made of."""

import random
from collections.abc import Sequence

from keepkv.tasks.base import Count, Question, TaskError


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


def fill(count: Count, length: int, pieces: Sequence[str]) -> tuple[str, int]:
    """As many of ``pieces``, in order, as fit in ``length`` tokens: their text, and how many they are."""
    sizes, used = 0, 0
    for piece in pieces:
        if sizes + count(piece) > length:
            break
        sizes, used = sizes + count(piece), used + 1
    text = "".join(pieces[:used]).lstrip()
    while used and count(text) > length:  # other tokenizers may need a token more at a seam
        used -= 1
        text = "".join(pieces[:used]).lstrip()
    if not used:
        raise TaskError(f"nothing fits in {length} tokens: {pieces[0]!r} alone is longer")
    return text, used
