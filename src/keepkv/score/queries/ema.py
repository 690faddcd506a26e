"""Predicted attention: an exponential moving average of the attention mass of each slot (arXiv 2504.09936, Eq. 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Queries, above, below
from keepkv.core.slots import EMPTY, LayerView
from keepkv.core.stats import Stat
from keepkv.observe.masses import latest, log_masses, recent
from keepkv.observe.window import remember
from keepkv.score.base import Score, register_score

STAT = "log_ema"  # per slot: ln of the predicted mass


@register_score("ema")
@dataclass(frozen=True)
class Ema(Score):
    """Mass of slot i predicted at query t: m_t = Σ_j (1−α)α^{t−j} a_j / (1−α^c), over the c queries that saw it.

    A forward of more than one token starts the average anew over the last ``window + 1`` queries of the row, which
    are remembered between forwards: chunked prefill equals one-shot prefill, unless a chunk holds a single token,
    where the window keeps one query more (a weight of α^window). A forward of one token continues it with
    S_t = ln(α e^{S_{t−1}} + (1−α) a_t), kept normalised as S_t − ln(1−α^c), so that slots that merge simply add up.
    c follows from positions and the row's first query of the average (``view.state["ema_start"]``).

    a is attention after softmax, averaged over the G query heads of the slot. The paper averages e^{q·k} itself; that
    lets the query of largest norm decide alone, overflows where logits reach 89, and makes heads incomparable.
    alpha, window: not given in the paper.
    """

    alpha: Annotated[float, above(0), below(1)] = 0.9
    window: Queries = 32

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(float("-inf"), "logsumexp")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.window + 1}

    def observe(self, view: LayerView) -> None:
        remember(view, self.window + 1)
        stat, start = view.slots.stats[STAT], view.state.get("ema_start")
        real = (view.query_positions >= 0).any(-1)
        if start is None:
            start = view.state["ema_start"] = torch.full_like(view.seen, EMPTY)
        elif view.query_positions.shape[1] == 1:
            stat.copy_(torch.where(real[:, None, None], self._continue(view, stat, start), stat))
            return
        past = recent(view, self.window + 1, self.alpha)
        stat.copy_(torch.where(real[:, None, None], log_masses(view, past)[0], stat))
        first = past.positions.masked_fill(past.positions < 0, torch.iinfo(past.positions.dtype).max).amin(-1)
        start.copy_(torch.where(real, first, start))

    def _continue(self, view: LayerView, stat: Tensor, start: Tensor) -> Tensor:
        """The statistic (B,H,S) after one more query per row."""
        now = log_masses(view, latest(view))[0] if view.weights is None else view.weights.mean(2).log()
        # Queries that saw a slot: from its own position or the first one averaged, whichever is later, up to now.
        count = view.query_positions[:, None] + 1 - view.slots.positions.maximum(start[:, None, None])
        before = stat.to(now.dtype) + self._log_counter(count - 1, now.dtype)
        total = torch.logaddexp(before + math.log(self.alpha), now + math.log1p(-self.alpha))
        return total - self._log_counter(count.clamp(min=1), now.dtype)

    def _log_counter(self, count: Tensor, dtype: torch.dtype) -> Tensor:
        """ln N = ln(1 − α^count); −inf for no query."""
        return torch.log(-torch.expm1(count.clamp(min=0).to(dtype) * math.log(self.alpha)))

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats[STAT].exp()
