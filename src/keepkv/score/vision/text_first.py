"""Text before vision, the newest frames before older ones, and among these what a score says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keepkv.core.options import Share
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.core.tokens import MOVED
from keepkv.observe.vision import ranked, sight
from keepkv.score.base import Wrapped


@dataclass(frozen=True)
class TextFirst(Wrapped):
    """All text, then the vision of the newest steps, then that of the highest ``score``.

    recent: share of the vision budget that the newest steps take, which stay whole; at least one does, unless it is 0.
    moves: slots may be given other rotary positions, and remember by how much. What text does not leave is all that
    there is for vision; where it is not even enough for text, the newest of it stays.
    """

    recent: Share = 1 / 6
    moves: bool = False

    passed_on: ClassVar[tuple[str, ...]] = (*Wrapped.passed_on, "observes", "follows_decode", "needs_questions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moves:
            object.__setattr__(self, "stats", {**self.score.stats, MOVED: Stat(0.0, "anchor")})
            object.__setattr__(self, "needs_rope", True)

    def __call__(self, view: LayerView) -> Tensor:
        seen, slots = sight(view), view.slots
        score = ranked(self.score(view), seen.vision)
        if self.recent:
            score = score + 1.0 * seen.recent(self.recent)
        return score.where(seen.vision, 2.0 + ranked(slots.positions.float(), slots.valid & ~seen.vision))
