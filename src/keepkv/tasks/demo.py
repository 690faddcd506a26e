"""A real document with a dozen facts woven into it, for demonstrations."""

import random

from keepkv.tasks.base import Question, TaskError
from keepkv.tasks.facts import codes, fact, names, question
from keepkv.tasks.text import document, sentences_of


def demo_document(seed: int = 0, *, facts: int = 12, characters: int = 7000) -> tuple[str, tuple[Question, ...]]:
    """The shipped document, cut to at most ``characters``, with ``facts`` facts spread over it and a question each.

    The default length is about 2,000 tokens of the embedded model, within what it was trained to read. The same seed
    gives the same text on every machine.
    """
    rng = random.Random(f"demo/{seed}")
    pairs = list(zip(names(rng, facts), codes(rng, facts), strict=True))
    left = characters - sum(len(fact(*pair)) for pair in pairs)
    body: list[str] = []
    for piece in sentences_of(document()):
        if (left := left - len(piece)) < 0:
            break
        body.append(piece)
    if not body:
        raise TaskError(f"{facts} facts leave no room for the document in {characters} characters")
    # One fact in each of as many equal stretches, after a random sentence of its stretch.
    after: dict[int, str] = {}
    for i, pair in enumerate(pairs):
        place = int((i + rng.random()) * len(body) / facts)
        after[place] = after.get(place, "") + fact(*pair)
    text = "".join(piece + after.get(i, "") for i, piece in enumerate(body))
    return text.lstrip(), tuple(question(*pair) for pair in pairs)
