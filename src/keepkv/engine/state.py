"""What the layers of one cache share: method, budget, clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.engine.positions import Clock
from keepkv.errors import BudgetError
from keepkv.methods.base import Method
from keepkv.spans.rows import RowSpans

if TYPE_CHECKING:
    from keepkv.engine.layer import Layer


@dataclass
class Plan:
    """Settings and clock of one cache. ``compressing``: whether compressions that fall due are run. ``scopes``: whether
    fair spans are scored by their own queries."""

    method: Method
    budget: Budget
    seed: int = 0
    clock: Clock = field(default_factory=Clock)
    compressing: bool = True
    window_tokens: int = 0  # what sliding layers, which transformers keeps, may hold per row, summed over layers
    spans: RowSpans | None = None
    scopes: bool = field(init=False, default=False)
    due: list[Layer] = field(init=False, default_factory=list)  # layers that share a budget and wait for the others

    def __post_init__(self) -> None:
        pinned = self.method.sinks + self.method.window
        if self.budget.slots is not None and self.budget.slots < pinned:
            raise BudgetError(
                f"budget of {self.budget.slots} slots per head is below the {pinned} that {self.method.name!r} always "
                f"keeps ({self.method.sinks} sinks + {self.method.window} recent). Give at least {pinned}, or smaller "
                "sinks= and window= options."
            )
        self.scopes = self.spans is not None and self.spans.policy.scopes and self.method.score.scores_within_spans
        self._check_spans()

    def _check_spans(self) -> None:
        """Raise what is certain before any text is known; the rest is found out when a layer is compressed."""
        when, slots = self.method.when, self.budget.slots
        if self.spans is None or self.spans.policy.on_overflow != "error" or slots is None:
            return
        least = self.spans.least(self.method.sinks)
        if slots < least and (when.prefill is not None or when.every is not None):
            raise BudgetError(
                f"budget of {slots} slots per head is below the {least} tokens of the protected spans and the "
                f"{self.method.sinks} sinks. Give at least {least}, protect less, or choose "
                "SpanPolicy(on_overflow='grow') or 'trim'."
            )

    @property
    def stats(self) -> dict[str, float]:
        """What is kept per slot, and the value a new slot starts with."""
        score = self.method.score
        return {name: x.start for name, x in (score.stats | (score.span_stats if self.scopes else {})).items()}

    def index(self, rows: Tensor) -> None:
        """Row i becomes the present row ``rows[i]``."""
        self.clock.index(rows)
        if self.spans is not None:
            self.spans.index(rows)

    def layer_budget(self, layer: Layer) -> Tensor:
        """(B,) int64: slots per KV head that ``layer`` may hold on average now, at least 1."""
        place, seen, allocate = layer.place, self.clock.seen, self.method.allocate
        assert seen is not None
        content, extra = slot_bytes(layer)
        reserved = content * self.window_tokens * len(seen)
        mean = self.budget.per_head(seen, (content + extra) * place.ranks, reserved)
        # Every layer holds the protected spans: what layers divide among themselves is the rest.
        held = 0 if self.spans is None else self.spans.protected_tokens(seen)
        mine = allocate.layer_budget(mean - held, place.rank, place.ranks, seen - held).floor().long() + held
        # Where every token fits, no layer gives any up, however the allocation slopes.
        return mine.clamp_min(1).where(mean < seen, seen)


def slot_bytes(layer: Layer) -> tuple[int, int]:
    """Bytes that one slot of every KV head of ``layer`` takes for one row: its content, and what is kept beside it
    (position, votes where slots merge, statistics)."""
    part, method = layer.part(), layer.plan.method
    heads = part.keys.shape[1]
    content = sum(x.shape[-1] * x.element_size() for x in (part.keys, part.values))
    return heads * content, heads * (4 + 4 * method.reduce.merges + 4 * len(layer.plan.stats))
