"""Which slots stay exact beside codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY, Slots
from keepkv.errors import KeepKVError
from keepkv.store.base import Held


class Split(NamedTuple):
    """Which slots stay exact, (B,H,S) bool each: those that are ``pinned``, and the ``newest``."""

    pinned: Tensor
    newest: Tensor


@dataclass(frozen=True)
class Exact:
    """What is asked to stay exact: ``first`` tokens of a row and, if ``protected``, those of protected spans, while
    tokens come and at a compression; of what a compression leaves, the ``last`` slots of each head and the ``merged``
    ones that stand for most tokens."""

    first: int = 0
    last: int = 0
    merged: int = 0
    protected: bool = False

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return self != Exact()

    @property
    def slots(self) -> int:
        """Slots of each head that stay exact at most, protected ones not counted."""
        return self.first + self.last + self.merged

    def check(self, held: Held) -> None:
        """Raise ``KeepKVError`` where this means nothing for a store that is made for ``held``."""
        said = ", ".join(f"exact_{name}={x}" for name, x in asdict(self).items() if x)
        if self.asked and held.codec.exact is None:
            raise KeepKVError(
                f"{said}: without a codec every slot is exact. Leave them out, or give a codec, such as codec='int4'."
            )
        if self.merged and not held.votes:
            raise KeepKVError(
                f"{said}: this method merges no slots. Leave exact_merged out, or give a method that merges, such as "
                "'keepkv'."
            )

    def tokens(self, positions: Tensor, protects: Callable[[Tensor], Tensor] | None) -> Tensor:
        """(B,H,S) bool: which tokens at ``positions`` are exact from the start. protects: see ``Held``."""
        found = (positions >= 0) & (positions < self.first)
        return found | protects(positions) if self.protected and protects is not None else found

    def split(self, slots: Slots, coded: Tensor, held: Held) -> Split:
        """Which of ``slots`` stay exact. coded (B,H,S) bool: what a codec wrote is exact no more, and stays a code."""
        free, at, votes = slots.valid & ~coded, slots.positions, slots.log_votes
        if held.codec.together:
            votes = votes.amax(1, keepdim=True).expand_as(votes)
        pinned = free & self.tokens(at, held.protects)
        newest = _largest(at, free & ~pinned, self.last)
        return Split(pinned | _largest(votes, free & ~pinned & ~newest, self.merged), newest)


def _largest(x: Tensor, among: Tensor, count: int) -> Tensor:
    """(B,H,S) bool: of the slots ``among`` (B,H,S) those ``count`` of each head with the largest ``x`` (B,H,S), the
    first ones where these are equal."""
    if not count:
        return torch.zeros_like(among)
    order = (
        x.masked_fill(~among, -torch.inf if x.is_floating_point() else EMPTY)
        .sort(dim=-1, descending=True, stable=True)
        .indices
    )
    return torch.zeros_like(among).scatter_(2, order[..., :count], True) & among
