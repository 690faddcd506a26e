"""Runs of tokens stay or leave as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Count, Size
from keepkv.core.slots import LayerView
from keepkv.observe.chunks import Runs, chunk_of, ranked
from keepkv.observe.tokens import over_heads
from keepkv.score.base import ALL_OF_IT, Wrapped

TINY = 1e-8  # beside shares and their sums, as in kvpress


@dataclass(frozen=True)
class ChunkKV(Wrapped):
    """ChunkKV (arXiv 2502.00299): runs of ``size`` tokens by their mean score, the slots of a run by their own.

    S = −(runs that are better, then better slots of the run), so the best runs stay whole and the last one that fits
    in part gives its best slots. The score of a token is the sum over heads of another score, the same for every head.

    spiky: entropy-gated, as in kvpress: a run whose mean is at least the median of runs and whose entropy −Σ p ln p,
    p the shares of its slots in its score, is below the median of theirs, gives only its ``spiky`` best slots; the
    others come after all runs, best first. 0: no run is gated. Where scores may be negative, they are counted from the
    least of the run.
    """

    signed: ClassVar[bool] = True

    size: Size = 20
    spiky: Count = 0

    passed_on: ClassVar[tuple[str, ...]] = ALL_OF_IT

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        own, home = over_heads(self.score(view), slots.positions), chunk_of(slots, self.size)
        if bool((slots.positions == slots.positions[:, :1]).all()):  # every head says the same
            own, home = own[:, :1], home[:, :1]
        return self._order(own, Runs(home)).expand(slots.shape)

    def _order(self, own: Tensor, runs: Runs) -> Tensor:
        """S, given the scores ``own`` (B,H,S) of the tokens."""
        count = runs.per(torch.ones_like(own), "sum")
        held = count > 0
        mean = (runs.per(own, "sum") / count.clamp(min=1)).masked_fill(~held, float("-inf"))  # (B,H,R)
        inner = runs.ranks(own)
        first = -(runs.at(ranked(mean)) * self.size + inner).float()
        if not self.spiky:
            return first
        gated = runs.at((mean >= _median(mean, held)) & self._spiky(own, runs, count, held))
        last = gated & (inner >= self.spiky)
        # What a spiky run does not give comes after all runs, by its score.
        rest = ranked(own.masked_fill(runs.home < 0, float("-inf"))) + (mean.shape[-1] + 1) * self.size
        return torch.where(last, -rest.float(), first)

    def _spiky(self, own: Tensor, runs: Runs, count: Tensor, held: Tensor) -> Tensor:
        """(B,H,R) bool: runs whose entropy, as a share of the largest it could be, is below the median of runs."""
        low = runs.at(runs.per(own, "amin")).clamp(max=0.0)
        above = own - torch.where(low.isfinite(), low, 0.0)
        share = above / (runs.at(runs.per(above, "sum")) + TINY)
        entropy = runs.per(-share * (share + TINY).log(), "sum") / count.clamp(min=2).log()
        entropy = entropy.masked_fill(count < 2, 0.0).clamp(0.0, 1.0)
        return entropy < _median(entropy, held)


def _median(x: Tensor, held: Tensor) -> Tensor:
    """(B,H,1): the lower median of x (B,H,R) over the runs that are ``held``."""
    ascending = x.masked_fill(~held, math.inf).sort(-1).values
    return ascending.gather(-1, (held.sum(-1, keepdim=True) - 1).clamp(min=0) // 2)
