"""Budgets per head from a threshold on the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.adakv import AdaKV
from keepkv.allocate.base import register_allocate
from keepkv.allocate.select import tiers
from keepkv.core.options import Share
from keepkv.core.slots import LayerView


@register_allocate("threshold")
@dataclass(frozen=True)
class Threshold(AdaKV):
    """Each head keeps its slots whose score is ``threshold`` at least, and those that are protected.

    How many that are, the text decides. The budget stays a bound: where more pass, the heads of a layer share it as in
    ``AdaKV``, and where it holds every token, none leaves. With a budget of almost all tokens, such as 0.99, the
    threshold alone decides.
    """

    threshold: float = 0.0
    alpha: Share = 0.0
    trims: ClassVar[bool] = True

    def __call__(self, scores: Tensor, view: LayerView, budget: Tensor) -> Tensor:
        tier = tiers(view)
        passed = ((tier == 2) | ((tier == 1) & (scores >= self.threshold))).sum(-1)
        within = super().__call__(scores, view, budget)
        return torch.where((budget < view.seen)[:, None], passed.minimum(within), within)
