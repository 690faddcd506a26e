"""How a key and a value stand out among those of the run of tokens that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.core.options import Count, Window
from keepkv.core.slots import LayerView
from keepkv.observe.chunks import Runs, chunk_of
from keepkv.score.base import Score, register_score


@register_score("lagkv")
@dataclass(frozen=True)
class LagKV(Score):
    """LagKV (arXiv 2504.04704): the spread of a slot's channels, each measured by its range in the next run.

        x̂_i = (x_i − min_r x_r) / (max_r x_r − min_r x_r)    per channel, r the slots of the run that follows i's own
        S_i = ½ Σ_{x = k, v} softmax_i std(x̂_i)              over the slots of a run; std over the channels

    Runs have ``lag`` tokens and begin behind the first ``sinks``. What counts is the rank within a run, so that each
    gives up the same share: S = (lag − 1 − slots of the run that are better)/lag. ``cross`` compares S itself between
    runs and heads. Sinks, the last whole run and what follows it have the largest scores, newer ones larger: a budget
    below that keeps the newest.

    Ranks are counted from the best, so slots of a run that was compressed before keep theirs. A channel that does not
    vary in the next run says nothing: 0.
    """

    lag: Window = 128
    sinks: Count = 4
    cross: bool = False

    def __call__(self, view: LayerView) -> Tensor:
        slots, seen = view.slots, view.seen[:, None, None]
        home = chunk_of(slots, self.lag, self.sinks)
        last = (seen - self.sinks).div(self.lag, rounding_mode="floor") - 1  # (B,1,1): the last whole run
        runs = Runs(home)
        heads = ((x[:, h : h + 1] for x in (slots.keys, slots.values)) for h in range(home.shape[1]))
        parts = [[_relative(x, runs.of_head(h)) for x in both] for h, both in enumerate(heads)]
        score = torch.cat([(k + v) / 2 for k, v in parts], dim=1)
        if not self.cross:
            score = (self.lag - 1 - runs.ranks(score)).float() / self.lag
        newest = 1 + slots.positions.float() / seen
        return torch.where(home < 0, 2.0, torch.where(home < last, score, newest))


def _relative(x: Tensor, runs: Runs) -> Tensor:
    """softmax std(x̂) (B,1,S) float32 of the slots x (B,1,S,D) of one head."""
    x = x.float()
    low, high = runs.per(x, "amin"), runs.per(x, "amax")
    span = high - low
    says = (span > 0) & span.isfinite()
    low, span = low.where(says, 0.0), span.where(says, float("inf"))  # so that the others become 0
    away = (x - runs.at(low, 1)).div_(runs.at(span, 1))
    away -= away.mean(-1, keepdim=True)
    spread = torch.linalg.vector_norm(away, dim=-1) / math.sqrt(x.shape[-1] - 1)
    spread = (spread - runs.at(runs.per(spread, "amax"))).exp()
    found: Tensor = (spread / runs.at(runs.per(spread, "sum"))).float()
    return found
