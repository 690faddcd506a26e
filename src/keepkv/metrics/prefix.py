"""How long two token sequences stay the same."""

from __future__ import annotations

from collections.abc import Sequence


def common_prefix(reference: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference, or before the shorter one ends."""
    count = 0
    for expected, found in zip(reference, other, strict=False):
        if expected != found:
            break
        count += 1
    return count
