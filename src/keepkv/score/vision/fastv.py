"""Attention that a token has received in all heads of a layer together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.tokens import over_heads
from keepkv.score.base import register_score
from keepkv.score.queries.h2o import H2O


@register_score("fastv")
@dataclass(frozen=True)
class FastV(H2O):
    """FastV (arXiv 2403.06764): attention from every query so far, summed over the heads of the layer, so that all
    heads say the same of a token. EffiVLM-Bench's code takes all rows; the paper's takes the last, which is ``tova``.
    """

    def __call__(self, view: LayerView) -> Tensor:
        return over_heads(super().__call__(view), view.slots.positions)
