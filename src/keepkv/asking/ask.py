"""A document, some questions, one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from transformers import PreTrainedModel

from keepkv.asking.context import CHUNK, Context
from keepkv.core.budget import Budget
from keepkv.engine.receipt import Receipt
from keepkv.errors import KeepKVError
from keepkv.methods import Method


@dataclass(frozen=True)
class Answers(Sequence[str]):
    """The replies, in the order of the questions, and the receipt of the compressed text.

    It is a sequence of texts; printed, it shows each question with its reply, and the receipt.
    """

    questions: tuple[str, ...]
    replies: tuple[str, ...]
    receipt: Receipt

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[str]: ...
    def __getitem__(self, which: int | slice) -> str | Sequence[str]:
        return self.replies[which]

    def __len__(self) -> int:
        return len(self.replies)

    def __iter__(self) -> Iterator[str]:
        return iter(self.replies)

    def __str__(self) -> str:
        turns = (f"> {asked}\n{said}" for asked, said in zip(self.questions, self.replies, strict=True))
        return "\n\n".join((*turns, str(self.receipt)))


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    questions: str | Sequence[str],
    budget: Budget | float | int | str = 0.25,
    method: str | Method = "many-questions",
    *,
    system: str | None = None,
    chat: bool | None = None,
    chunk: int = CHUNK,
    turns: bool = False,
    max_new_tokens: int = 128,
    generate: dict[str, Any] | None = None,
    **options: Any,
) -> Answers:
    """Read ``context`` once, compress it, and answer each of ``questions`` from what is left.

    >>> print(keepkv.ask(model, tokenizer, text, ["Who wrote it?", "When?"], budget=0.2))  # doctest: +SKIP

    The text is compressed before the questions are looked at, so that more can be asked later: ``keepkv.Context`` is
    the same with the context in your hands, and explains the arguments. turns: each question is asked with the earlier
    ones and their replies in sight; otherwise none knows of another. generate: what ``model.generate`` takes, such as
    ``{"do_sample": True, "temperature": 0.7}``.
    """
    asked = (questions,) if isinstance(questions, str) else tuple(questions)
    if wrong := [one for one in asked if not isinstance(one, str) or not one.strip()] or not asked:
        raise KeepKVError(f"questions: give a text, or a list of texts; given was {wrong if asked else questions!r}")
    read = Context(model, tokenizer, context, budget, method, system=system, chat=chat, chunk=chunk, **options)
    said = [read.ask(one, keep=turns, max_new_tokens=max_new_tokens, **(generate or {})) for one in asked]
    return Answers(asked, tuple(said), read.report())
