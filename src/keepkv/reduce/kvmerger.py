"""KVMerger: runs of similar neighbours merge around their most important member (arXiv 2407.08454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.core.options import Cosine, Positive
from keepkv.core.slots import LayerView
from keepkv.kernels.groups import expand_groups, group_sum
from keepkv.observe.masses import exact_dtype
from keepkv.reduce.base import Reduce, Reduced, register_reduce
from keepkv.reduce.blend import blended, outcome, targets
from keepkv.reduce.drop import Drop
from keepkv.score.base import Score


@register_reduce("kvmerger")
@dataclass(frozen=True)
class KVMerger(Reduce):
    """Slots next to each other in a head whose key cosine is above ``threshold`` form a run; protected ones break it.

    The pivot p of a run is its kept member of largest score. What leaves the run enters it with Gaussian weights:

        g_i = exp(−‖k_p − k_i‖² / 2σ²)    w = g / Σg over p and what enters    k_p ← Σwk    v_p ← Σwv

    What leaves a run of which nothing is kept is dropped. No votes: statistics stay the pivot's.

    sigma: σ. The paper defines it through the weights that it makes; ``None`` is the root mean square distance of the
    pivot and of what enters it to the pivot, in each run its own, which leaves weights as they are if keys are scaled.
    """

    threshold: Cosine = 0.75
    sigma: Positive | None = None

    merges: ClassVar[bool] = True

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        slots = view.slots
        keep = keep & slots.valid
        group = self._pivots(view, targets(view, keep), slots.valid & ~keep, scores)
        size = slots.positions.shape[-1]
        if not bool((group < size).any()):
            return Drop()(view, keep, scores, score)
        keys = slots.keys.to(exact_dtype(slots.keys))
        at = group.clamp(max=size - 1)[..., None].expand_as(keys)
        apart = (keys - keys.gather(2, at)).square().sum(-1).masked_fill(group == size, 0.0)
        if self.sigma is None:
            members = group_sum((group < size).to(apart.dtype), group, size) + 1
            spread = expand_groups(group_sum(apart, group, size) / members, group, fill=1.0)
        else:
            spread = torch.full_like(apart, self.sigma**2)
        weights = (-apart / (2 * spread.clamp(min=torch.finfo(apart.dtype).tiny))).exp().masked_fill(group == size, 0.0)
        own = (group_sum(weights, group, size) + 1).reciprocal()
        shares = weights * expand_groups(own, group)
        new_keys, values = (blended(x, group, shares, own) for x in (slots.keys, slots.values))
        return outcome(slots.with_(keys=new_keys, values=values), keep, group)

    def _pivots(self, view: LayerView, kept: Tensor, leaving: Tensor, scores: Tensor) -> Tensor:
        """(B,H,S) int64: the pivot that each leaving slot enters, S for none. kept, leaving (B,H,S) bool."""
        keys, size = view.slots.keys, kept.shape[-1]
        unit = normalize(keys.to(exact_dtype(keys)), dim=-1)
        cosine = (unit[:, :, :-1] * unit[:, :, 1:]).sum(-1)
        free = kept | leaving if view.protected is None else kept | (leaving & ~view.protected)
        broken = ~(free[..., :-1] & free[..., 1:] & (cosine > self.threshold))
        run = torch.nn.functional.pad(broken.cumsum(-1), (1, 0))
        ranked = scores.masked_fill(~kept, float("-inf"))
        best = torch.full_like(ranked, float("-inf")).scatter_reduce_(2, run, ranked, "amax")
        first = torch.arange(size, device=run.device).expand_as(run).where(kept & (ranked == best.gather(2, run)), size)
        pivot = torch.full_like(run, size).scatter_reduce_(2, run, first, "amin")
        return pivot.gather(2, run).where(leaving & free, size)
