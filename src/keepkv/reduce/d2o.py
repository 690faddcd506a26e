"""D2O: merge what leaves into its nearest kept key where it is similar enough, weighted by similarity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Share, one_of
from keepkv.core.slots import LayerView
from keepkv.kernels.assign import nearest_key
from keepkv.kernels.groups import expand_groups, group_sum
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.blend import blended, outcome, targets
from keepkv.reduce.drop import Drop
from keepkv.score.base import Score

STATE = "d2o_threshold"  # view.state: τ (B,H) float, NaN for a head that has not compressed yet


@register_reduce("d2o")
@dataclass(frozen=True)
class D2O(Reduce):
    """Slot e enters the kept, unprotected slot c of largest key cosine u_e if u_e ≥ τ (arXiv 2406.13035).

    τ = mean of u over the leaving slots of the head at the first compression, τ ← beta·τ + (1−beta)·mean u at each
    later one (beta = 0.5 in the released code). It belongs to a row and head and lives in
    ``view.state["d2o_threshold"]`` (B,H).

    Keys and values: weights="paper": w_e = e^{u_e} / (Σ e^u + e), w_c = e / (Σ e^u + e), e = exp(1) being the
    anchor's similarity to itself. weights="code": x_c ← (x_c + Σ u_e x_e) / (number of arrivals + 1), as the released
    code does. No votes: the merged slot draws attention as one slot, so its statistics stay the anchor's.
    """

    weights: Annotated[str, one_of("paper", "code")] = "paper"
    beta: Share = 0.5

    merges: ClassVar[bool] = True
    row_starts: ClassVar[dict[str, float]] = {STATE: math.nan}

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots = view.slots
        keep = keep & slots.valid
        into, u = nearest_key(slots.keys, slots.valid & ~keep, targets(view, keep))
        merged = (into >= 0) & (u >= self._threshold(view, into, u)[..., None])
        if not bool(merged.any()):
            return Drop()(view, keep, scores, score)
        size = slots.positions.shape[-1]
        group = torch.where(merged, into, size)
        weights = u.exp() if self.weights == "paper" else u
        own = math.e if self.weights == "paper" else 1.0
        per_slot = weights if self.weights == "paper" else torch.ones_like(weights)
        total = group_sum(torch.where(merged, per_slot, 0.0), group, size) + own
        # Weights sum to 1 over a group in the paper, so partial sums stay in range.
        shares = torch.where(merged, weights, 0.0) / expand_groups(total, group, fill=1.0)
        keys, values = (blended(x, group, shares, own / total) for x in (slots.keys, slots.values))
        return outcome(slots.with_(keys=keys, values=values), keep, group)

    def _threshold(self, view: LayerView, into: Tensor, u: Tensor) -> Tensor:
        """τ (B,H) of this compression, also kept in ``view.state``."""
        found = into >= 0
        mean = torch.where(found, u, 0.0).sum(-1) / found.sum(-1)  # NaN for a head from which nothing leaves
        before = view.state.get(STATE, torch.full_like(mean, self.row_starts[STATE]))
        tau = torch.where(before.isnan(), mean, self.beta * before + (1 - self.beta) * mean)
        tau = torch.where(mean.isnan(), before, tau)
        view.state[STATE] = tau
        return tau
