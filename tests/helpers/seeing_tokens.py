"""A tokenizer for tiny models that see: a letter is a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keepkv.vision.mark import MARK

FIRST = 5  # ids below are special


class Letters:
    """As much of a tokenizer as an evaluation asks for."""

    bos_token_id, eos_token_id, chat_template = 1, None, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [FIRST + ord(x) % 128 for x in text]

    def decode(self, ids: Sequence[int] | int, **options: Any) -> str:
        return "".join(chr(x - FIRST) if FIRST <= x < FIRST + 128 else "?" for x in ids)  # type: ignore[union-attr]


class Marks(Letters):
    """A mark is nine tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.replace(MARK, "x" * 9), add_special_tokens)
