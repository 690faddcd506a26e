"""How benchmarks about pictures compare a reply with the answers that they hold; each in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Sequence

Answers = Sequence[str]
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


def anls(reply: str, answers: Answers, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity (DocVQA; arXiv 1905.13648, equation 1): 1 − distance / length of the
    longer one, for the nearest answer, and 0 where that is not above 1 − ``threshold``. Case and runs of white space
    do not count."""
    said = _plain(reply)

    def near(answer: str) -> float:
        other = _plain(answer)
        longest = max(len(said), len(other))
        return 1.0 if not longest else 1 - distance(said, other) / longest

    best = max(map(near, answers))
    return best if best > 1 - threshold else 0.0


def relaxed(reply: str, answers: Answers, tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1): numbers may be off by 5 %, everything else must be
    the same. 12 % is 0.12; a dollar sign, commas of thousands, case and a full stop do not count."""
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
    """VQA accuracy (TextVQA; visualqa.org/evaluation): min(1, answers that say the same / 3), mean over the answers
    that are left when one of them is out. Of ten answers, 1, 2, 3 and 4 that say the same give 0.3, 0.6, 0.9 and 1.

    Words are compared as there: without articles and punctuation, numbers up to ten as digits. Apostrophes are left
    out, where the published script puts them back into 120 words. Of three answers or fewer: the share of them.
    """
    said = _words(reply)
    same = [_words(answer) == said for answer in answers]
    if len(answers) <= 3:
        return sum(same) / len(answers)
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(answers)


def contains(reply: str, answers: Answers, formula: bool = False) -> float:
    """Whether any answer stands in the reply (OCRBench, arXiv 2305.07895, its ``example.py``): case apart; of a
    ``formula`` white space apart."""

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    said = plain(reply)
    return float(any(plain(answer) in said for answer in answers))


def exact(reply: str, answers: Answers) -> float:
    """Whether the reply is an answer, case and a full stop apart (GQA, arXiv 1902.09506, accuracy)."""
    said = _plain(reply).rstrip(".")
    return float(any(said == _plain(answer).rstrip(".") for answer in answers))


def letter(reply: str, answers: Answers, options: Sequence[str] = ()) -> float:
    """Whether the reply chooses the answer's letter: by its first word, else by the only letter of an option among its
    words, else by "answer is B", else by the text of the only option in it.

    The last three are the rules of VLMEvalKit's ``can_infer`` for MMBench (arXiv 2307.06281, section 4). Where they
    fail it asks a large model what is meant; here the reply is wrong. Letters up to H where no ``options`` are given.
    """
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options) or 8]
    said = reply.strip().upper() if len(reply.strip()) <= 2 else reply.strip()
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", said).split()
    there = [one for one in letters if one in words]
    if first := re.match(rf"\(?([{letters}])(?:[.):,]|$)", said):
        there = [first[1]]
    elif len(there) != 1 and (stated := re.search(rf"(?i)answer is\s+[*(]*([{letters}])\b", said)):
        there = [stated[1].upper()]
    elif not there:
        there = [one for one, text in zip(letters, options, strict=False) if str(text).lower() in said.lower()]
    return float(len(there) == 1 and there[0] in {answer.strip().upper()[:1] for answer in answers})


def leading(reply: str, answers: Answers) -> float:
    """Whether the reply starts with the answer's letter (MMStar, arXiv 2403.20330, its ``MMStar_eval``): at once, in
    brackets, or behind "option" or "the answer is"; case apart."""
    said = reply.lower().strip()
    started = re.match(r"\(|option |the answer is ", said)
    letters = {said[:1], said[started.end() : started.end() + 1]} if started else {said[:1]}
    return float(bool(letters & {answer.strip().lower() for answer in answers}))


def letter_or_words(reply: str, answers: Answers, options: Sequence[str] = ()) -> float:
    """``letter`` where the answer is one, else ``exact`` (RealWorldQA, as lmms-eval scores it)."""
    chosen = all(re.fullmatch("[A-Z]", answer.strip().upper()) for answer in answers)
    return letter(reply, answers, options) if chosen else exact(reply, answers)


def yes_or_no(reply: str, answers: Answers) -> float:
    """Whether yes, or else no, stands in the first four letters, and is the answer (MME, arXiv 2306.13394, its
    ``calculation.py``). Its accuracy; accuracy+, over both questions of an image, is not computed."""
    start = reply.strip().lower()[:4]
    said = "yes" if "yes" in start else "no" if "no" in start else ""
    return float(said in {_plain(answer).rstrip(".") for answer in answers})


def distance(a: str, b: str) -> int:
    """Fewest letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    found = re.fullmatch(r"\$?\s*(-?[\d,]*\.?\d+)\s*(%?)\.?", text.strip())
    if found is None:
        return None
    return float(found[1].replace(",", "")) / (100 if found[2] else 1)


def _words(text: str) -> list[str]:
    """A text as the VQA script compares it. A mark becomes a space, unless a space is beside it anywhere."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").replace("\n", " ").replace("\t", " ")
    given = text = text.strip()
    for mark in ';/[]"{}()=+\\_-><@`!':
        text = text.replace(mark, "" if f"{mark} " in given or f" {mark}" in given else " ")
    text = re.sub(r"\.(?!\d)", "", text).replace("'", "")
    return [_NUMBERS.get(word, word) for word in text.split() if word not in ("a", "an", "the")]
