"""Two stages: the best of another score, and of the rest those whose values the output projection makes longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.allocate.adakv import AdaKV
from keepkv.allocate.base import Allocate
from keepkv.allocate.select import keep_mask, ranks, tiers
from keepkv.allocate.uniform import Uniform
from keepkv.core.options import Amount, Share
from keepkv.core.slots import LayerView
from keepkv.errors import KeepKVError
from keepkv.observe.outputs import projected_lengths
from keepkv.score.base import ALL_OF_IT, Wrapped, name_of

CHOSEN = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Critical(Wrapped):
    """CriticalKV (arXiv 2502.03805): the share ``first`` of a head's budget by another score s, the rest by

        (s_i + ``epsilon``)·‖v_i W‖₁    W the output projection; mean over the query heads of the KV head

    adaptive: heads share the budget of the layer by s, as AdaKV does with the safeguard ``adaptive``; slots within the
    budget of their head then have the largest score, so that AdaKV keeps just these, and what the safeguard gives a
    head is chosen by s alone. None: all heads have the same. Protected slots are the first of a head's budget. s must
    not be negative.
    """

    first: Share = 0.5
    epsilon: Amount = 1e-4
    adaptive: Share | None = None

    needs_output: ClassVar[bool] = True
    passed_on: ClassVar[tuple[str, ...]] = tuple(name for name in ALL_OF_IT if name != "needs_output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score.signed:
            raise self._below_zero("gives some below 0")

    def __call__(self, view: LayerView) -> Tensor:
        own = self.score(view).float()
        if bool((view.slots.valid & (own < 0)).any()):
            raise self._below_zero("gave some below 0, though it is not declared as signed")
        product = (own + self.epsilon) * projected_lengths(view)
        if view.budget is None:
            return product
        heads: Allocate = Uniform() if self.adaptive is None else AdaKV(self.adaptive)
        counts = heads(own, view, view.budget)
        chosen = ranks(own, tiers(view)) < self._first(counts, view.budget)[..., None]
        second = product.masked_fill(chosen, CHOSEN)
        return second if self.adaptive is None else second.masked_fill(keep_mask(second, counts, view), CHOSEN)

    def _below_zero(self, what: str) -> KeepKVError:
        return KeepKVError(
            f"CriticalKV multiplies scores by lengths; {name_of(self.score)!r} {what}. Choose a score that is not "
            "negative, such as 'snapkv', 'h2o' or 'curdkv'."
        )

    def _first(self, counts: Tensor, budget: Tensor) -> Tensor:
        """(B,H): how many of the ``counts`` (B,H) of each head s alone chooses, given the mean budget (B,)."""
        half = (self.first * counts.double() + 1e-9).floor()  # 0.29 * 100 is 28.999…
        if self.adaptive is None:
            return half.clamp(min=float(self.first > 0))
        return half.maximum((self.adaptive * budget[:, None].double() + 1e-9).floor())
