"""Attention that a model's average query will give, at distances that double."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Size
from keepkv.core.slots import LayerView
from keepkv.errors import CalibrationError
from keepkv.score.base import Score, register_score

KIND = "triattention"  # of calibration
MEAN, LENGTH = "triattention_mean", "triattention_length"  # its tensors: (H*G,D) and (H*G,R/2), float32


@register_score("triattention")
@dataclass(frozen=True)
class TriAttention(Score):
    """TriAttention (arXiv 2604.04921): what queries before RoPE are like on average, against each key.

    With the pairs of dims that rotate as complex numbers q_f and k_f, q̄ the mean query and E|q_f| the mean length of a
    pair, both calibrated, p the position of the key and t that of the row's last token,

        mean over δ of Σ_f |q̄_f||k_f| cos(ω_f(t − p + δ) + arg(q̄_f k̄_f)) + Σ_f (E|q_f| − |q̄_f|)|k_f|

    for δ = 1, 2, 4, … up to ``horizon``. The first sum is the product of the key as it is cached with the mean query
    turned to t + δ, so keys are not turned back. normalize: to mean 0 and deviation 1 over the slots that are not kept
    anyway, for each query head, as in the published runs. The largest of the query heads of a KV head counts. Dims that
    do not rotate add q̄·k, of which the paper does not speak.
    """

    signed: ClassVar[bool] = True

    horizon: Size = 65536
    normalize: bool = True

    needs_rope: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def __call__(self, view: LayerView) -> Tensor:
        if view.calibration is None:
            raise CalibrationError(f"a view without calibration: give it {MEAN} and {LENGTH} of the kind {KIND!r}")
        (b, h, _), rope, keys = view.slots.shape, view.rope, view.slots.keys.float()
        mean = view.calibration[MEAN]
        turned = mean.expand(b, *mean.shape)
        if rope is not None:
            ahead = 2 ** torch.arange(self.horizon.bit_length(), device=keys.device) + view.next_place()[:, None] - 1
            turned = rope.of_text.rotate(turned[:, :, None].expand(-1, -1, ahead.shape[1], -1), ahead[:, None]).mean(2)
        found = turned.view(b, h, -1, mean.shape[-1]) @ keys.mT  # (B,H,G,S)
        if rope is not None:
            spread = (view.calibration[LENGTH] - rope.magnitudes(mean)) * rope.scaling
            found = found + spread.view(h, -1, spread.shape[-1]) @ rope.magnitudes(keys).mT
        return (self._normalized(view, found) if self.normalize else found * view.scaling).amax(2)

    def _normalized(self, view: LayerView, x: Tensor) -> Tensor:
        """x (B,H,G,S) with mean 0 and deviation 1 over slots that are not protected."""
        free = view.slots.valid if view.protected is None else view.slots.valid & ~view.protected
        count, free = free.sum(-1).clamp(min=1)[:, :, None, None], free[:, :, None]
        x = x - x.masked_fill(~free, 0.0).sum(-1, keepdim=True) / count
        deviation = (x.masked_fill(~free, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
        return x / deviation.clamp(min=1e-6)
