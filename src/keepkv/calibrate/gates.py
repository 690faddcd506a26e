"""Kind "gates": what questions ask of a slot, as a linear map of its key and value, fitted in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate import answering
from keepkv.calibrate.base import Found, Tensors, register_kind
from keepkv.calibrate.least_squares import Fit, foretold, said, solved
from keepkv.calibrate.wanted import SINKS, wanted
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.score.learned.gates import BIAS, KIND, NORMS, WEIGHT, features
from keepkv.score.passes.kvzip import KVzip
from keepkv.tasks.asking import Ids


@dataclass(frozen=True)
class Teacher(KVzip):
    """The score that gates learn, with the rotary embedding that their keys are turned back with."""

    needs_rope: ClassVar[bool] = True


@register_kind(KIND)
@torch.no_grad()
def gates(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    asked: Sequence[Sequence[Ids]] | None = None,
    behind: str = "both",
    noise: float = 0.003,
) -> Found:
    """Per layer: ``gates_weight`` (H,F) and ``gates_bias`` (H,), see ``keepkv.score.learned.gates``.

    y = ln of the largest attention that a token gets from what is read behind its text, on copies of the cache. w =
    argmin E(w·(x + e) + b − y)², e noise of ``noise`` times the mean square of keys, of values and of each norm: what
    codes of 4 bits do to them, about. It keeps what hardly varies from counting much, such as the norm of keys that are
    normalised. Predictions are then stretched about their mean to the variance of y: least squares draw what is hard to
    foretell to the mean, and a head that is would keep too little in a budget that heads share. Every fifth text is
    left out of the fit, and says how much of the variance of y it foretells.

    asked: for each text the token ids of questions with their answers, as they would be fed behind it; of an
    ``Exchange`` with a wrong answer it is said whether the model tells it from the right one. behind: what is
    read there. "questions"; "text": the text again, as in KVzip (arXiv 2505.23416), for replies that quote; "both": y
    is the mean of the two. Without ``asked`` it is the text.
    """
    if not noise > 0:
        raise CalibrationError(f"gates(noise={noise}): give a positive number, such as 0.003")
    cache, known = Cache(model, Method(Teacher(), when=When("deferred")), 1.0), list[bool]()
    sums: dict[int, Fit] = {layer.info.index: Fit() for layer in cache.compressible}
    for count, logs in enumerate(wanted(KIND, model, cache, batches, asked, behind, known), start=1):
        for layer, y in zip(cache.compressible, logs, strict=True):
            one, slots = sums[layer.info.index], layer.form.view(layer.store.view())
            one.parts = [slots.keys.shape[-1], slots.values.shape[-1], *[1] * NORMS]
            rope = None if layer.info.rope is None else layer.info.rope.of_text
            heads = range(slots.keys.shape[1])
            x = [features(slots, rope, slots.positions, head)[:, SINKS:].flatten(0, 1) for head in heads]
            one.add(torch.stack(x), y.transpose(0, 1).flatten(1)[..., None], count)
    made: Tensors = {}
    shares: dict[int, list[float]] = {}
    for index, one in sums.items():
        weight, bias = solved(one.fitted, noise, one.parts)
        made[index] = {WEIGHT: weight[:, 0].float(), BIAS: bias[:, 0].float()}
        shares[index] = foretold(one.judged, weight)[:, 0].tolist()
    facts = {"foretold": shares, "answers": len(known), "told_apart": sum(known)}
    return Found(made, facts, [*answering.said(known), *said(shares, "gates")])
