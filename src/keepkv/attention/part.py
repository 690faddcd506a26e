"""What a store hands over to attention: slots as rectangles, or ragged as they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY
from keepkv.kernels.logits import MASKED
from keepkv.kernels.segments import Segments

COLUMNS = 512  # slots of each segment that are gathered at once where several queries meet ragged slots


class Part(NamedTuple):
    """Some of a layer's slots: keys (B,H,s,D), values (B,H,s,Dv), log_votes (B,H,s) or None, positions (B,H,s).

    With ``segments`` they are ragged: keys (N,D) and so on, none of them empty, and ``segments`` says whose they are.
    """

    keys: Tensor
    values: Tensor
    log_votes: Tensor | None
    positions: Tensor
    segments: Segments | None = None

    def bias(self) -> Tensor:
        """What is added to the logits of a rectangle, (B,H,s) float32: log votes, ``MASKED`` for empty slots."""
        empty = self.positions < 0
        if self.log_votes is None:
            return torch.zeros(empty.shape, device=empty.device).masked_fill_(empty, MASKED)
        return self.log_votes.masked_fill(empty, MASKED)

    def rectangles(self) -> Iterator[Part]:
        """The same slots as rectangles: the part itself, or copies of ``COLUMNS`` slots of each segment at a time."""
        if self.segments is None:
            yield self
            return
        for start in range(0, self.segments.longest, COLUMNS):
            index, inside = self.segments.index(start, start + COLUMNS)
            taken = (None if x is None else self.segments.take(x, index, inside) for x in self[:4])
            keys, values, votes, positions = taken
            assert keys is not None and values is not None and positions is not None and inside is not None
            yield Part(keys, values, votes, positions.masked_fill_(~inside, EMPTY))
