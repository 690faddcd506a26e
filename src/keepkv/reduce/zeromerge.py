"""ZeroMerge: a few residual slots of each head take in what leaves, and count it (arXiv 2503.10714)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.select import ranks
from keepkv.core.options import Size
from keepkv.core.pick import pick
from keepkv.core.slots import LayerView
from keepkv.kernels.assign.reference import padded_indices
from keepkv.kernels.groups import expand_groups, group_mean, group_sum
from keepkv.observe.masses import exact_dtype
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.blend import outcome, targets
from keepkv.reduce.drop import Drop
from keepkv.reduce.forms import integer_votes
from keepkv.reduce.residual import cut
from keepkv.reduce.stats import merged_stats
from keepkv.score.base import Score


@register_reduce("zeromerge")
@dataclass(frozen=True)
class ZeroMerge(Reduce):
    """``residual`` slots of each head are means of all that left: k_r = Σp·k/P, v_r = Σp·v/P, bias ln P, P = Σp.

    At the first compression, what leaves is cut into as many runs of equal size (±1), in the order of the text, and
    each becomes a residual slot at the position of its last member. Later, what leaves enters the residual slot of
    largest q·k, k its own key; all at once, where the paper merges one slot a step. Residual slots are those with more
    than one vote; they never leave while the head has a slot that is not protected for them. The kept slots of lowest
    score make room for them.
    """

    residual: Size = 1

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots, size = view.slots, view.slots.positions.shape[-1]
        keep = keep & slots.valid
        free = targets(view, keep)
        room = free.sum(-1)
        old = targets(view, slots.valid) & (slots.log_votes > 0.5)
        old &= old.cumsum(-1) <= room[..., None]
        leaving = slots.valid & ~keep & ~old
        fresh = torch.where(old.any(-1), 0, room.clamp(max=self.residual).minimum(leaving.sum(-1)))
        left = room - old.sum(-1) - fresh
        given_up = free & ~old & (ranks(scores, (free & ~old).to(torch.int8)) >= left[..., None])
        pool = (leaving | given_up) & (old.any(-1) | (fresh > 0))[..., None]
        if not bool(pool.any()):
            return Drop()(view, keep, scores, score)
        run, last = cut(pool & (fresh > 0)[..., None], fresh)
        ends, _ = padded_indices(last)
        group = torch.where(pool & (fresh > 0)[..., None], _at(ends, run), self._nearest(view, pool, old))
        keep = (keep & ~given_up) | old | last
        column = torch.arange(size, device=keep.device).expand_as(keep)
        whole = column.where(old, group)  # a residual slot is part of itself
        changes = group_sum((group < size).to(torch.int32), group, size) > 0
        log_votes = integer_votes(slots.log_votes, whole, size)
        shares = (slots.log_votes - expand_groups(log_votes, whole)).exp().to(exact_dtype(slots.keys))

        def mean(x: Tensor) -> Tensor:
            return torch.where(changes[..., None], group_mean(x, shares, whole, size).to(x.dtype), x)

        changed = slots.with_(
            keys=mean(slots.keys),
            values=mean(slots.values),
            log_votes=torch.where(changes, log_votes, slots.log_votes),
            stats=merged_stats(score, slots, slots, whole, changes),
        )
        return outcome(changed, keep, group)

    def _nearest(self, view: LayerView, pool: Tensor, old: Tensor) -> Tensor:
        """(B,H,S) int64: the residual slot ``old`` of largest dot product with each slot of ``pool``, S for none."""
        index, real = padded_indices(old)
        if not index.shape[-1]:
            return torch.full_like(pool, pool.shape[-1], dtype=torch.int64)
        keys = view.slots.keys.to(exact_dtype(view.slots.keys))
        dots = keys @ pick(keys, index).mT  # (B,H,S,residual)
        best = dots.masked_fill(~real[:, :, None], float("-inf")).argmax(-1)
        return index.gather(2, best).where(pool & old.any(-1, keepdim=True), pool.shape[-1])


def _at(index: Tensor, which: Tensor) -> Tensor:
    """``index`` (B,H,N) at ``which`` (B,H,S); 0 where N is 0."""
    return index.gather(2, which) if index.shape[-1] else torch.zeros_like(which)
