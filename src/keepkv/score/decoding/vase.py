"""Values that stand out, and a draw among the rest by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.select import ranks, tiers
from keepkv.core.options import Kernel, Share, Window
from keepkv.core.slots import LayerView
from keepkv.observe.draw import uniform
from keepkv.score.base import register_score
from keepkv.score.decoding.before_window import Windowed
from keepkv.score.queries.snapkv import SnapKV

_DRAW = 0x56615345  # keeps the draws independent of the score "random", which hashes the same positions
_ABOVE = 1e6  # above any log attention with its noise, which lie within ±200


@register_score("vase")
@dataclass(frozen=True)
class VaSE(Windowed):
    """VaSE (arXiv 2606.03928): slots of the largest value range first, the others drawn in proportion to attention.

    Of the slots that a head may keep beyond those kept anyway, a share ``reserved`` goes to the largest
    max_d v − min_d v. All others have ln S + g, S the score of SnapKV and g = −ln(−ln u) of a fresh uniform u: keeping
    the largest is drawing without replacement in proportion to S. Every compression draws anew, from ``Cache(seed=)``.
    """

    signed: ClassVar[bool] = True

    reserved: Share = 0.25
    window: Window = 32
    kernel: Kernel = 5

    def __call__(self, view: LayerView) -> Tensor:
        attention = SnapKV(self.window, self.kernel)(view)
        u = uniform(view, _DRAW, fresh=True).to(attention.dtype) + 2**-25  # never 0
        drawn = attention.clamp(min=1e-30).log() - (-u.log()).log()
        spread = (view.slots.values.amax(-1) - view.slots.values.amin(-1)).to(attention.dtype)
        tier = tiers(view)
        budget = view.slots.lengths if view.budget is None else view.budget[:, None]
        quota = self.reserved * (budget - (tier == 2).sum(-1)).clamp(min=0)  # (B,H)
        first = ranks(spread, (tier == 1).to(torch.int8)) < quota.floor()[..., None]
        return torch.where(first & (tier == 1), _ABOVE + spread, drawn)
