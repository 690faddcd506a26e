"""Accumulated attention: heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from keepkv.core.options import one_of
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import received
from keepkv.score.base import Score, register_score


@register_score("h2o")
@dataclass(frozen=True)
class H2O(Score):
    """H2O (arXiv 2306.14048): attention that a slot has received from every query so far.

    Statistic ``mass``: Σ over queries, mean over the query heads of the KV head; masses add up when slots merge.
    normalize: "sum" as in the paper, or "mean" = mass / queries that could see the slot, which does not favour
    early tokens (kvpress' ObservedAttention).
    """

    normalize: Annotated[str, one_of("sum", "mean")] = "sum"
    stats: ClassVar[dict[str, Stat]] = {"mass": Stat(0.0, "sum")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True
    scores_within_spans: ClassVar[bool] = True
    # As ``mass``, from queries of the slot's span alone.
    span_stats: ClassVar[dict[str, Stat]] = {"span_mass": Stat(0.0, "sum")}

    def observe(self, view: LayerView) -> None:
        view.slots.stats["mass"].add_(received(view, view.queries, view.query_positions).mean(2))

    def __call__(self, view: LayerView) -> Tensor:
        return self._normalized(view, view.slots.stats["mass"], view.seen.view(-1, 1, 1))

    def observe_spans(self, view: LayerView) -> None:
        assert view.spans is not None
        until = view.spans.until(view.slots.positions)
        view.slots.stats["span_mass"].add_(received(view, view.queries, view.query_positions, until).mean(2))

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        assert view.spans is not None
        end = view.spans.until(view.slots.positions).minimum(view.seen.view(-1, 1, 1))
        return self._normalized(view, view.slots.stats["span_mass"], end)

    def _normalized(self, view: LayerView, mass: Tensor, end: Tensor) -> Tensor:
        return mass if self.normalize == "sum" else mass / (end - view.slots.positions).clamp(min=1)
