"""CaM: what leaves adds a share of its value to the kept slots after it (Cache Merging, ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Count, Size, Window
from keepkv.core.slots import LayerView
from keepkv.kernels.assign.reference import padded_indices
from keepkv.observe.draw import uniform
from keepkv.observe.masses import exact_dtype, log_masses, recent
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.drop import Drop
from keepkv.score.base import Score

_TILE = 2**24  # elements of one tile of the (leaving × kept) window matrix
_DRAW = 0x43614D  # keeps the draws independent of the score "random", which hashes the same positions


@register_reduce("cam")
@dataclass(frozen=True)
class CaM(Reduce):
    """Slot i leaves: with probability clamp(A_i / mean A of its targets, 0, 1) each target j gets v_j += v_i / m.

    Targets are the ``span`` kept, unprotected slots that follow i in the same head, m ≤ span where fewer follow; A is
    the mean attention of the last ``window`` queries, averaged over the query heads of the slot. Keys of what leaves
    are gone and no votes are kept: CaM restores no mass. The draw is a hash of (seed, layer, head, position).

    The published algorithm evicts one token per step, so a slot receives at most one value's worth (``span`` shares
    of 1/span) before it leaves the span itself. Evicting a whole prompt at once would give a slot thousands of
    shares and values grow without limit. Two bounds: only the ``limit`` leaving slots of largest score in each head
    may merge (as NVIDIA kvpress does, which takes as many as were decoded since the last compression; 512 is its
    interval), later ones first among equals; and the shares of a slot are scaled down to a sum of 1.
    """

    span: Size = 32
    limit: Count | None = 512
    window: Window = 32

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots = view.slots
        keep = keep & slots.valid
        leaving = slots.valid & ~keep
        targets = keep if view.protected is None else keep & ~view.protected
        source, real = padded_indices(self._candidates(leaving, scores))
        to, real_to = padded_indices(targets)
        if source.shape[-1] == 0 or to.shape[-1] == 0:
            return Drop()(view, keep, scores, score)
        # exp, so that windows are plain means; a mass that underflows has nothing to give.
        attention = log_masses(view, recent(view, self.window, alpha=1.0))[0].exp()
        first = targets.cumsum(-1).gather(2, source)  # column in `to` of the first target after a leaving slot
        draw = uniform(view, _DRAW).gather(2, source)
        masses = attention.gather(2, to) * real_to
        mine = attention.gather(2, source)
        dtype = exact_dtype(slots.values)
        b, h, k = to.shape
        shares = torch.zeros(b, h, k, dtype=dtype, device=to.device)
        added = torch.zeros(b, h, k, slots.values.shape[-1], dtype=dtype, device=to.device)
        merges = torch.zeros_like(real)
        column = torch.arange(k, device=to.device)
        tile = max(1, _TILE // (b * h * k))
        for start in range(0, source.shape[-1], tile):
            part = slice(start, start + tile)
            begin = first[..., part, None]
            inside = ((column >= begin) & (column < begin + self.span) & real_to[:, :, None]).to(dtype)
            count = inside.sum(-1)
            mean = (inside @ masses[..., None].to(dtype)).squeeze(-1) / count.clamp(min=1)
            wins = real[..., part] & (count > 0) & (draw[..., part] * mean < mine[..., part])
            merges[..., part] = wins
            share = inside * (wins / count.clamp(min=1))[..., None]  # (B,H,n,K)
            index = source[..., part, None].expand(-1, -1, -1, added.shape[-1])
            added += share.transpose(-1, -2) @ slots.values.gather(2, index).to(dtype)
            shares += share.sum(2)
        touched = (shares > 0) & real_to
        wide = to[..., None].expand_as(added)
        own = slots.values.gather(2, wide)
        mixed = own.to(dtype) + added / shares.clamp(min=1)[..., None]
        # Padding of `to` names slots that are no targets: they write back what is there.
        values = slots.values.scatter(2, wide, torch.where(touched[..., None], mixed.to(own.dtype), own))
        merged = torch.zeros_like(leaving).scatter(2, source, merges)
        merged &= leaving
        lost = leaving & ~merged
        return Reduced(slots.with_(values=values).select(keep), merged.sum(-1), lost.sum(-1), lost)

    def _candidates(self, leaving: Tensor, scores: Tensor) -> Tensor:
        """(B,H,S) bool: the leaving slots that may merge."""
        if self.limit is None or self.limit >= leaving.shape[-1]:
            return leaving
        # Flipped, so that the stable sort puts later slots first among equal scores.
        ranked = scores.masked_fill(~leaving, float("-inf")).flip(-1).sort(dim=-1, descending=True, stable=True).indices
        top = leaving.shape[-1] - 1 - ranked[..., : self.limit]
        return torch.zeros_like(leaving).scatter(2, top, True) & leaving
