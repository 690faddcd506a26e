"""Accuracy of MathVista (arXiv 2310.02255), as its ``calculate_score.py`` brings a reply into the answer's form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from keepkv.metrics.vqa import distance, exact


def mathvista(
    reply: str, answers: Sequence[str], kind: str = "text", options: Sequence[str] = (), precision: int = 0
) -> float:
    """Whether the reply, in the form of its ``kind``, is an answer.

    kind: "multi_choice", where a letter is its option and any other text the option with the fewest letters to change;
    "integer", cut to whole; "float", rounded to ``precision`` places; "list", as it stands; "text", case apart. There
    a large model takes the answer out of a longer reply. Here it is the last number, list or letter in it; a letter
    counts in brackets or as the last word.
    """
    said = reply.strip().removesuffix(".")
    if kind == "multi_choice":
        said = _option(said, options)
    elif kind in ("integer", "float"):
        numbers = re.findall(r"-?\d+(?:\.\d+)?|-?\.\d+", said.replace(",", ""))
        value = float(numbers[-1]) if numbers else None
        said = "" if value is None else str(int(value) if kind == "integer" else round(value, precision))
    elif kind == "list" and (lists := re.findall(r"\[[^\[\]]*\]", said)):
        said = lists[-1]
    return exact(said, answers) if kind == "text" else float(said in answers)


def _option(said: str, options: Sequence[str]) -> str:
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if said in options:
        return said
    named = re.findall(r"\(([a-zA-Z])\)", said) or re.findall(r"\b([A-Z])$", said)
    if named and named[-1].upper() in letters:
        return options[letters.index(named[-1].upper())]
    return min(options, key=lambda option: distance(said, option))
