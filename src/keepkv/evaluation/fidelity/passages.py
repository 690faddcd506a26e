"""Passages: contexts, and what is read behind each; from tasks with questions, or from a text that goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keepkv import tasks
from keepkv.errors import KeepKVError
from keepkv.evaluation.fidelity.segments import cut, tokenise
from keepkv.evaluation.setup import HELD_OUT, SEEDS
from keepkv.tasks.asking import Asked, Ids, encode


@dataclass(frozen=True)
class Passage:
    """A context that is compressed, and what is read behind it, each from a copy of the cache.

    context: token ids. behind: pairs of token ids: what is given, one token at least, and what is said after it. What
    is compared are the distributions of the next token from the last token given to the last one said.
    """

    context: Ids
    behind: tuple[tuple[Ids, Ids], ...]

    def __post_init__(self) -> None:
        if not self.context or not self.behind or not all(given for given, _ in self.behind):
            raise KeepKVError("a passage has a context, and behind it one token at least that is given")

    @property
    def longest(self) -> int:
        """Tokens of the context and the longest of what is behind it."""
        return len(self.context) + max(len(given) + len(said) for given, said in self.behind)


def of_task(tokenizer: Any, name: str, length: int, count: int, seed: int = 0, plain: bool = True) -> list[Passage]:
    """``count`` contexts of a task of at most ``length`` tokens, with their questions and the right answers.

    seed: each has contexts of its own, those of ``keepkv eval``. plain: worded in plain English. Raises ``KeepKVError``
    for tasks of long replies, of pictures, and of several turns.
    """
    task = tasks.get(name)
    if task.decodes or task.sees or task.turns:
        raise KeepKVError(
            f"task {name!r} has no questions that are each asked of a text on their own: choose another, as 'notes'"
        )
    first = HELD_OUT + SEEDS * seed
    made = (task.generate(tokenizer, length, one, plain=plain) for one in range(first, first + count))
    items = (encode(tokenizer, item) for item in made)
    return [Passage(item.context, tuple(map(_pair, item.asked))) for item in items]


def _pair(one: Asked) -> tuple[Ids, Ids]:
    """What is given and said; of a continuation without a question the first token is given."""
    return (one.prompt, one.answer) if one.prompt else (one.answer[:1], one.answer[1:])


def of_text(tokenizer: Any, text: str, length: int, count: int, after: int) -> list[Passage]:
    """``count`` stretches of ``text`` of ``length`` tokens, each with the ``after`` tokens that follow, of which the
    first is given. Raises ``KeepKVError`` where the text is too short."""
    ids, start = tokenise(tokenizer, text)
    stretches = cut(ids, count, length + after, start).tolist()
    return [Passage(one[:length], ((one[length : length + 1], one[length + 1 :]),)) for one in stretches]
