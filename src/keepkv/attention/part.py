"""What a store hands over to attention: slots as rectangles, or ragged as they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY
from keepkv.kernels.layout import MASKED, Layout

COLUMNS = 512  # slots of each segment that are gathered at once where several queries meet ragged slots


class Part(NamedTuple):
    """A rectangle of slots: keys (B,H,s,D), values (B,H,s,Dv), log_votes (B,H,s) or None, positions (B,H,s).

    With ``space``: ragged, keys (N,D) and so on, none of them empty, in segments that ``space`` names.
    """

    keys: Tensor
    values: Tensor
    log_votes: Tensor | None
    positions: Tensor
    space: Layout | None = None

    def bias(self) -> Tensor:
        """(B,H,s) float32 added to the logits: log votes, ``MASKED`` for empty slots."""
        empty = self.positions < 0
        if self.log_votes is None:
            return torch.zeros(empty.shape, device=empty.device).masked_fill_(empty, MASKED)
        return self.log_votes.masked_fill(empty, MASKED)

    def rectangles(self) -> Iterator[Part]:
        """The same slots as rectangles: itself, or copies of ``COLUMNS`` slots of each segment at a time."""
        if self.space is None:
            yield self
            return
        for start in range(0, self.space.longest, COLUMNS):
            index, inside = self.space.index(start, start + COLUMNS)
            taken = (None if x is None else self.space.take(x, index, inside) for x in self[:4])
            keys, values, votes, positions = taken
            assert keys is not None and values is not None and positions is not None and inside is not None
            yield Part(keys, values, votes, positions.masked_fill_(~inside, EMPTY))
