"""SelKV: what leaves enters the kept slot of its block that it attended to, as far as their values agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from keepkv.core.options import Share, Window
from keepkv.core.pick import pick
from keepkv.core.slots import LayerView
from keepkv.errors import CacheStateError
from keepkv.kernels.groups import group_mean, group_sum
from keepkv.observe.masses import exact_dtype, log_masses, recent
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.blend import outcome, targets
from keepkv.reduce.drop import Drop
from keepkv.reduce.forms import groups
from keepkv.score.base import Score
from keepkv.score.queries.block_mates import STAT, mates


@register_reduce("selkv")
@dataclass(frozen=True)
class SelKV(Reduce):
    """Slot j enters the kept, unprotected slot i of its block of 32 tokens that it attended to most (arXiv 2607.16213):

        g_j = max(cos(v_j, v_i), 0)                       A = a_i + Σ_j g_j·a_j
        v_i ← (a_i·v_i + Σ_j g_j·a_j·v_j) / A             b_i ← b_i + strength·ln(A / a_i)

    a: mean attention of the last ``window`` queries. Keys and statistics stay. What j attended to when it was read is
    the statistic of ``BlockMates``: four tokens, of which i is the first that is kept. A slot of which none is, or
    whose g is 0, is dropped. strength: 0.5 in the paper; 1 keeps the mass of what entered, 0 none of it.
    """

    strength: Share = 0.5
    window: Window = 32

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots, size = view.slots, view.slots.positions.shape[-1]
        if STAT not in slots.stats:
            raise CacheStateError(
                "selkv merges by what tokens attended to, and this score does not note it: wrap the score in "
                "BlockMates, or use the method 'selkv'"
            )
        keep = keep & slots.valid
        into = self._mate(view, targets(view, keep)).masked_fill(keep | ~slots.valid, size)
        if not bool((into < size).any()):
            return Drop()(view, keep, scores, score)
        values = slots.values.to(exact_dtype(slots.values))
        at = into.clamp(max=size - 1)
        gate = cosine_similarity(values, pick(values, at), dim=-1).clamp(min=0.0)
        mass = log_masses(view, recent(view, self.window, alpha=1.0))[0]
        into = into.where((gate > 0) & mass.gather(2, at).isfinite(), size)
        takes = group_sum((into < size).to(torch.int32), into, size) > 0
        whole = torch.arange(size, device=into.device).expand_as(into).where(takes, into)
        g = groups(torch.where(into < size, mass + gate.log(), mass), slots.log_votes, whole, size)
        merged = group_mean(slots.values, g.weights, whole, size).to(slots.values.dtype)
        grown = self.strength * torch.where(takes, g.log_mass - mass, 0.0)
        changed = slots.with_(
            values=torch.where(takes[..., None], merged, slots.values),
            log_votes=slots.log_votes + grown.to(slots.log_votes.dtype),
        )
        return outcome(changed, keep, into)

    def _mate(self, view: LayerView, free: Tensor) -> Tensor:
        """(B,H,S) int64: the column of the first mate of each slot that is ``free`` (B,H,S) bool, S for none."""
        positions, size = view.slots.positions.long(), free.shape[-1]
        column = torch.arange(size, device=free.device).expand_as(positions)
        length = int(positions.max()) + 2
        where = positions.new_full((*positions.shape[:2], length), size)  # by position; what is not free goes last
        where = where.scatter(2, positions.where(free, length - 1), column)[..., :-1]
        found = torch.full_like(positions, size)
        for far in mates(view.slots.stats[STAT]):
            at = where.gather(2, (positions - far).clamp(min=0))
            found = at.where((found == size) & (far > 0), found)
        return found
