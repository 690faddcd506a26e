"""One token's attention over ragged slots in plain torch, on any device: the buffer is read once, where it lies.

It is cut into tiles of one length whatever segments they belong to, so that one batched product serves all heads. A
tile is computed for the segment that its first slot belongs to; where further segments reach into it, the tile is
copied for each of them: at most one per segment, and a few for the rest behind the last whole tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from keepkv.kernels.layout import Layout

TILE = 64  # slots


@dataclass(frozen=True)
class Tiles:
    """Work of one token: each entry is a tile of ``TILE`` slots, seen by the segment that owns it.

    owner (E,): segment, row · H + head. outside (E,1,TILE) bool: slots of the tile that are not the owner's. The first
    ``whole`` entries are the tiles of the buffer in order; extra (E − whole, TILE): slots of the others.
    """

    owner: Tensor
    outside: Tensor
    whole: int
    extra: Tensor

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
    return Tiles(owner, ~inside[:, None], whole, slot[whole:])


def decode_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_votes: Tensor | None,
    space: Layout,
    work: Tiles,
    scaling: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B,Hq,Dv) and log-sum-exp (B,Hq), as ``decode`` gives them, both float32 (float64 for float64).

    query (B,Hq,D); keys (N,D), values (N,Dv), log_votes (N,) float32 or None, none of them empty, in segments ``space``
    that follow one another; work: ``tiles`` of them.
    """
    b, heads, d = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    pairs, owner = b * space.heads, work.owner
    grouped = (query.to(wide) * scaling).view(pairs, -1, d)[owner]  # (E,G,D)
    parts = [x.to(wide) for x in work.of(keys)]
    split = grouped.split((work.whole, len(owner) - work.whole))
    u = torch.cat([torch.bmm(q, x.transpose(1, 2)) for q, x in zip(split, parts, strict=True)])  # (E,G,TILE)
    if softcap is not None:
        u = torch.tanh(u / softcap) * softcap
    if log_votes is not None:
        u += torch.cat(work.of(log_votes))[:, None]
    u.masked_fill_(work.outside, float("-inf"))
    index = owner[:, None].expand(-1, u.shape[1])
    top = u.new_full((pairs, u.shape[1]), float("-inf")).scatter_reduce_(0, index, u.amax(-1), "amax")
    shift = top.masked_fill(top.isneginf(), 0.0)  # of all empty: −inf − −inf would be NaN
    share = u.sub_(shift[owner, :, None]).exp_()
    total = u.new_zeros(top.shape).index_add_(0, owner, share.sum(-1))
    parts = [x.to(wide) for x in work.of(values)]
    split = share.split((work.whole, len(owner) - work.whole))
    means = torch.cat([torch.bmm(w, x) for w, x in zip(split, parts, strict=True)])  # (E,G,Dv)
    out = means.new_zeros(pairs, *means.shape[1:]).index_add_(0, owner, means)
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    return out.view(b, heads, -1), (shift + total.log()).view(b, heads)
