"""A ragged buffer cut into tiles of one length, whatever segments they belong to: one batched product serves all heads.

A tile is worked on for the segment that its first slot belongs to; where further segments reach into it, the tile is
copied for each of them: at most one per segment, and a few for the rest behind the last whole tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64  # slots


@dataclass(frozen=True)
class Tiles:
    """Work of one token: each entry is a tile of ``TILE`` slots, seen by the segment that owns it.

    owner (E,): segment, row · H + head. outside (E,1,TILE) bool: slots of the tile that are not the owner's. The first
    ``whole`` entries are the tiles of the buffer in order; extra (E − whole, TILE): slots of the others.
    entries (B·H,M): those of each segment, E where it has fewer than M.
    """

    owner: Tensor
    outside: Tensor
    whole: int
    extra: Tensor
    entries: Tensor

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (N,…) as tiles (whole,TILE,…), a view, and those that are copied (E − whole,TILE,…)."""
        return x[: self.whole * TILE].unflatten(0, (self.whole, TILE)), x[self.extra]


def tiles(first: Tensor, lengths: Tensor, total: int) -> Tiles | None:
    """Tiles of ``total`` slots, or None where they are too few for one, or belong in part to nobody.

    first, lengths (B,H) int64: segments, see ``Layout``; reads the device once.
    """
    begin, length = first.flatten(), lengths.flatten()
    end = begin + length
    adjacent = bool((begin[1:] == end[:-1]).all()) and int(begin[0]) == 0 and int(end[-1]) == total
    if total < TILE or not adjacent:
        return None
    whole = total // TILE
    start = torch.arange(whole, device=begin.device) * TILE
    primary = torch.searchsorted(end, start, right=True)  # of equal ends the last: empty segments own nothing
    # Every (segment, tile) that overlap, but for the primary ones. The rest is the last tile that fits.
    count = torch.where(length > 0, (end - 1) // TILE - begin // TILE + 1, 0)
    segment = torch.arange(len(begin), device=begin.device).repeat_interleave(count)
    within = torch.arange(len(segment), device=begin.device) - (count.cumsum(0) - count)[segment]
    tile = begin[segment] // TILE + within
    more = (tile == whole) | (primary[tile.clamp(max=whole - 1)] != segment)
    segment, tile = segment[more], tile[more]
    owner = torch.cat((primary, segment))
    low = torch.cat((start, tile * TILE))  # where what is the entry's begins: the last tile overlaps the one before
    from_ = torch.cat((start, (tile * TILE).clamp(max=total - TILE)))
    slot = from_[:, None] + torch.arange(TILE, device=begin.device)
    inside = (slot >= low[:, None]) & (slot >= begin[owner, None]) & (slot < end[owner, None])
    return Tiles(owner, ~inside[:, None], whole, slot[whole:], _entries(owner, len(begin)))


def _entries(owner: Tensor, segments: int) -> Tensor:
    count = torch.bincount(owner, minlength=segments)
    order = owner.sort(stable=True).indices
    column = torch.arange(int(count.max()), device=owner.device)
    at = (count.cumsum(0) - count)[:, None] + column
    return order[at.clamp(max=len(order) - 1)].masked_fill_(column >= count[:, None], len(order))
