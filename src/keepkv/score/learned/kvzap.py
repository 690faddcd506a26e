"""What a second reading would attend to in each token, foretold from its hidden state by a small network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.errors import CalibrationError
from keepkv.score.base import Score, register_score

KIND = STAT = "kvzap"
WEIGHT, BIAS = "kvzap_weight", "kvzap_bias"  # (H,E) and (H,) of each layer; (H,M) where there is a layer between
INNER, INNER_BIAS = "kvzap_inner_weight", "kvzap_inner_bias"  # (M,E) and (M,)
UNKNOWN = float("-inf")  # of a token whose hidden state was not seen


@register_score("kvzap")
@dataclass(frozen=True)
class KVzap(Score):
    """S_i = W·gelu(W₁h_i + b₁) + b, or W·h_i + b: ln of the KVzip+ score of token i, from the hidden state h_i that its
    layer's attention is fed (arXiv 2601.07891).

    Statistic ``kvzap``: known when the token is, while it is decoded too, and never changes; the largest of these where
    slots merge. ``keepkv calibrate kvzap`` fits W and b of each layer in closed form, or reads what the authors
    published (``--from``), networks with a layer between. Computed in the dtype of the weights, or of the hidden states
    if that is wider.
    """

    signed: ClassVar[bool] = True

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(UNKNOWN, "max")}
    needs_hidden: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def token_stats(self, hidden: Tensor, calibration: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        assert calibration is not None
        first = calibration[INNER if INNER in calibration else WEIGHT]
        check_width(KIND, first.shape[1], hidden)
        x = hidden.to(torch.promote_types(hidden.dtype, first.dtype))

        def through(x: Tensor, weight: str, bias: str) -> Tensor:
            return linear(x, calibration[weight].to(x.dtype), calibration[bias].to(x.dtype))

        if INNER in calibration:
            x = gelu(through(x, INNER, INNER_BIAS))
        return {STAT: through(x, WEIGHT, BIAS).float().mT}

    def __call__(self, view: LayerView) -> Tensor:
        return of_heads(view, STAT)


def check_width(kind: str, width: int, hidden: Tensor) -> None:
    """Raise ``CalibrationError`` where a calibration is for hidden states of another ``width``."""
    if width != hidden.shape[-1]:
        raise CalibrationError(
            f"{kind} weights for hidden states of {width} numbers, and this layer's have {hidden.shape[-1]}: make them "
            f"for this model with keepkv calibrate {kind}"
        )


def of_heads(view: LayerView, stat: str) -> Tensor:
    """The statistic (B,H,S) of that name, in which tokens that were never seen are the least."""
    scores = view.slots.stats[stat]
    return scores.clamp(min=torch.finfo(scores.dtype).min)
