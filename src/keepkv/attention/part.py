"""What a store hands over to attention: slots as rectangles, or ragged as they lie; as numbers, or in codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY
from keepkv.kernels.codes import Codes
from keepkv.kernels.logits import MASKED
from keepkv.kernels.segments import Segments

COLUMNS = 512  # slots of each segment that are gathered at once where several queries meet ragged slots
TILE_BYTES = 8 << 20  # of keys and values that codes are expanded to at once


class Part(NamedTuple):
    """Some of a layer's slots: keys (B,H,s,D), values (B,H,s,Dv), log_votes (B,H,s) or None, positions (B,H,s).

    With ``segments`` they are ragged: keys (N,D) and so on, none of them empty, and ``segments`` says whose they are.
    Keys and values may both be ``Codes`` of such shapes; ``like``, an empty tensor, then has the dtype they stand for,
    and ``shift`` (B,H,D), if there is one, is what every key of a head is less than the key that it stands for.
    """

    keys: Tensor | Codes
    values: Tensor | Codes
    log_votes: Tensor | None
    positions: Tensor
    segments: Segments | None = None
    like: Tensor | None = None
    shift: Tensor | None = None

    def bias(self, lowest: float = MASKED) -> Tensor:
        """What is added to the logits of a rectangle, (B,H,s) float32: log votes, ``lowest`` for empty slots."""
        empty = self.positions < 0
        return torch.where(empty, lowest, 0.0) if self.log_votes is None else self.log_votes.masked_fill(empty, lowest)

    def rectangles(self) -> Iterator[Part]:
        """The same slots as rectangles of numbers: the part itself, or copies of a tile of each segment at a time."""
        for tile in self.tiles():
            yield from tile._gathered(COLUMNS)

    def tiles(self) -> Iterator[Part]:
        """The same slots as numbers: the part itself, or rectangles that codes are expanded to, a tile at a time."""
        if not isinstance(self.keys, Codes) or not isinstance(self.values, Codes):
            yield self
            return
        assert self.like is not None
        rows = self.positions.shape[:2].numel() if self.segments is None else self.segments.rows * self.segments.heads
        one = rows * (self.keys.width + self.values.width) * self.like.element_size()
        for part in self._gathered(max(1, TILE_BYTES // one)):
            assert isinstance(part.keys, Codes) and isinstance(part.values, Codes)
            keys = part.keys.expand(self.like.dtype, None if self.shift is None else self.shift[:, :, None])
            values = part.values.expand(self.like.dtype)
            yield part._replace(keys=keys, values=values, like=None, shift=None)

    def _gathered(self, columns: int) -> Iterator[Part]:
        """The same slots as rectangles, ``columns`` of each segment at a time, or of codes."""
        if self.segments is None and not isinstance(self.keys, Codes):
            yield self
            return
        longest = self.positions.shape[2] if self.segments is None else self.segments.longest
        for start in _starts(longest, columns):
            yield self._slice(start, start + columns) if self.segments is None else self._taken(start, start + columns)

    def _slice(self, start: int, stop: int) -> Part:
        return self._each(lambda x: x[:, :, start:stop])

    def _taken(self, start: int, stop: int) -> Part:
        segments = self.segments
        assert segments is not None
        index, inside = segments.index(start, stop)
        assert inside is not None
        taken = self._each(lambda x: segments.take(x, index, inside))
        return taken._replace(positions=taken.positions.masked_fill_(~inside, EMPTY), segments=None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Part:
        """With ``change`` made to every tensor that has one entry a slot."""
        keys, values = (x.each(change) if isinstance(x, Codes) else change(x) for x in (self.keys, self.values))
        votes = None if self.log_votes is None else change(self.log_votes)
        return self._replace(keys=keys, values=values, log_votes=votes, positions=change(self.positions))


def _starts(longest: int, columns: int) -> Iterable[int]:
    """Where the tiles of ``longest`` slots begin."""
    return range(0, longest, columns)


def plain(part: Part) -> tuple[Tensor, Tensor]:
    """Keys and values of a part that is no codes."""
    assert isinstance(part.keys, Tensor) and isinstance(part.values, Tensor)
    return part.keys, part.values
