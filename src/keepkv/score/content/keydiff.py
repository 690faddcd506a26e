"""Key difference: keys unlike the average key are distinctive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.score.base import Score, register_score


@register_score("keydiff")
@dataclass(frozen=True)
class KeyDiff(Score):
    """``−cos(k_i, mean_j k_j/‖k_j‖)`` over the valid slots of a head (KeyDiff, arXiv 2504.15364), in float32.

    A slot with p votes counts p times in the mean.
    """

    signed: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        # Only the direction of the mean matters, so votes may be normalised: no overflow for any votes.
        share = slots.log_votes.masked_fill(~slots.valid, float("-inf")).softmax(-1)
        share = share.masked_fill(~slots.valid, 0.0).float()  # softmax is NaN where a head holds nothing
        # Three readings of the keys and nothing else of their size.
        keys = slots.keys.float()
        norm = torch.linalg.vector_norm(keys, dim=-1)
        anchor = (share / norm.clamp(min=1e-12))[:, :, None] @ keys  # (B,H,1,D)
        length = norm * torch.linalg.vector_norm(anchor, dim=-1)
        along = (keys @ anchor.mT)[..., 0]
        cosine: Tensor = along / length.clamp_(min=1e-8)
        return -cosine
