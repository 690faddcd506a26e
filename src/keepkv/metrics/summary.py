"""ROUGE-L F of whole summaries, in the two forms that long-context benchmarks publish.

Both take the union of the longest common subsequences of each reference sentence with every sentence of the reply (Lin,
2004, summary level) and differ in all else: how text is cut, whether words count once, which of several longest
subsequences is taken. Numbers of one cannot be compared with numbers of the other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_TOKEN = re.compile(r"[a-z0-9]+")


def rouge_l_f(reply: str, reference: str) -> float:
    """As the package ``rouge`` 1.0.1, which LongBench uses: sentences end at full stops, words are split at spaces,
    case counts, every word counts once."""
    said, true = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part] for text in (reply, reference)
    )
    if not said or not true:
        return 0.0
    shared: set[str] = set()
    for sentence in true:
        for other in said:
            shared.update(sentence[i] for i in common(sentence, other, first_shorter=False))
    recall = len(shared) / len({word for sentence in true for word in sentence})
    precision = len(shared) / len({word for sentence in said for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_lsum(reply: str, reference: str) -> float:
    """As ``rougeLsum`` of the package ``rouge_score`` without stemmer, which InfiniteBench uses: sentences end at line
    breaks, tokens are lower-cased runs of letters and digits, each counts as often as both sides have it."""
    said, true = ([_TOKEN.findall(line.lower()) for line in text.split("\n") if line] for text in (reply, reference))
    left, right = (Counter(token for sentence in text for token in sentence) for text in (said, true))
    total, hits = left.total() + right.total(), 0
    for sentence in true:
        found = sorted({i for other in said for i in common(sentence, other, first_shorter=True)})
        for token in (sentence[i] for i in found):
            if left[token] and right[token]:
                hits += 1
                left[token] -= 1
                right[token] -= 1
    return 2 * hits / total if total else 0.0


def common(a: Sequence[str], b: Sequence[str], *, first_shorter: bool = True) -> list[int]:
    """Indices in ``a`` of a longest common subsequence. Of several: traced back from both ends, shortening ``a``
    first where either would do, or ``b``."""
    table = [[0] * (len(b) + 1)]
    for x in a:
        above, row = table[-1], [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        table.append(row)
    i, j, found = len(a), len(b), []
    while i and j:
        without_a, without_b = table[i - 1][j], table[i][j - 1]
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif without_a > without_b or (first_shorter and without_a == without_b):
            i -= 1
        else:
            j -= 1
    return found[::-1]
