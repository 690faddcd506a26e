"""A score that remembers queries for a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.options import Queries
from keepkv.core.slots import LayerView
from keepkv.observe.masses import STATE
from keepkv.observe.window import remember
from keepkv.score.base import Wrapped


@dataclass(frozen=True)
class Remembering(Wrapped):
    """A score as it is, plus the last ``size`` queries of each row for a merge, where the score remembers fewer; with
    ``turns`` plus the rotary embedding, for one that moves keys to other places."""

    size: Queries
    turns: bool = False

    passed_on: ClassVar[tuple[str, ...]] = (
        *Wrapped.passed_on, "needs_second_reading", "needs_gradients", "follows_decode", "scores_within_spans",
        "span_stats",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs_rope", self.turns or self.score.needs_rope)

    @property
    def remembers(self) -> dict[str, int]:
        return {STATE: self.size, **self.score.remembers}

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
