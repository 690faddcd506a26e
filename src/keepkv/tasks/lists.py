"""Contexts that are one long list."""

from collections.abc import Sequence

from keepkv.tasks.base import Count, TaskError


def fill(count: Count, length: int, pieces: Sequence[str]) -> tuple[str, int]:
    """As many of ``pieces``, in order, as fit in ``length`` tokens: their text, and how many they are."""
    sizes, used = 0, 0
    for piece in pieces:
        if sizes + count(piece) > length:
            break
        sizes, used = sizes + count(piece), used + 1
    text = "".join(pieces[:used]).lstrip()
    while used and count(text) > length:  # other tokenizers may need a token more at a seam
        used -= 1
        text = "".join(pieces[:used]).lstrip()
    if not used:
        raise TaskError(f"nothing fits in {length} tokens: {pieces[0]!r} alone is longer")
    return text, used
