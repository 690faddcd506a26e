"""Tokens as text, one by one: what log-probabilities are told of."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


class Pieces:
    """tokenizer: of transformers. ``pieces(id)`` is what a token adds to a text, its space included."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lead = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before = tokenizer.decode(self._lead)
        self._known = lru_cache(maxsize=1 << 16)(self._of)

    def __call__(self, token: int) -> str:
        return self._known(token)

    def _of(self, token: int) -> str:
        # Behind another token, because decoders leave out the space at the start of a text.
        text: str = self.tokenizer.decode([*self._lead, token])
        return text.removeprefix(self._before)

    def text(self, tokens: list[int]) -> str:
        """A whole text of ``tokens``."""
        text: str = self.tokenizer.decode(tokens)
        return text


def bytes_of(piece: str) -> list[int] | None:
    """UTF-8 of a piece; None for part of a character, which has no text."""
    return None if "\ufffd" in piece else list(piece.encode("utf-8"))
