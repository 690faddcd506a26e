"""More slots for layers whose attention is dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.base import DENSITY, Allocate, Known, register_allocate
from keepkv.allocate.water_filling import share
from keepkv.core.options import Share


@register_allocate("density")
@dataclass(frozen=True)
class Density(Allocate):
    """VL-Cache's layer budgets (arXiv 2410.23317), heads of a layer alike, with d the density that the score tells:

        b_l = b · L · ((1 − adaptive) / L + adaptive · d_l / Σd),   clipped to [max(protected, ⌊least·b⌋), held]

    What the clip takes or leaves goes to the other layers in proportion, so that Σ b_l = L·b to the slot; the published
    code does not make up for it. adaptive: 1 as published. There layer 0 takes .13 to .41 of the tokens at a mean of
    .05, and the middle starves: .2 mixes a fifth of it with equal budgets. least: part of the mean budget that every
    layer keeps.
    """

    adaptive: Share = 1.0
    least: Share = 0.01
    joint: ClassVar[bool] = True
    needs_density: ClassVar[bool] = True

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        dense = torch.stack([x[DENSITY] for x in known], -1).double()  # (B,L)
        budget = torch.stack(budgets, -1)
        held = torch.stack([(t > 0).sum(-1).amax(-1) for t in tiers], -1)
        pinned = torch.stack([(t == 2).sum(-1).amax(-1) for t in tiers], -1)
        total = budget.sum(-1).maximum(pinned.sum(-1))
        least = pinned.maximum((self.least * budget).long()).minimum(held)
        low = torch.where(least.sum(-1, keepdim=True) <= total[:, None], least, pinned)
        sums = dense.sum(-1, keepdim=True)
        even = torch.full_like(dense, 1 / dense.shape[-1])
        weights = (1 - self.adaptive) * even + self.adaptive * torch.where(sums > 0, dense / sums, even)
        weights = weights + 1e-9 * even  # a layer of no density takes what others cannot
        counts = share(total, weights, low, low, held, None, 1.0)
        lengths = [(t > 0).sum(-1) for t in tiers]
        return [n[:, None].expand_as(own).minimum(own) for n, own in zip(counts.unbind(-1), lengths, strict=True)]
