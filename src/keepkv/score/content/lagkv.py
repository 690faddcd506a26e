"""How a key and a value stand out among those of the run of tokens that follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keepkv.core.options import Count, Window
from keepkv.core.slots import LayerView
from keepkv.observe.chunks import at_chunk, chunk_of, per_chunk, rank_within
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
        heads = zip(slots.keys.unbind(1), slots.values.unbind(1), home.unbind(1), strict=True)
        score = torch.stack([(_relative(k, own) + _relative(v, own)) / 2 for k, v, own in heads], dim=1)
        if not self.cross:
            score = (self.lag - 1 - rank_within(score, home)).float() / self.lag
        newest = 1 + slots.positions.float() / seen
        return torch.where(home < 0, 2.0, torch.where(home < last, score, newest))


def _relative(x: Tensor, home: Tensor) -> Tensor:
    """softmax std(x̂) (B,S) float32 of the slots x (B,S,D) of one head, whose runs are ``home`` (B,S)."""
    x, home = x[:, None].float(), home[:, None]
    low, high = per_chunk(x, home, "amin"), per_chunk(x, home, "amax")
    low, span = at_chunk(low, home + 1), at_chunk(high - low, home + 1)
    varies = (span > 0) & span.isfinite()
    spread = torch.where(varies, (x - low) / span.masked_fill(~varies, 1.0), 0.0).std(-1)
    spread = (spread - at_chunk(per_chunk(spread, home, "amax"), home)).exp()
    found: Tensor = (spread / at_chunk(per_chunk(spread, home, "sum"), home)).float()
    return found[:, 0]
