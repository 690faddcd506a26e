"""Kind "gates": what questions ask of a slot, as a linear map of its key and value, fitted in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.base import Found, Tensors, register_kind
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed, reread, watching
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.score.learned.gates import BIAS, KIND, NORMS, WEIGHT, features
from keepkv.score.passes.kvzip import STAT, KVzip
from keepkv.tasks.asking import Ids

SINKS = 4  # first tokens of each text that are left out: every method keeps them, and they are like no others
LEAST = 1e-6  # of attention: what gets less is not wanted, and how much less says nothing
BEHIND = ("both", "questions", "text")
HELD_OUT = 5  # every fifth text is for judging alone


@dataclass(frozen=True)
class Teacher(KVzip):
    """The score that gates learn, with the rotary embedding that their keys are turned back with."""

    needs_rope: ClassVar[bool] = True


@dataclass
class Sums:
    """Second moments (H,F+2,F+2) of [x, y, 1], float64: all that least squares need."""

    moment: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (H,N,F), y (H,N): features of the tokens of a text, and what they are to foretell."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        row = torch.cat((x, y[..., None], torch.ones_like(y[..., None])), dim=-1).to(wide)
        new = (row.mT @ row).cpu().double()
        self.moment = new if self.moment is None else self.moment + new
        self.tokens += x.shape[1]

    def centred(self) -> tuple[Tensor, Tensor]:
        """Mean (H,F+1) and covariance (H,F+1,F+1) of [x, y]."""
        assert self.moment is not None
        mean = self.moment[:, :-1, -1] / self.tokens
        return mean, self.moment[:, :-1, :-1] / self.tokens - mean[..., None] * mean[:, None]


@dataclass
class Layer:
    """What is summed of one layer: over the texts that are fitted, and over those that judge the fit. parts: how many
    of the features are the key's, the value's, and each norm."""

    parts: list[int] = field(default_factory=list)
    fitted: Sums = field(default_factory=Sums)
    judged: Sums = field(default_factory=Sums)


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

    asked: for each text the token ids of questions with their answers, as they would be fed behind it. behind: what is
    read there. "questions"; "text": the text again, as in KVzip (arXiv 2505.23416), for replies that quote; "both": y
    is the mean of the two. Without ``asked`` it is the text.
    """
    if not noise > 0:
        raise CalibrationError(f"gates(noise={noise}): give a positive number, such as 0.003")
    if behind not in BEHIND:
        raise CalibrationError(f"gates(behind={behind!r}): choose from {', '.join(BEHIND)}")
    cache = Cache(model, Method(Teacher(), when=When("deferred")), 1.0)
    sums: dict[int, Layer] = {layer.info.index: Layer() for layer in cache.compressible}
    count = 0
    for number, ids in enumerate(batches):
        if ids.shape[1] <= 2 * SINKS:
            continue
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        wanted = []
        if asked is not None and behind != "text":
            if number >= len(asked) or len(ids) > 1:
                raise CalibrationError(
                    f"text {number} has {len(ids)} rows, and there are questions for {len(asked)} texts: give texts of "
                    "one row, and a list of questions for each"
                )
            _ask(model, cache, asked[number], torch.ones_like(ids))
            wanted.append(_wanted(cache))
        if asked is None or behind != "questions":
            reread(model, cache, ids)
            wanted.append(_wanted(cache))
        count += 1
        for layer, *logs in zip(cache.compressible, *wanted, strict=True):
            one, slots = sums[layer.info.index], layer.form.view(layer.store.view())
            into = one.fitted if count % HELD_OUT else one.judged
            y = torch.stack(logs).mean(0).transpose(0, 1).flatten(1)
            one.parts = [slots.keys.shape[-1], slots.values.shape[-1], *[1] * NORMS]
            rope = None if layer.info.rope is None else layer.info.rope.of_text
            heads = range(slots.keys.shape[1])
            x = [features(slots, rope, slots.positions, head)[:, SINKS:].flatten(0, 1) for head in heads]
            into.add(torch.stack(x), y)
    if count < HELD_OUT and sums:
        raise CalibrationError(
            f"gates need at least {HELD_OUT} texts of more than {2 * SINKS} tokens, {count} were given: give more "
            "text, or read fewer tokens at a time"
        )
    made: Tensors = {}
    shares: dict[int, list[float]] = {}
    for index, one in sums.items():
        weight, bias = _solved(one.fitted, noise, one.parts)
        made[index] = {WEIGHT: weight.float(), BIAS: bias.float()}
        shares[index] = _foretold(one.judged, weight).tolist()
    return Found(made, {"foretold": shares}, _said(shares))


def _wanted(cache: Cache) -> list[Tensor]:
    """ln of the statistic (B,H,S−SINKS) of each layer."""
    stats = (layer.store.view().stats[STAT] for layer in cache.compressible)
    return [x[:, :, SINKS:].float().clamp(min=LEAST).log() for x in stats]


def _ask(model: PreTrainedModel, cache: Cache, asked: Sequence[Ids], mask: Tensor) -> None:
    """Set the statistic of each slot of ``cache`` to the most that one of ``asked`` attends to it; mask (1,T)."""
    most = [torch.zeros_like(layer.store.view().stats[STAT]) for layer in cache.compressible]
    for ids in asked:
        twin = watching(cache)
        for layer in twin.compressible:
            layer.store.write_stats({STAT: torch.zeros_like(layer.store.view().stats[STAT])})
        feed(model, twin, torch.tensor([ids], device=mask.device), mask)
        for layer, held in zip(twin.compressible, most, strict=True):
            torch.maximum(held, layer.store.view().stats[STAT][:, :, : held.shape[2]], out=held)
    for layer, held in zip(cache.compressible, most, strict=True):
        layer.store.write_stats({STAT: held})


def _solved(sums: Sums, noise: float, parts: list[int]) -> tuple[Tensor, Tensor]:
    """Weights (H,F) and biases (H,), float64. parts: how many features each kind has, whose mean squares count."""
    mean, moment = sums.centred()
    squares = moment.diagonal(dim1=-2, dim2=-1)[:, :-1] + mean[:, :-1].square()
    error = torch.cat([x.mean(-1, keepdim=True).expand_as(x) for x in squares.split(parts, dim=-1)], dim=-1)
    x, xy = moment[:, :-1, :-1], moment[:, :-1, -1]
    w = torch.linalg.solve(x + torch.diag_embed(noise * error + 1e-12), xy)
    told = (w * (x @ w[..., None])[..., 0]).sum(-1).clamp(min=1e-24).sqrt()  # the spread of predictions
    weight = w * (moment[:, -1, -1].clamp(min=0.0).sqrt() / told)[:, None]
    return weight, mean[:, -1] - (weight * mean[:, :-1]).sum(-1)


def _foretold(sums: Sums, weight: Tensor) -> Tensor:
    """Squared correlation (H,) of what is foretold with what came."""
    _, moment = sums.centred()
    told = (weight * (moment[:, :-1, :-1] @ weight[..., None])[..., 0]).sum(-1)
    both = (weight * moment[:, :-1, -1]).sum(-1)
    share: Tensor = both.square() / (told * moment[:, -1, -1]).clamp(min=1e-24)
    return share


def _said(shares: dict[int, list[float]]) -> list[str]:
    every = sorted(share for heads in shares.values() for share in heads)
    if not every:
        return []
    worst = min(shares, key=lambda index: min(shares[index]))
    return [
        "share of the variance of ln(attention that tokens get) which gates foretell, on texts left out of the fit",
        f"median of {len(every)} heads {every[len(every) // 2]:.2f}, from {every[0]:.2f} (a head of layer {worst}) to "
        f"{every[-1]:.2f}",
    ]
