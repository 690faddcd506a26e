"""Residual slots: what leaves is gathered in a few slots of its own beside the exact ones (arXiv 2607.29591)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.allocate.select import ranks
from keepkv.core.options import Rate, Share, Window, one_of
from keepkv.core.slots import LayerView, Slots
from keepkv.errors import CacheStateError
from keepkv.kernels.groups import expand_groups, group_logsumexp, group_mean, group_sum
from keepkv.observe.masses import exact_dtype, log_masses, log_masses_of, recent
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.drop import Drop
from keepkv.reduce.forms import integer_votes
from keepkv.reduce.stats import merged_stats
from keepkv.score.base import Score

BIASES = ("count", "mass")


@register_reduce("residual")
@dataclass(frozen=True)
class Residual(Reduce):
    """m + r slots in each head: the m best as they are, and r for all that leaves, in the style of ResKV.

    r = ⌊``share`` · slots of the head⌋, at most its kept slots that are not protected, and at most what leaves it. The
    r kept slots of lowest score leave too, and the text order of everything that leaves is cut into r blocks of equal
    size (±1). A block becomes the slot k_r = Σw̃k, v_r = Σw̃v at the position of its last member, so that no query
    before it sees it. Heads with r = 0 evict.

    bias="count", as published: w̃ ∝ votes (1 for a token), b_r = ln Σ votes. "mass": w̃ ∝ m_i, the mean mass that the
    last ``window`` queries with weights ∝ alpha^age give each slot, and b_r such that the mean mass of the block is
    kept by the key as it was rounded to the cache dtype.
    """

    share: Share = 0.1
    bias: Annotated[str, one_of(*BIASES)] = "count"
    window: Window = 32
    alpha: Rate = 0.9

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots = view.slots
        keep = keep & slots.valid
        leaving = slots.valid & ~keep
        given_up, count = self._give_up(view, keep, leaving, scores)
        if not bool((count > 0).any()):
            return Drop()(view, keep, scores, score)
        pool = (leaving | given_up) & (count > 0)[..., None]
        block, last = cut(pool, count)
        held = (keep & ~given_up) | last
        kept = slots.select(held)
        size = kept.positions.shape[-1]
        # The column that each held slot has in `kept`, whose empty slots come first, and that of each block.
        column = held.cumsum(-1) - 1 + size - held.sum(-1, keepdim=True)
        into = column.new_full((*count.shape, size + 1), size)
        into.scatter_(2, torch.where(last, block, size), torch.where(last, column, size))
        group = torch.where(pool, into.gather(2, block), size)
        changes = group_sum(pool.to(torch.int32), group, size) > 0
        keys, values, bias = self._merge(view, group, kept)
        log_votes = kept.log_votes.to(exact_dtype(kept.keys))  # the engine keeps biases in float32
        result = Slots(
            torch.where(changes[..., None], keys.to(kept.keys.dtype), kept.keys),
            torch.where(changes[..., None], values.to(kept.values.dtype), kept.values),
            torch.where(changes, bias.to(log_votes.dtype), log_votes),
            kept.positions,
            merged_stats(score, slots, kept, group, changes),
        )
        lost = leaving & ~pool
        return Reduced(result, (leaving & pool).sum(-1), lost.sum(-1), lost)

    def _give_up(self, view: LayerView, keep: Tensor, leaving: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Kept slots (B,H,S) that make room for residual ones, and how many in each head (B,H)."""
        may = keep if view.protected is None else keep & ~view.protected
        count = (self.share * keep.sum(-1).double() + 1e-9).floor().long()  # 0.29 * 100 is 28.999…
        count = count.minimum(may.sum(-1)).minimum(leaving.sum(-1))
        rank = ranks(scores, may.to(torch.int8))
        return may & (rank >= (may.sum(-1) - count)[..., None]), count

    def _merge(self, view: LayerView, group: Tensor, kept: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B,H,K,D), values (B,H,K,Dv) and biases (B,H,K) of the groups of slots that enter one of ``kept``."""
        slots, size = view.slots, kept.positions.shape[-1]
        dtype = exact_dtype(slots.keys)
        past, mass = None, slots.log_votes.to(dtype)
        if self.bias == "mass":
            past = recent(view, self.window, self.alpha)
            if bool(((group < size).flatten(1).any(-1) & past.empty).any()):
                raise CacheStateError("residual slots: a row has slots to gather but none of its queries is known")
            mass, log_z = log_masses(view, past)
        total = group_logsumexp(mass, group, size)
        weights = (mass - expand_groups(total.masked_fill(total.isneginf(), 0.0), group)).exp() * (group < size)
        keys = group_mean(slots.keys, weights, group, size)
        values = group_mean(slots.values, weights, group, size)
        votes = integer_votes(slots.log_votes, group, size).to(dtype)
        if past is None:
            return keys, values, votes
        bias = total - log_masses_of(view, past, log_z, keys.to(slots.keys.dtype), kept.positions)
        return keys, values, torch.where(bias.isfinite(), bias, votes)


def cut(pool: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of ``pool`` (B,H,S) bool in ``count`` (B,H) runs whose sizes differ by one at most, in their order.

    Returns the run of each slot (B,H,S) int64, 0 outside of the pool, and whether it is the last of its run.
    """
    number, total = pool.cumsum(-1) - 1, pool.sum(-1, keepdim=True).clamp(min=1)
    run = (number * count[..., None]).div(total, rounding_mode="floor")
    after = ((number + 1) * count[..., None]).div(total, rounding_mode="floor")
    return run.masked_fill(~pool, 0), pool & (after > run)
