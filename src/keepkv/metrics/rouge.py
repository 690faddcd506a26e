"""How much of a reference a reply repeats: ROUGE recall over lower-cased word tokens, without stemming.

ROUGE (Lin, 2004). Recall and not F: a long reply that tells the reference and more has told it all.
"""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher

from keepkv.metrics.summary import common

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, in any script."""
    return _WORD.findall(text.lower())


def rouge_l(reference: str, reply: str) -> float:
    """ROUGE-L recall: share of the reference's words that the reply has in the same order. In [0, 1]."""
    said = words(reference)
    return len(common(said, words(reply))) / len(said) if said else 0.0


def rouge_1(reference: str, reply: str) -> float:
    """ROUGE-1 recall: share of the reference's words that the reply has in any order, each as often as it has it."""
    said = words(reference)
    return (Counter(said) & Counter(words(reply))).total() / len(said) if said else 0.0


def verbatim(reference: str, reply: str) -> float:
    """Share of the reference's words in the longest run of them that the reply repeats without a gap."""
    said = words(reference)
    longest = SequenceMatcher(None, said, words(reply), autojunk=False).find_longest_match()
    return longest.size / len(said) if said else 0.0
