"""LOOK-M: what leaves is averaged into its nearest kept key (arXiv 2406.18139)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import one_of
from keepkv.core.slots import LayerView
from keepkv.core.tokens import KIND, TEXT
from keepkv.kernels.assign import nearest_key
from keepkv.kernels.groups import expand_groups, group_sum
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.blend import blended, outcome, targets
from keepkv.reduce.drop import Drop
from keepkv.score.base import Score

FORMS = ("pivot", "average", "weighted")


@register_reduce("look-m")
@dataclass(frozen=True)
class LookM(Reduce):
    """Slot e enters the kept, unprotected slot c of largest key cosine u_e in its head. With n arrivals at c:

        average    x_c ← (x_c + Σ x_e) / (n + 1)
        pivot      x_c ← (x_c + Σ (x_e + x_c)/2) / (n + 1)
        weighted   x_c ← (x_c + Σ u_e·x_e) / (n + 1)

    for keys and values alike. within: "modality": vision enters vision and text enters text; where a slot has nowhere
    to go it is dropped. In the paper evicted vision enters text too, by which it collapses at small budgets
    (EffiVLM-Bench, arXiv 2506.00479). No votes: the merged slot draws attention as one slot, so its statistics stay its
    own. Every leaving slot merges, as in the paper; of its released code, the weighted form merges only those whose
    cosine is at least the mean.
    """

    merge: Annotated[str, one_of(*FORMS)] = "pivot"
    within: Annotated[str, one_of("all", "modality")] = "all"

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots = view.slots
        keep = keep & slots.valid
        into, u = self._nearest(view, slots.valid & ~keep, targets(view, keep))
        if not bool((into >= 0).any()):
            return Drop()(view, keep, scores, score)
        size = slots.positions.shape[-1]
        group = torch.where(into >= 0, into, size)
        weights = u if self.merge == "weighted" else torch.full_like(u, 0.5 if self.merge == "pivot" else 1.0)
        arrivals = group_sum((group < size).to(u.dtype), group, size)
        own = (1 + arrivals / 2 if self.merge == "pivot" else torch.ones_like(arrivals)) / (arrivals + 1)
        shares = weights.masked_fill(group == size, 0.0) / expand_groups(arrivals + 1, group, fill=1.0)
        keys, values = (blended(x, group, shares, own) for x in (slots.keys, slots.values))
        return outcome(slots.with_(keys=keys, values=values), keep, group)

    def _nearest(self, view: LayerView, leaving: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """The slot that each of ``leaving`` (B,H,S) enters, −1 for none, of those that are ``free`` (B,H,S), and its
        cosine."""
        keys = view.slots.keys
        if self.within == "all" or view.tokens is None:
            return nearest_key(keys, leaving, free)
        seen = view.tokens.of(view.slots.positions)[..., KIND] != TEXT
        into, u = nearest_key(keys, leaving & seen, free & seen)
        other, v = nearest_key(keys, leaving & ~seen, free & ~seen)
        return into.where(seen, other), u.where(seen, v)
