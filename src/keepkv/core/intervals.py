"""Disjoint intervals of token positions, several per row, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FAR = torch.iinfo(torch.int64).max // 2  # later than any token; where a row has fewer intervals than others


@dataclass(frozen=True)
class Intervals:
    """K disjoint intervals [starts, ends) of each row, both (B,K) int64, in the order of the text; spare ones empty."""

    starts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> Intervals:
        """From sorted pairs (start, end) per row."""
        size = max(map(len, rows), default=0)
        filled = [[*row, *[(FAR, FAR)] * (size - len(row))] for row in rows]
        both = torch.tensor(filled, dtype=torch.int64, device=device).view(len(rows), size, 2)
        return cls(both[..., 0].contiguous(), both[..., 1].contiguous())

    @property
    def size(self) -> int:
        """K."""
        return self.starts.shape[1]

    def rows(self, which: Tensor) -> Intervals:
        """Those of rows ``which``."""
        return Intervals(self.starts[which], self.ends[which])

    def find(self, positions: Tensor) -> Tensor:
        """Interval (B,…) int64 that each position (B,…) lies in, −1 outside of all."""
        flat = positions.reshape(positions.shape[0], -1).long().contiguous()
        if self.size == 0:
            return torch.full_like(flat, -1).view(positions.shape)
        index = torch.searchsorted(self.starts, flat, right=True) - 1
        inside = (index >= 0) & (flat < self.ends.gather(1, index.clamp(min=0)))
        return index.masked_fill(~inside, -1).view(positions.shape)

    def until(self, positions: Tensor) -> Tensor:
        """End (B,…) int64 of the interval that each position (B,…) lies in, ``FAR`` outside of all."""
        found = self.find(positions)
        return torch.where(found >= 0, at(self.ends, found), FAR)

    def before(self, time: Tensor) -> Tensor:
        """Positions below ``time`` in each interval: (B,K), or (B,K,K') for a time (B,K') per column."""
        starts, ends = (x if time.dim() == 1 else x[..., None] for x in (self.starts, self.ends))
        return (time[:, None] - starts).clamp(min=0).minimum(ends - starts)


def at(table: Tensor, found: Tensor) -> Tensor:
    """Entries of ``table`` (B,K) or (B,H,K) for the intervals ``found`` (B,…) or (B,H,…); anything where it is −1."""
    index = found.clamp(min=0).flatten(table.dim() - 1)
    return table.gather(-1, index).view(found.shape)
