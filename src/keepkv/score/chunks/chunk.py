"""Every run of tokens keeps the same share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Size
from keepkv.core.slots import LayerView
from keepkv.observe.chunks import Runs, chunk_of
from keepkv.score.base import ALL_OF_IT, Wrapped


@dataclass(frozen=True)
class Chunk(Wrapped):
    """S_i = −(slots of i's run of ``size`` tokens that are better + ½) / tokens of the run, by another score.

    So the largest scores are as many of each run as its length has a share in the text. Protected slots are the best of
    theirs. Ranks are counted from the best, so a run that was compressed before gives up what newer runs give up now.
    """

    size: Size = 1024

    passed_on: ClassVar[tuple[str, ...]] = ALL_OF_IT

    def __call__(self, view: LayerView) -> Tensor:
        slots, own = view.slots, self.scored(view)
        home = chunk_of(slots, self.size)
        if view.protected is not None:
            own = own.masked_fill(view.protected, float("inf"))
        tokens = (view.seen[:, None, None] - home * self.size).clamp(1, self.size)
        return -(Runs(home).ranks(own) + 0.5).to(torch.float32) / tokens

    def scored(self, view: LayerView) -> Tensor:
        """The other score (B,H,S), of the whole text."""
        return self.score(view)
