"""How much of a reference a reply repeats: ROUGE recall over lower-cased word tokens, without stemming.

ROUGE (Lin, 2004). Recall and not F: a long reply that tells the reference and more has told it all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, in any script."""
    return _WORD.findall(text.lower())


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(reference: str, reply: str) -> float:
    """ROUGE-L recall: share of the reference's words that the reply has in the same order. In [0, 1]."""
    said = words(reference)
    return lcs(said, words(reply)) / len(said) if said else 0.0


def rouge_1(reference: str, reply: str) -> float:
    """ROUGE-1 recall: share of the reference's words that the reply has in any order, each as often as it has it."""
    said = words(reference)
    return (Counter(said) & Counter(words(reply))).total() / len(said) if said else 0.0


def verbatim(reference: str, reply: str) -> float:
    """Share of the reference's words in the longest run of them that the reply repeats without a gap."""
    said, heard = words(reference), words(reply)
    if not said:
        return 0.0
    best, row = 0, [0] * (len(heard) + 1)
    for x in said:
        row = [0, *(row[j] + 1 if x == y else 0 for j, y in enumerate(heard))]
        best = max(best, *row)
    return best / len(said)
