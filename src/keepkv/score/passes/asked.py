"""Attention of rehearsed questions, as Attention Matching chooses its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from keepkv.core.options import one_of
from keepkv.core.slots import LayerView
from keepkv.observe.rehearsal import remembered
from keepkv.score.base import Score
from keepkv.score.queries.matching import pooled


@dataclass(frozen=True)
class Asked(Score):
    """Root mean square, or largest, attention that a slot receives from rehearsed questions (arXiv 2602.16284).

    The attention is that over the slots of the context alone: what was read of a question has no part in it.
    ``keepkv.rehearse`` makes the model read questions behind the context. pool: "rms", sqrt(mean a²), or "max".
    """

    pool: Annotated[str, one_of("rms", "max")] = "rms"

    needs_questions: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = remembered(view)[:2]
        return pooled(view, queries, positions, self.pool)
