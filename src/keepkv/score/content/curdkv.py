"""How much of the squared length of its neighbours' keys and values a slot has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Annotated

import torch
from torch import Tensor

from keepkv.core.options import Count, one_of
from keepkv.core.slots import LayerView
from keepkv.observe.chunks import Runs, chunk_of
from keepkv.observe.lengths import lengths
from keepkv.score.base import Score, register_score

_BOTH = ("product", "mean")


@register_score("curdkv")
@dataclass(frozen=True)
class CurDKV(Score):
    """CurDKV (arXiv 2509.15038): S_i ∝ κ_i·ν_i, κ and ν the shares of a slot in Σ‖k‖² and Σ‖v‖² of its run.

    Runs have ``neighbours`` tokens; 0: the whole row is one. of: "product", "mean" of the two, "key" or "value" alone.
    Scores of a head sum to 1. The paper calls these shares leverage scores and approximates them by a random
    projection, which is left out here, as it is by default in kvpress: the lengths are cheap as they are.

    A slot of p votes has p times its squared length.
    """

    of: Annotated[str, one_of(*_BOTH, "key", "value")] = "product"
    neighbours: Count = 16

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        home = chunk_of(slots, self.neighbours) if self.neighbours else torch.where(slots.valid, 0, -1)
        votes = slots.log_votes.masked_fill(~slots.valid, float("-inf")).exp()
        looked_at = [x for x, name in ((slots.keys, "key"), (slots.values, "value")) if self.of in (name, *_BOTH)]
        runs = Runs(home)
        join = torch.mul if self.of == "product" else torch.add  # scores are divided by their sum in the end
        score = reduce(join, (_share(x, votes, runs) for x in looked_at))
        total = score.sum(-1, keepdim=True)
        return (score / total.masked_fill(total == 0, 1.0)).float()


def _share(x: Tensor, votes: Tensor, runs: Runs) -> Tensor:
    """(B,H,S): what each slot of x (B,H,S,D) has of the squared length of its run; 0 where that has none."""
    length = lengths(x).square() * votes
    length = length.masked_fill(runs.home < 0, 0.0)
    total = runs.per(length, "sum")
    return length / runs.at(total.masked_fill(total == 0, 1.0))
