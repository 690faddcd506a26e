"""How slots lie in memory: as a rectangle, or as segments of one buffer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from keepkv.core.pick import pick
from keepkv.kernels.dispatch import check

TILE = 64  # slots of one of the ``Tiles``


@dataclass(frozen=True)
class Segments:
    """Where the slots of each (row, head) lie in tensors (B,H,S,…), or in ragged ones (N,…).

    rows B, heads H; longest: slots of the longest (row, head), or a bound; total: slots of all, or a bound.
    first, lengths (B,H) int64 or None: the first slot, counted from the start of the row and head (of the buffer where
    ``ragged``), and the number of slots; None: every column of the rectangle. apart: a key or value is not finite, so
    that no product may cover slots of another row with weight 0.
    """

    rows: int
    heads: int
    longest: int
    total: int
    ragged: bool
    first: Tensor | None = None
    lengths: Tensor | None = None
    apart: bool = False

    @cached_property
    def tiles(self) -> Tiles | None:
        """How ``decode_in_tiles`` reads the segments; None where it cannot."""
        if self.apart or self.first is None or self.lengths is None:
            return None
        return _cut(self.first, self.lengths, self.total)

    def index(self, start: int = 0, stop: int | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Where the slots of each (row, head) lie, (B,H,longest) int64, and which of these exist, bool.

        From the ``start``-th slot to before the ``stop``-th. None, None for a rectangle of which every column counts.
        """
        if self.first is None or self.lengths is None:
            return None, None
        columns = torch.arange(start, min(self.longest, stop or self.longest), device=self.first.device)
        inside = columns < self.lengths[..., None]
        return (self.first[..., None] + columns).masked_fill(~inside, 0), inside

    def take(self, x: Tensor, index: Tensor | None, inside: Tensor | None) -> Tensor:
        """``x`` as a rectangle (B,H,longest,…), zero where no slot is; index, inside as ``index`` returns them."""
        if index is None or inside is None:
            return x
        if self.ragged:
            taken = x[index] if x.shape[0] else x.new_zeros(*index.shape, *x.shape[1:])
        else:
            taken = pick(x, index)
        return taken.masked_fill_(~(inside if taken.dim() == 3 else inside[..., None]), 0)

    def empty_per_query(self, keys: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """A tensor to be filled with one number per query head and slot: (B,H,G,S), or (G,N) for ragged slots.

        Zero where a column may belong to no (row, head), since nobody writes there.
        """
        shape = (groups, keys.shape[0]) if self.ragged else (*keys.shape[:2], groups, keys.shape[2])
        return (torch.empty if self.first is None else torch.zeros)(shape, dtype=dtype, device=keys.device)

    def to_layout(self, scores: Tensor, keys: Tensor, index: Tensor | None, inside: Tensor | None) -> Tensor:
        """``scores`` (B,H,G,longest) of the slots at ``index``, placed as in ``empty_per_query``."""
        if index is None or inside is None:
            return scores
        out = self.empty_per_query(keys, scores.shape[2], scores.dtype)
        if self.ragged:
            out[:, index[inside]] = scores.movedim(2, 0)[:, inside]
            return out
        # What lies outside of a segment has score 0 and points at column 0: it adds nothing.
        return out.scatter_add_(3, index[:, :, None].expand_as(scores), scores)

    def strides(self, x: Tensor | None) -> tuple[int, int, int]:
        """Elements of ``x`` from row to row, from head to head, and along its next dimension; zeros for None.

        That dimension is the slots' in tensors (B,H,S,…) and (N,…), the query heads' in those of ``empty_per_query``.
        """
        if x is None:
            return 0, 0, 0
        return (0, 0, x.stride(0)) if self.ragged else (x.stride(0), x.stride(1), x.stride(2))


def segments_of(
    keys: Tensor, offsets: Tensor | None = None, lengths: Tensor | None = None, longest: int | None = None
) -> Segments:
    """Where the slots of ``keys`` lie, a rectangle (B,H,S,D) or one buffer (N,D).

    offsets (B,H) int: given for a buffer, with ``lengths``: the first slot of each (row, head), which needs not be the
    end of the one before. lengths (B,H) int alone: of each (row, head) the last ``lengths`` columns of the rectangle
    hold slots, those before are empty. longest: the largest of ``lengths``; where it is not given it is read from the
    device. Raises ``UnsupportedInput`` where these do not fit together.
    """
    check(
        keys.dim() == (4 if offsets is None else 2),
        f"slots of shape {tuple(keys.shape)} {'without' if offsets is None else 'with'} offsets: give a rectangle "
        "(rows, heads, slots, …), or one buffer (slots, …) with offsets and lengths (rows, heads)",
    )
    if lengths is not None and longest is None:
        longest = int(lengths.max()) if lengths.numel() else 0
    if offsets is None:
        b, h, s = keys.shape[:3]
        if lengths is None:
            return Segments(b, h, s, b * h * s, False)
        check(lengths.shape == (b, h), f"lengths {tuple(lengths.shape)} for slots of {b} rows and {h} heads")
        assert longest is not None
        return Segments(b, h, longest, b * h * s, False, (s - lengths).long().contiguous(), lengths.long().contiguous())
    check(
        lengths is not None and lengths.shape == offsets.shape and offsets.dim() == 2,
        f"offsets {tuple(offsets.shape)} need lengths of the same shape (rows, heads), not "
        f"{None if lengths is None else tuple(lengths.shape)}",
    )
    assert lengths is not None and longest is not None
    b, h = offsets.shape
    return Segments(b, h, longest, len(keys), True, offsets.long().contiguous(), lengths.long().contiguous())


@dataclass(frozen=True)
class Tiles:
    """A ragged buffer cut into tiles of ``TILE`` slots, so that one batched product serves segments of any length.

    Each entry e of E is a tile together with the one segment that it is read for. The first ``whole`` entries are the
    tiles of the buffer in order, each for the segment that its first slot belongs to. Where further segments reach into
    a tile, it is copied for each of them: at most once a segment, and a few times for the rest behind the last tile.

    owner (E,): the segment, row · H + head. outside (E,1,TILE) bool: slots of the tile that are not the owner's.
    extra (E − whole, TILE): slots of the copied tiles.
    """

    owner: Tensor
    outside: Tensor
    whole: int
    extra: Tensor

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (N,…) as tiles (whole,TILE,…), a view, and those that are copied (E − whole,TILE,…)."""
        return x[: self.whole * TILE].unflatten(0, (self.whole, TILE)), x[self.extra]


def _cut(first: Tensor, lengths: Tensor, total: int) -> Tiles | None:
    """Tiles of ``total`` slots in segments (B,H), as in ``Segments``; reads the device once.

    None where the slots are too few for one tile, or some belong to no segment.
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
    low = torch.cat((start, tile * TILE))  # where the entry's own slots begin: the last tile overlaps the one before
    from_ = torch.cat((start, (tile * TILE).clamp(max=total - TILE)))
    slot = from_[:, None] + torch.arange(TILE, device=begin.device)
    inside = (slot >= low[:, None]) & (slot >= begin[owner, None]) & (slot < end[owner, None])
    return Tiles(owner, ~inside[:, None], whole, slot[whole:])
