"""How slots lie in the blocks of a serving engine, whose requests were compressed where they lay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.kernels.dispatch import check


class PagedSlots(NamedTuple):
    """Slots of R rows in blocks.

    keys (L,M,H,N,D), values (L,M,H,N,Dv), log_votes (L,M,H,N) float32 or None: M blocks of N slots for each KV head, of
    the L layers whose pages are packed together, 1 where each keeps to its own. layer: that which attends. A *lane* is
    a head of a layer: there are L·H.

    table (R,blocks) int: the block of each N tokens of a row. event, end (R,) int: tokens at the latest compression, 0
    for none, and now. counts (R,L·H) int: slots of each lane right after it. first_block (R,) int: where pages begin.
    packed (R,) bool: whether pages of all lanes follow one another from there, else the slots of a lane lie in it right
    before token ``event``. Tokens since lie in their own lane, each at its own place, and have no votes.
    longest: slots of the longest lane of ``layer`` now, or a bound.
    """

    keys: Tensor
    values: Tensor
    log_votes: Tensor | None
    table: Tensor
    event: Tensor
    end: Tensor
    counts: Tensor
    first_block: Tensor
    packed: Tensor
    longest: int
    layer: int = 0

    @property
    def heads(self) -> int:
        """H."""
        return self.keys.shape[2]

    @property
    def lanes(self) -> int:
        """L·H."""
        return self.keys.shape[0] * self.keys.shape[2]

    def check(self) -> None:
        """Raise ``UnsupportedInput`` where shapes do not fit together."""
        shape, rows = self.keys.shape[:4], self.event.numel()
        check(self.keys.dim() == 5 and self.values.shape[:4] == shape, "keys and values of blocks: (L,M,H,N,D)")
        check(
            self.log_votes is None or self.log_votes.shape == shape,
            f"log_votes for slots {None if self.log_votes is None else tuple(self.log_votes.shape)}, keys for slots "
            f"{tuple(shape)}: they must be the same",
        )
        check(
            all(x.shape == (rows,) for x in (self.end, self.first_block, self.packed))
            and self.table.shape[0] == rows
            and self.counts.shape == (rows, self.lanes),
            f"table {tuple(self.table.shape)}, counts {tuple(self.counts.shape)} for {rows} rows, {self.lanes} lanes",
        )
        check(0 <= self.layer < shape[0], f"layer {self.layer} of {shape[0]}")

    def pages(self) -> Tensor:
        """(R,L·H) int64: the first page of each lane, where pages are packed; see ``places``."""
        main = self.counts.long() - self._tail()
        pages = -(-main // self.keys.shape[3])
        return pages.cumsum(-1) - pages

    def _tail(self) -> Tensor:
        """(R,L·H): of a lane's slots, the last ones, which share the block of token ``event`` with those to come."""
        return self.counts.long().minimum((self.event.long() % self.keys.shape[3])[:, None])

    def places(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Layer, block, head and offset (R,H,S) int64 of each slot of each head, oldest first; which of them there are,
        and which were compressed, bool."""
        size, own = self.keys.shape[3], slice(self.layer * self.heads, (self.layer + 1) * self.heads)
        j = torch.arange(self.longest, device=self.table.device)
        event, end, first = (x.long()[:, None, None] for x in (self.event, self.end, self.first_block))
        n, tail, page0 = (x[:, own, None] for x in (self.counts.long(), self._tail(), self.pages()))
        real, held = j < n + end - event, j < n
        main = n - tail
        place = -(-main // size) * size - main + j
        page = page0 + place // size
        mine = torch.arange(own.start, own.stop, device=j.device)[None, :, None]
        in_tail, packed = j >= main, self.packed[:, None, None]
        moved = packed & held
        straight = torch.where(held, event - n + j, event + j - n)  # the slot in the lane of its own
        logical = torch.where(moved, torch.where(in_tail, event // size, first + page // self.lanes), straight // size)
        lane = torch.where(moved & ~in_tail, page % self.lanes, mine)
        offset = torch.where(moved, torch.where(in_tail, event % size - tail + j - main, place % size), straight % size)
        logical, offset = logical.masked_fill(~real, 0), offset.masked_fill(~real, 0)
        block = self.table.long().gather(1, logical.flatten(1)).view_as(logical)
        lane = lane.masked_fill(~real, 0)
        return lane // self.heads, block, lane % self.heads, offset, real, real & held
