"""Key difference: keys unlike the average key are distinctive."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from keepkv.score.base import Score, register_score
from keepkv.slots import LayerView


@register_score("keydiff")
@dataclass(frozen=True)
class KeyDiff(Score):
    """``−cos(k_i, mean_j k_j/‖k_j‖)`` over the valid slots of a head (KeyDiff, arXiv 2504.15364), in float32.

    A slot with p votes counts p times in the mean.
    """

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        # Only the direction of the mean matters, so votes may be normalised: no overflow for any votes.
        share = slots.log_votes.masked_fill(~slots.valid, float("-inf")).softmax(-1)
        share = share.masked_fill(~slots.valid, 0.0)  # softmax is NaN where a head holds nothing
        keys = slots.keys.float()
        anchor = (share[..., None] * normalize(keys, dim=-1)).sum(-2, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)
