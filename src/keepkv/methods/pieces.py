"""What methods put together: pieces by name, and scores that remember queries for a merge."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keepkv.allocate.base import ALLOCATIONS, Allocate
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.masses import STATE
from keepkv.observe.window import remember
from keepkv.score.base import SCORES, Score, Wrapped


@dataclass(frozen=True)
class Remembering(Wrapped):
    """A score as it is, plus the last ``size`` queries of each row for a merge, where the score remembers fewer."""

    size: int

    @property
    def follows_decode(self) -> bool:  # type: ignore[override]
        return self.score.follows_decode

    @property
    def scores_within_spans(self) -> bool:  # type: ignore[override]
        return self.score.scores_within_spans

    @property
    def span_stats(self) -> dict[str, Stat]:  # type: ignore[override]
        return self.score.span_stats

    def observe(self, view: LayerView) -> None:
        super().observe(view)
        held = view.state.get("window")
        if held is None or held.shape[2] < self.size:
            remember(view, self.size, STATE)

    def observe_spans(self, view: LayerView) -> None:
        self.score.observe_spans(view)

    def __call__(self, view: LayerView) -> Tensor:
        return self.score(view)

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        return self.score.span_scores(view, own)


def as_score(score: str | Score, window: int | None = None) -> Score:
    """A score by name, or as given; one that looks through the window of the prompt gets the method's own."""
    if not isinstance(score, str):
        return score
    return SCORES.build(score, window=window) if score == "snapkv" and window else SCORES.build(score)


def as_allocation(allocate: str | Allocate) -> Allocate:
    """An allocation by name, with its defaults, or as given."""
    return ALLOCATIONS.build(allocate) if isinstance(allocate, str) else allocate
