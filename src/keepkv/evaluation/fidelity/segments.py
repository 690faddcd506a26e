"""Stretches of a text, each a sample of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keepkv.errors import KeepKVError


def tokenise(tokenizer: Any, text: str) -> tuple[Tensor, int | None]:
    """The tokens (n,) of ``text``, and the token that the tokenizer starts a text with, or None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = tokenizer.bos_token_id
    begins = start is not None and tokenizer.encode(text[:1], add_special_tokens=True)[:1] == [start]
    return torch.tensor(ids, dtype=torch.int64), start if begins else None


def cut(ids: Tensor, count: int, length: int, start: int | None = None) -> Tensor:
    """(count, length) int64: as many stretches of ``ids`` (n,), spread evenly, without overlap.

    ``start``, where there is one, is put before each and counts: many models lean on it in every layer.
    """
    lead = 0 if start is None else 1
    own = length - lead
    if count < 1 or own < 1:
        raise KeepKVError(f"{count} segments of {length} tokens: give at least one, of at least {lead + 1}")
    if count * own > len(ids):
        raise KeepKVError(
            f"the text has {len(ids)} tokens and {count} segments of {length} need {count * own}: give a longer text, "
            "or fewer or shorter segments"
        )
    apart = (len(ids) - own) // (count - 1) if count > 1 else 0
    made = torch.stack([ids[i * apart : i * apart + own] for i in range(count)])
    return made if start is None else torch.cat([made.new_full((count, 1), start), made], dim=1)
