"""Where kept slots lie: logical block, lane and offset of each, from the plan and the counts alone. Knows no vLLM.

A block of a block table has N lanes of ``block`` slots: one for each KV head of a layer, or, where budgets roam over
layers, one for each head of each layer, layer after layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Logical block, lane and offset of slots, each (N,S) int64, and which of them exist, (N,S) bool."""

    block: Tensor
    lane: Tensor
    offset: Tensor
    real: Tensor

    def of(self, lanes: slice) -> Places:
        """Those of some heads, as wide as the fullest of these."""
        size = int(self.real[lanes].sum(-1).max())
        return Places(*(x[lanes, x.shape[1] - size :] for x in self))


def equal_places(counts: Tensor, event: int, block: int) -> Places:
    """Heads with slots of their own lane right before slot ``event``: counts (N,) int64, S = the largest of them."""
    size = int(counts.max())
    j = torch.arange(size, device=counts.device)
    at = (event - size + j).expand(len(counts), -1)
    lane = torch.arange(len(counts), device=counts.device)[:, None].expand_as(at)
    return Places(at // block, lane, at % block, j >= size - counts[:, None])


def packed_places(counts: Tensor, event: int, first_block: int, block: int) -> Places:
    """Heads whose pages are handed out one after another from block ``first_block`` on, lane after lane: counts (N,)
    int64, S = the largest of them, empty places first.

    The last ``event % block`` slots of a head stay in its own lane of the block that tokens to come are written to.
    Raises ``AssertionError`` where pages would reach that block: the plan's arithmetic rules it out.
    """
    size, lanes = int(counts.max()), len(counts)
    j = torch.arange(size, device=counts.device) - (size - counts[:, None])  # (N,S): ordinal in its head, < 0: empty
    tail = counts.clamp(max=event % block)[:, None]
    main = counts[:, None] - tail
    pages = -(-main // block)
    first = pages.cumsum(0) - pages
    place = pages * block - main + j  # right-aligned: what is free of a head's pages is at their front
    page = first + place // block
    in_tail = j >= main
    own = torch.arange(lanes, device=counts.device)[:, None]
    at = torch.where(in_tail, event // block, first_block + page // lanes)
    lane = torch.where(in_tail, own, page % lanes)
    offset = torch.where(in_tail, event % block - tail + j - main, place % block)
    real = j >= 0
    overflow = real & ~in_tail & (at >= event // block)
    assert not bool(overflow.any()), f"pages of {counts.tolist()} slots reach the block of token {event}"
    return Places(at.clamp(min=0), lane, offset.clamp(min=0), real)


def recent_places(begin: int, end: int, lanes: int, block: int, device: torch.device | None = None) -> Places:
    """Tokens ``begin`` to ``end``, each in its own slot of every lane."""
    at = torch.arange(begin, end, device=device).expand(lanes, -1)
    lane = torch.arange(lanes, device=device)[:, None].expand_as(at)
    return Places(at // block, lane, at % block, torch.ones_like(at, dtype=torch.bool))
