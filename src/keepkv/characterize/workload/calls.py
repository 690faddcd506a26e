"""The requests of a point."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from keepkv import tasks
from keepkv.characterize.grid.levels import Point
from keepkv.characterize.workload.trace import Arrival, read_trace
from keepkv.evaluation.setup import HELD_OUT, SEEDS
from keepkv.tasks.asking import Encoded, encode
from keepkv.tasks.base import Item, Question, TaskError, weave

CONTINUED = 16  # tokens at the end of a piece of free text that are asked to be continued, and not compressed
SENTENCE = 24  # tokens that a reply in plain English has beside its answer
REPLY = 32  # tokens of a reply where nothing says how many
SOME_ROOM = 32  # tokens of a prompt's length that are left to its question


@dataclass(frozen=True)
class Call:
    """One request. number: of its conversation, negative while warming up; turn: in it. family: task or text. context:
    read and compressed before ``question`` is seen. limit: tokens of the reply at most. graded: whether a reply can be
    right or wrong."""

    number: int
    turn: int
    family: str
    context: str
    question: Question
    limit: int
    graded: bool

    @property
    def prompt(self) -> str:
        """All of it, as one text."""
        return self.context + self.question.prompt

    def encoded(self, tokenizer: Any) -> Encoded:
        """As token ids, in the tokenizer's chat template where it has one."""
        return encode(tokenizer, Item(self.context, (self.question,)))


class Calls:
    """The requests of ``point``: the same for every method, for they depend on application, workload and seed alone.

    tokenizer: of the model, which counts the tokens.
    """

    def __init__(self, point: Point, tokenizer: Any) -> None:
        self.point, self.tokenizer = point, tokenizer
        self.end: int | None = getattr(tokenizer, "eos_token_id", None)

    def turns(self, number: int) -> list[Call]:
        """The requests of conversation ``number``, each without the earlier ones and their replies: see ``follow``."""
        app, work, seed = self.point.application, self.point.workload, self.point.seed
        rng = random.Random(f"{app.name}/{seed}/{number}")
        recorded = self._trace[number % len(self._trace)] if self._trace and number >= 0 else Arrival(0.0)
        n_in = recorded.n_in or work.n_in.draw(rng)
        n_out = recorded.n_out or (work.n_out.draw(rng) if work.n_out is not None else None)
        shared = round(work.shared * n_in)
        room = max(1, n_in - shared - SOME_ROOM)
        if app.tasks:
            family = app.tasks[number % len(app.tasks)]
            context, asked = self._of_task(family, room, number, seed)
        else:
            family, (context, asked) = Path(app.text or "").name, self._of_text(room, rng, number)
        context = self._prefix(shared) + context
        made = []
        for turn in range(work.turns):
            question = asked[turn % len(asked)]
            answer = self._count(question.answer) + SENTENCE * app.plain if question.answer else REPLY
            limit = n_out or question.limit or answer
            made.append(Call(number, turn, family, context, question, limit, bool(question.answer)))
        return made

    def _of_task(self, name: str, room: int, number: int, seed: int) -> tuple[str, tuple[Question, ...]]:
        task = tasks.get(name)
        # Warming up must not read what is measured later: items of calibration, which evaluations leave alone.
        item = HELD_OUT + SEEDS * seed + number if number >= 0 else SEEDS + seed * 1000 - number
        made = task.generate(self.tokenizer, room, item, plain=self.point.application.plain)
        questions = tuple(one for one in made.questions if not one.judged)
        if not questions:
            raise TaskError(f"task {name} is scored without a reply: it is measured with keepkv eval")
        return made.context, questions

    def _of_text(self, room: int, rng: random.Random, number: int) -> tuple[str, tuple[Question, ...]]:
        ids, app = self._text, self.point.application
        if app.questions:
            pairs = [app.questions[(number + i) % len(app.questions)] for i in range(len(app.questions))]
            asked = tuple(
                Question(f"\n\nQuestion: {ask}\nAnswer:", f" {answer}", values=(answer,), limit=REPLY, stop="\n")
                for ask, answer in pairs
            )
            return self._decode(ids[:room]), asked
        start = rng.randrange(max(1, len(ids) - room))
        piece = ids[start : start + room]
        cut = max(1, len(piece) - CONTINUED)
        return self._decode(piece[:cut]), (Question(self._decode(piece[cut:]) or "\n", ""),)

    @cached_property
    def _text(self) -> list[int]:
        path = Path(self.point.application.text or "")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"cannot read {str(path)!r}: {error}") from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= CONTINUED:
            raise TaskError(f"{str(path)!r} has {len(ids)} tokens: give a longer text")
        return ids

    @cached_property
    def _trace(self) -> list[Arrival]:
        return [] if self.point.workload.trace is None else read_trace(self.point.workload.trace)

    def _prefix(self, tokens: int) -> str:
        """The same text for every request that shares so many tokens."""
        return weave(random.Random("shared"), self._count, tokens, ()) + "\n" if tokens else ""

    @property
    def _count(self) -> Callable[[str], int]:
        return lambda text: len(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def follow(call: Call, earlier: Call, reply: str) -> Call:
    """``call`` with the turn before it and its reply in front of its question. ``earlier`` has all turns before that
    in its own context."""
    return replace(call, context=earlier.context + earlier.question.prompt + reply)
