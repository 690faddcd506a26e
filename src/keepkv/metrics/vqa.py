"""How benchmarks about pictures compare a reply with the answers that they hold; each in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Sequence

Answers = Sequence[str]


def anls(reply: str, answers: Answers, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity (DocVQA): 1 − distance / length of the longer one, for the nearest
    answer, and 0 where that is below 1 − ``threshold``."""
    said = _plain(reply)

    def near(answer: str) -> float:
        other = _plain(answer)
        longest = max(len(said), len(other))
        return 1.0 if not longest else 1 - _distance(said, other) / longest

    best = max(map(near, answers))
    return best if best > 1 - threshold else 0.0


def relaxed(reply: str, answers: Answers, tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy: numbers may be off by 5 %, everything else must be the same."""
    said, number = _plain(reply).rstrip("."), _number(reply)
    for answer in answers:
        wanted = _number(answer)
        if number is not None and wanted is not None:
            if abs(number - wanted) <= tolerance * abs(wanted):
                return 1.0
        elif said == _plain(answer).rstrip("."):
            return 1.0
    return 0.0


def consensus(reply: str, answers: Answers) -> float:
    """VQA accuracy (TextVQA): min(1, answers that say the same / 3); of fewer than three, whether one does."""
    same = sum(_plain(reply).rstrip(".") == _plain(answer).rstrip(".") for answer in answers)
    return min(1.0, same / min(3, len(answers)))


def contains(reply: str, answers: Answers) -> float:
    """Whether any answer stands in the reply, white space and case apart (OCRBench)."""
    said = "".join(_plain(reply).split())
    return float(any("".join(_plain(answer).split()) in said for answer in answers))


def exact(reply: str, answers: Answers) -> float:
    """Whether the reply is an answer, case and a full stop apart (GQA)."""
    said = _plain(reply).rstrip(".")
    return float(any(said == _plain(answer).rstrip(".") for answer in answers))


def letter(reply: str, answers: Answers) -> float:
    """Whether the first letter of an option in the reply is the answer (multiple choice)."""
    found = re.search(r"\b([A-J])\b", reply.strip().upper() if len(reply.strip()) <= 2 else reply)
    return float(found is not None and found.group(1) in {answer.strip().upper()[:1] for answer in answers})


def yes_or_no(reply: str, answers: Answers) -> float:
    """Whether the first word is the answer's (MME)."""
    words = re.findall(r"[a-z]+", reply.lower())
    return float(bool(words) and words[0] in {_plain(answer).rstrip(".") for answer in answers})


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    found = re.fullmatch(r"\$?\s*(-?[\d,]*\.?\d+)\s*(%?)\.?", text.strip())
    if found is None:
        return None
    return float(found[1].replace(",", "")) / (100 if found[2] else 1)


def _distance(a: str, b: str) -> int:
    """Fewest letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
