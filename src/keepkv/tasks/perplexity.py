"""How probable a text's own continuation stays: no question, no answer to know, any text."""

import random
import re
from collections.abc import Callable
from pathlib import Path

from keepkv.tasks.base import Count, Item, Question, Task, TaskError
from keepkv.tasks.text import document

# Before a single space that a word follows every tokenizer cuts, so context and continuation tokenise apart.
_SEAM = re.compile(r"(?<=\S) (?=\S)")


def build(
    rng: random.Random, count: Count, length: int, *, continuation: int = 64, path: str | Path | None = None
) -> Item:
    """``length`` tokens from a random place of the shipped document, or of the text at ``path``, and the up to
    ``continuation`` tokens that follow there."""
    if continuation < 2:
        raise TaskError(f"a continuation of {continuation} tokens says nothing: give at least 2")
    text = document() if path is None else _read(path)
    seams = [found.start() for found in _SEAM.finditer(text)] or list(range(1, len(text)))
    seams.append(len(text))
    # As much text from the end as context and continuation need, with a little room for words that do not fit.
    needed = length + continuation
    last = len(seams) - _most(lambda k: count(text[seams[-1 - k] :]), needed, len(seams) - 1) - 2
    if last < 0:
        raise TaskError(
            f"{'the shipped document' if path is None else str(path)!r} has {count(text)} tokens, and a context of "
            f"{length} with a continuation of {continuation} needs more: give a longer text as path, or less length"
        )
    first = rng.randrange(last + 1)
    start = seams[first] + 1 if first else 0  # behind the space
    while text[start].isspace():
        start += 1
    middle = first + 1 + _most(lambda k: count(text[start : seams[first + 1 + k]]), length, len(seams) - first - 2)
    end = middle + _most(
        lambda k: count(text[seams[middle] : seams[middle + k]]), continuation, len(seams) - middle - 1
    )
    answer = text[seams[middle] : seams[end]]
    return Item(text[start : seams[middle]], (Question("", answer, judged=True),), tags={"place": start / len(text)})


def _most(size: Callable[[int], int], limit: int, end: int) -> int:
    """The largest k in [0, end] with size(k) <= limit, for a size that grows with k; few and small calls of it."""
    low, step = 0, 16
    while low < end and size(min(low + step, end)) <= limit:
        low = min(low + step, end)
        step *= 2
    high = min(low + step, end + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


def _read(path: str | Path) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise TaskError(f"cannot read {str(path)!r}: {reason}") from error
    if not text.strip():
        raise TaskError(f"{str(path)!r} is empty: give a text")
    return text


# Its score, one over perplexity, is on another scale than the others.
TASK = Task("perplexity", "how probable a text's own continuation stays", build, hint="", asks=False, pooled=False)
