"""KVSlimmer: what leaves enters its neighbour, keys weighted by the curvature of the output (arXiv 2603.00907)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Window
from keepkv.core.slots import LayerView
from keepkv.kernels.groups import expand_groups, group_mean, group_sum
from keepkv.observe.masses import exact_dtype, log_masses, recent
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.blend import following, outcome, targets
from keepkv.reduce.drop import Drop
from keepkv.reduce.forms import integer_votes
from keepkv.reduce.stats import merged_stats
from keepkv.score.base import Score


@register_reduce("kvslimmer")
@dataclass(frozen=True)
class KVSlimmer(Reduce):
    """A run 𝒢, a kept, unprotected slot c and what leaves before it, becomes one slot in the place of c:

        h_jj = α_j(1 − 2α_j)·d_j    h_ij = −α_iα_j(d_i + d_j)    d = ‖v − ō‖₁    ō = Σα·v over all slots
        w_j = max(Σ_i h_ij, 0) = α_j·max((1 − Σα)·d_j − Σα·d, 0)          sums over 𝒢
        k_c ← Σw·k / Σw      v_c ← Σp·v / Σp      bias ln Σp              p: votes, 1 for a token

    h is how large the second derivatives of the output by the logits of i and j are, α the mean attention of the last
    ``window`` queries; where no w is cut off at 0, k_c is where Σ_ij h_ij·(k − k_i)·(k − k_j) is least. For a pair w
    are the paper's A = h_11 − |h_12| and B = h_22 − |h_12|. Keys turn to the rotary place of c first, where
    ``view.rope`` says how. The value is the published sum V = Σp·v in other words: e^ℓ·V over a normaliser that counts
    Σp·e^ℓ is their mean with this bias.

    Where no w is above 0, keys are weighted by votes. What leaves behind the last slot that may take something enters
    that one; where there is none it is dropped.
    """

    window: Window = 32

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots, size = view.slots, view.slots.positions.shape[-1]
        keep = keep & slots.valid
        free = targets(view, keep)
        column = torch.arange(size, device=keep.device).expand_as(keep)
        last = column.where(free, -1).amax(-1, keepdim=True)
        group = torch.minimum(following(free), last).where(slots.valid & ~keep & (last >= 0), size)
        if not bool((group < size).any()):
            return Drop()(view, keep, scores, score)
        whole = column.where(free, group)  # a kept slot is part of its run
        changes = group_sum((group < size).to(torch.int32), group, size) > 0
        log_votes = integer_votes(slots.log_votes, whole, size)
        votes = (slots.log_votes - expand_groups(log_votes, whole)).exp().to(exact_dtype(slots.keys))
        keys = group_mean(self._moved(view, group), self._weights(view, whole, votes), whole, size)
        values = group_mean(slots.values, votes, whole, size)
        changed = slots.with_(
            keys=torch.where(changes[..., None], keys.to(slots.keys.dtype), slots.keys),
            values=torch.where(changes[..., None], values.to(slots.values.dtype), slots.values),
            log_votes=torch.where(changes, log_votes, slots.log_votes),
            stats=merged_stats(score, slots, slots, whole, changes),
        )
        return outcome(changed, keep, group)

    def _weights(self, view: LayerView, whole: Tensor, votes: Tensor) -> Tensor:
        """w (B,H,S), summing to 1 over each run of ``whole`` (B,H,S); votes (B,H,S): where no w is above 0."""
        size = whole.shape[-1]
        mass = log_masses(view, recent(view, self.window, alpha=1.0))[0].exp()
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
        values = view.slots.values.to(mass.dtype)
        apart = torch.cdist(values, (mass[:, :, None] @ values), p=1)[..., 0]
        held, spread = (expand_groups(group_sum(x, whole, size), whole) for x in (mass, mass * apart))
        weights = mass * ((1 - held) * apart - spread).clamp(min=0.0)
        total = expand_groups(group_sum(weights, whole, size), whole)
        return torch.where(total > 0, weights / total, votes)

    def _moved(self, view: LayerView, group: Tensor) -> Tensor:
        """Keys (B,H,S,D) as they would be in the place of the slot that they enter, in float32 at least."""
        keys = view.slots.keys.to(exact_dtype(view.slots.keys))
        if view.rope is None:
            return keys
        places, goes = view.key_places(), group < group.shape[-1]
        index = group.where(goes, 0)
        index = index if places.dim() == 3 else index[..., None].expand_as(places)
        by = places.gather(2, index) - places
        return view.rope.turn(keys, by.where(goes if places.dim() == 3 else goes[..., None], torch.zeros_like(by)))
