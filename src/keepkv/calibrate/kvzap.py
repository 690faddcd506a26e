"""Kind "kvzap": what a second reading attends to in a token, as a linear map of its hidden state, in closed form."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.base import Found, Tensors, register_kind
from keepkv.calibrate.least_squares import Fit, foretold, said, solved
from keepkv.calibrate.wanted import HIDDEN, SINKS, Remembering, wanted
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.score.learned.kvzap import BIAS, KIND, WEIGHT

LEAST = 1e-12  # of a score: less is nothing


@register_kind(KIND)
@torch.no_grad()
def kvzap(model: PreTrainedModel, batches: Iterable[Tensor], plus: bool = True, noise: float = 0.003) -> Found:
    """Per layer: ``kvzap_weight`` (H,E) and ``kvzap_bias`` (H,), see ``keepkv.score.learned.kvzap``.

    y = ln of the KVzip+ score (arXiv 2601.07891) of a token, of KVzip's without ``plus``, from a second reading of each
    text behind itself. w = argmin E(w·(x + e) + b − y)² over hidden states x, e noise of ``noise`` times their mean
    square: ridge regression, as the authors' linear model, with a ridge that does not hang on scale. Predictions are
    stretched about their mean to the variance of y, as those of ``gates``: heads share one budget or threshold. Every
    fifth text is left out of the fit, and says how much of the variance of y it foretells. The authors' network has a
    layer of 512 between and is trained by gradients: ``calibrate.published`` reads it.
    """
    if not noise > 0:
        raise CalibrationError(f"kvzap(noise={noise}): give a positive number, such as 0.003")
    cache = Cache(model, Method(Remembering(plus), when=When("deferred")), 1.0)
    fits: dict[int, Fit] = {layer.info.index: Fit() for layer in cache.compressible}
    for count, logs in enumerate(wanted(KIND, model, cache, batches, least=LEAST), start=1):
        for layer, y in zip(cache.compressible, logs, strict=True):
            x = layer.score_state[HIDDEN][:, SINKS:].flatten(0, 1)
            fits[layer.info.index].parts = [x.shape[1]]
            fits[layer.info.index].add(x[None], y.transpose(1, 2).flatten(0, 1)[None], count)
    made: Tensors = {}
    shares: dict[int, list[float]] = {}
    for index, one in fits.items():
        weight, bias = solved(one.fitted, noise, one.parts)
        made[index] = {WEIGHT: weight[0].float(), BIAS: bias[0].float()}
        shares[index] = foretold(one.judged, weight)[0].tolist()
    return Found(made, {"foretold": shares}, said(shares, "hidden states"))
