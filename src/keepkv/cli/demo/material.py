"""What the demo reads and asks: the shipped document with facts woven in, or the user's own text and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keepkv.asking.turns import Turns, turns_of
from keepkv.cli.demo.measure import Asked
from keepkv.errors import KeepKVError
from keepkv.tasks import demo_document
from keepkv.tasks.asking import Ids
from keepkv.tasks.length import check_text, check_tokens

QUESTIONS = (
    "What is the text above about?",
    "What does the text say first, and what does it say last?",
    "Name three things that the text mentions.",
)


@dataclass(frozen=True)
class Material:
    """What is read and asked. context: token ids. places: which token of the context the answer of each question
    begins with; ``None`` where that is not known."""

    context: Ids
    asked: list[Asked]
    places: list[int | None]

    @property
    def has_answers(self) -> bool:
        """Whether the answers are known."""
        return all(one.answer is not None for one in self.asked)


def shipped(tokenizer: Any, model: Any, seed: int = 0) -> Material:
    """The document that comes with the package, and a question for each fact in it."""
    text, questions = demo_document(seed)
    turns = turns_of(tokenizer) if getattr(tokenizer, "chat_template", None) else Turns("", "", "", "")
    return _material(tokenizer, model, turns, text, [(one.prompt, one.answer) for one in questions])


def own(tokenizer: Any, model: Any, text: str, questions: Sequence[str]) -> Material:
    """The user's text and questions, in general ones where none are given; no answers are known."""
    if not text.strip():
        raise KeepKVError("the document is empty")
    return _material(tokenizer, model, turns_of(tokenizer), text, [(one, None) for one in questions or QUESTIONS])


def _material(
    tokenizer: Any, model: Any, turns: Turns, text: str, questions: Sequence[tuple[str, str | None]]
) -> Material:
    check_text(tokenizer, model, text, "the document")
    ids = tokenizer.encode(turns.before + text, add_special_tokens=not turns.before)
    check_tokens(model, len(ids), "the document")
    places = [_place(tokenizer, text, answer) for _, answer in questions]
    asked = [Asked(turns.question(said, later=False), answer, said.strip()) for said, answer in questions]
    return Material(ids, asked, places)


def _place(tokenizer: Any, text: str, answer: str | None) -> int | None:
    at = text.find(f"{answer}.") if answer else -1
    return len(tokenizer.encode(text[:at])) if at >= 0 else None
