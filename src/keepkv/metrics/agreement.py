"""Whether two next-token distributions have the same most likely token."""

from __future__ import annotations

from torch import Tensor


def top1_agreement(reference: Tensor, other: Tensor) -> Tensor:
    """(…) bool of logits (…,V): equal argmax. Of tied logits the one that torch's argmax picks counts."""
    return reference.argmax(-1) == other.argmax(-1)
