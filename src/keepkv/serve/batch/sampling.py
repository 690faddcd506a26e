"""The next token of a row, drawn from its logits."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from keepkv.serve.request import Sampling, Top


@dataclass(frozen=True)
class Drawn:
    """A token; its log-probability and the likeliest in its place, where they were asked for."""

    id: int
    logprob: float | None = None
    top: Top = ()


class Likeliest(NamedTuple):
    """The likeliest token in one place, and its logit."""

    token: int
    logit: float


def likeliest(logits: Tensor) -> list[Likeliest]:
    """Of each row of ``logits`` (B,V)."""
    found = logits.max(-1)
    return list(map(Likeliest, found.indices.tolist(), found.values.tolist()))


class Sampler:
    """Draws the tokens of one reply. Its random numbers are its own, and come from the CPU on every device."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.random = sampling, torch.Generator()
        if sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(sampling.seed)

    def draw(self, logits: Tensor, best: Likeliest | None = None) -> Drawn:
        """From ``logits`` (V,), of which ``best`` is the likeliest, where that is known. Raises ``ArithmeticError``
        where they are not numbers."""
        best = best or likeliest(logits[None])[0]
        if not isfinite(best.logit):
            raise ArithmeticError("the model's logits are not finite: its weights or its dtype do not suit the text")
        token = best.token if self.sampling.temperature == 0 else self._random(logits)
        listed = self.sampling.logprobs
        return Drawn(token) if listed is None else scored(logits, token, listed)

    def _random(self, logits: Tensor) -> int:
        chances = (logits.double().cpu() / self.sampling.temperature).softmax(-1)
        chances, tokens = chances.sort(descending=True, stable=True)
        below = chances.cumsum(-1)
        kept = max(1, int((below - chances < self.sampling.top_p).sum()))  # the likeliest that reach top_p together
        point = torch.rand((), generator=self.random, dtype=torch.float64) * below[kept - 1]
        return int(tokens[min(int((below[:kept] <= point).sum()), kept - 1)])


def scored(logits: Tensor, token: int, listed: int) -> Drawn:
    """``token`` with its log-probability by ``logits`` (V,), and the ``listed`` likeliest in its place."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(listed, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Drawn(token, float(logprobs[token]), top)
