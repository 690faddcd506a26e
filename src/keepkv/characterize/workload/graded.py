"""Whether a reply is right."""

from __future__ import annotations

from typing import Any

from keepkv.characterize.workload.calls import Call
from keepkv.tasks.scoring import Score, grade


def graded(tokenizer: Any, call: Call, text: str, tokens: list[int] | None = None) -> Score | None:
    """The score of a reply; None where there is nothing to be right about. tokens: of the reply, where they are known;
    else those of its ``text``."""
    if not call.graded:
        return None
    answer = tokenizer.encode(call.question.answer, add_special_tokens=False)
    said = tokenizer.encode(text, add_special_tokens=False) if tokens is None else tokens
    return grade(tokenizer, call.question, answer, said)
