"""What a score keeps per slot, as data: the value a new slot starts with, and what slots that merge make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from keepkv.errors import KeepKVError

Merge = Literal["sum", "logsumexp", "max", "anchor"]


@dataclass(frozen=True)
class Stat:
    """A statistic of slots, (B,H,S) float32.

    start: of a slot that nothing is known of yet. merge: what the slot has into which others merge: the ``"sum"`` of
    all, as of masses; ``"logsumexp"``, ln of the sum of their exponentials, as of logs of masses; the ``"max"``; or, as
    ``"anchor"``, what it had itself.
    """

    start: float
    merge: Merge

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise KeepKVError(f"Stat(merge={self.merge!r}): supported are {', '.join(map(repr, get_args(Merge)))}")
