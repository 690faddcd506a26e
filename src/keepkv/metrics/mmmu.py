"""Accuracy of MMMU (arXiv 2311.16502), by the rules of its ``eval_utils.py``."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")  # what is meant follows
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu(reply: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Whether the reply chooses the answer's letter among ``options``, or without them says the answer."""
    return float(chosen(reply, options) in answers) if options else float(said(reply, answers))


def chosen(reply: str, options: Sequence[str]) -> str | None:
    """The letter that a reply chooses: the last in brackets, else the last alone between spaces, else, of more than
    five words, the option whose text comes last. None where there is none; the published script draws one then."""
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    letters = [chr(ord("A") + i) for i in range(len(options))]
    texts = options if len(reply.split()) > 5 else ()
    for written, where in (
        ([f"({x})" for x in letters], reply),
        ([f" {x} " for x in letters], reply),
        ([str(text).lower() for text in texts], reply.lower()),
    ):
        found = [(where.rfind(x), -i) for i, x in enumerate(written) if x in where]
        if found:
            return letters[-max(found)[1]]
    return None


def said(reply: str, answers: Sequence[str]) -> bool:
    """Whether what the reply comes to has an answer in it: a text by its letters, a number rounded to two places."""
    tails = _lines(reply) or [reply.strip().strip(".").lower()]
    numbers = [number for tail in tails for pattern in _NUMBERS for number in re.findall(pattern, tail)]
    meant = [one for text in (*tails, *numbers) for one in _normal(text)]
    wanted = [one for answer in answers for one in _normal(answer)]
    return any(
        any(isinstance(right, str) and right in one for right in wanted) if isinstance(one, str) else one in wanted
        for one in meant
    )


def _lines(reply: str) -> list[str]:
    """The shortest end of each line that follows a word after which a result comes."""
    lines = reply.strip().strip(".").lower().split("\n")
    found = []
    for i, line in enumerate(lines):
        words = (*_BEFORE, "=") if i == len(lines) - 1 else _BEFORE
        shortest = ""
        for end in (line.split(word)[-1].strip() for word in words if word in line):
            shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest not in ("", ":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found


def _normal(text: str) -> list[str | float]:
    """A number rounded, or a text in lower case; of one letter with a space on either side, so that it stands alone."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
