"""The largest attention that a slot gets while the text is read a second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import strongest
from keepkv.observe.output import output_norms
from keepkv.score.base import Score, register_score

STAT = "reread"


@register_score("kvzip")
@dataclass(frozen=True)
class KVzip(Score):
    """KVzip (arXiv 2505.23416): what the model attends to when it repeats the context that stands in its cache.

    Statistic ``reread``: max over queries and over the query heads of the KV head of the attention that the slot gets,
    and the largest of these where slots merge, whose peaks need not belong to one query.
    ``keepkv.reread`` makes the model read the context again behind itself, on a copy of the cache, and starts the
    statistic anew with it; tokens that follow add what they attend to.

    plus: KVzip+ (arXiv 2601.07891), attention times ‖W_O v‖ / ‖h‖: what the value v of the slot adds to the residual
    stream through the output projection of the query head, by the norm of the hidden state h of the query, which the
    layer's attention is fed.

    Without ``keepkv.reread`` the queries are those of the FIRST reading, and of all that is decoded where the cache
    compresses while decoding. That is not KVzip but the largest attention so far: H2O with a maximum, which the paper
    compares with. Early tokens, which many queries see, are favoured then.
    """

    plus: bool = False

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(0.0, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True
    needs_second_reading: ClassVar[bool] = True

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        return self.plus

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        return self.plus

    def observe(self, view: LayerView) -> None:
        most = view.slots.stats[STAT]
        found = strongest(view, view.queries, view.query_positions, per_norm(view) if self.plus else None)
        if self.plus:
            found = found * output_norms(view)
        most.copy_(most.maximum(found.amax(2)).detach())

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats[STAT]


def per_norm(view: LayerView) -> Tensor:
    """1 / ‖h‖ (B,T) float32 of the hidden states of the queries; 0 of one that is all zeros, such as that of a token
    whose embedding is: by the formula all that it attends to would be worth infinitely much."""
    assert view.hidden is not None
    norms: Tensor = view.hidden.float().norm(dim=-1)
    return norms.reciprocal().masked_fill(norms < torch.finfo(torch.float32).eps, 0.0)
