"""Metrics of InfiniteBench (arXiv 2402.13718), as its ``compute_scores.py``."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = ("\n", ":", '"', "'", ".", ",", "?", "!", "{", "}")


def first_integer(reply: str, answer: str) -> float:
    """Whether the first run of digits is the answer."""
    found = re.search(r"[0-9]+", reply)
    return float(found is not None and found.group() == answer)


def first_number(reply: str, answer: float) -> float:
    """Whether the first number is the answer; digits only, so without its sign."""
    found = re.search(r"\d+\.\d+|\d+", reply)
    return float(found is not None and float(found.group()) == answer)


def last_integer(reply: str, answer: int) -> float:
    """Whether the last word is the answer."""
    words = _blank(reply, ("\n", ".", "`", "'", '"', ":")).split()
    try:
        return float(bool(words) and int(words[-1]) == answer)
    except ValueError:
        return 0.0


def leading_run(reply: str, answer: Sequence[int]) -> float:
    """Share of the answer's numbers before the first that the reply has wrong."""
    said = [int(number) for number in re.findall(r"[0-9]+", reply)]
    same = [a == b for a, b in zip(answer, said, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(answer)


def word(reply: str, answer: str) -> float:
    """Whether the answer is a word of the reply."""
    return float(answer in _blank(reply, _MARKS).split())


def name(reply: str, answer: str) -> float:
    """Whether the answer, in capitals, is a word of the reply in any case."""
    return float(answer in _blank(reply, _MARKS).upper().split())


def choice(reply: str, answer: Sequence[str]) -> float:
    """``answer``: text and letter of the right option. The reply's first letter, or what follows "answer is", or its
    first word that is an option's letter."""
    said = reply.strip()
    if said[:1] and said[0] in "ABCD":
        return float(said[0] in answer)
    if said in answer:
        return 1.0
    said = re.sub(" {2,}", " ", _blank(said, tuple(mark for mark in _MARKS if mark != ":")))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        if prefix in said:
            return float(said.partition(prefix)[2][1:].startswith(tuple(answer)))
    letters = [token for token in said.split() if token in "ABCD"]
    return float(bool(letters) and letters[0] in answer)


def bug(reply: str, answer: Sequence[str]) -> float:
    """``answer``: name and letter of the function with the error. The reply starts with "B." or names either behind
    "answer is:"."""
    said = reply.strip()
    if said[:2] in (f"{answer[1]}.", f"{answer[1]}:"):
        return 1.0
    said = re.sub(" {2,}", " ", _blank(said, ("\n", "`", "'", '"', "-", "*", "Option", "option")))
    for prefix in ("answer is:", "is:", "answer:", "correct option is:"):
        if prefix in said:
            return float(said.partition(prefix)[2][1:].startswith(tuple(answer)))
    return 0.0


def _blank(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text
