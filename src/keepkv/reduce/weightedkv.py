"""WeightedKV: keys that leave are gone, their values go to the next kept slot (arXiv 2503.01330)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.kernels.groups import expand_groups, group_sum
from keepkv.observe.masses import exact_dtype
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.blend import blended, following, outcome, targets
from keepkv.reduce.drop import Drop
from keepkv.score.base import Score


@register_reduce("weightedkv")
@dataclass(frozen=True)
class WeightedKV(Reduce):
    """The value of a leaving slot enters the next kept, unprotected slot c of its head, weighted by the scores s ≥ 0:

        v_c ← (s_c·v_c + Σ_e s_e·v_e) / (s_c + Σ_e s_e)

    Keys stay where they are, without votes or statistics of what entered. The paper's s is the mean attention of the
    queries that saw a slot, and one slot leaves at a time, into its right neighbour, which may leave next. Here all
    leave at once with the weights that they have, so that the order does not matter. Slots behind the last one that may
    take something are dropped.
    """

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots = view.slots
        keep = keep & slots.valid
        size = slots.positions.shape[-1]
        group = following(targets(view, keep)).where(slots.valid & ~keep, size)
        if not bool((group < size).any()):
            return Drop()(view, keep, scores, score)
        weights = scores.to(exact_dtype(slots.values)).clamp(min=0.0)
        total = group_sum(weights, group, size) + weights
        own = torch.where(total > 0, weights / total, 1.0)
        total = expand_groups(total, group)
        shares = torch.where(total > 0, weights / total, 0.0)
        return outcome(slots.with_(values=blended(slots.values, group, shares, own)), keep, group)
