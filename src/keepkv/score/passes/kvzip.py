"""The largest attention that a slot gets while the text is read a second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import strongest
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

    Without ``keepkv.reread`` the queries are those of the FIRST reading, and of all that is decoded where the cache
    compresses while decoding. That is not KVzip but the largest attention so far: H2O with a maximum, which the paper
    compares with. Early tokens, which many queries see, are favoured then.
    """

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(0.0, "max")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True
    needs_second_reading: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        most = view.slots.stats[STAT]
        most.copy_(most.maximum(strongest(view, view.queries, view.query_positions).amax(2)).detach())

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats[STAT]
