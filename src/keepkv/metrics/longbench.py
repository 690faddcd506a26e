"""Metrics of LongBench (arXiv 2308.14508) and LongBench v2 (arXiv 2412.15204), as they publish them.

``LongBench/metrics.py`` and ``pred.py`` of THUDM/LongBench.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from keepkv.metrics.f1 import segment
from keepkv.metrics.summary import rouge_l_f


def classification(reply: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the reply names, if the answer is among them; a class that is part of the
    answer's name does not count."""
    named = [name for name in classes if name in reply and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def share_of_numbers(reply: str, answer: str) -> float:
    """Share of the numbers in the reply that are the number in the answer."""
    said, true = re.findall(r"\d+", reply), re.findall(r"\d+", answer)
    return sum(number == true[0] for number in said) / len(said) if said and true else 0.0


def code_similarity(reply: str, answer: str) -> float:
    """Similarity of the answer and the reply's first line that is neither comment nor fence, in hundredths."""
    lines = reply.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def segmented_rouge(reply: str, answer: str) -> float:
    """ROUGE-L F over the words of Chinese text."""
    return rouge_l_f(" ".join(segment(reply)), " ".join(segment(answer)))


def letter(reply: str, answer: str) -> float:
    """Whether the reply says "The correct answer is (A)" of the right letter (v2)."""
    bare = reply.replace("*", "")
    said = re.search(r"The correct answer is \(([A-D])\)", bare) or re.search(r"The correct answer is ([A-D])", bare)
    return float(said is not None and said.group(1) == answer)
