"""How much of the values that queries will ask for is a slot's alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Amount, Count, Window
from keepkv.core.slots import LayerView
from keepkv.observe.gaussian import query_gaussian, remember_queries
from keepkv.score.base import Score, register_score

FLOOR = 1e-6  # is added to every weight, so that no direction is without any (kvpress)


@register_score("cap")
@dataclass(frozen=True)
class Cap(Score):
    """CapKV (arXiv 2604.25975): S_i = w_i·v_iᵀA⁻¹v_i, A = I + Σ w_j v_j v_jᵀ, w_i = e^(``tau``·cos(k_i, μ)).

    μ is the mean query of the row before RoPE, the first ``n_sink`` left out, turned by the mean rotation of the next
    ``horizon`` positions, as of expected attention. The largest w of a query head is 1. Mean over the query heads of
    the KV head; over the slots at position ≥ n_sink.

    As in kvpress, whose code is the authors': the paper takes k·μ instead of the cosine and turns nothing. v stands
    for what a slot adds to the output. A slot of p votes counts p times in A.
    """

    tau: Amount = 5.0
    horizon: Window = 512
    n_sink: Count = 4

    needs_rope: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        remember_queries(view, self.n_sink, False)

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        mean, _ = query_gaussian(view, self.n_sink, False, 0.0)
        if view.rope is not None:
            mean = view.rope.average(mean, view.seen, self.horizon)
        mean = torch.nn.functional.normalize(mean.float(), dim=-1)
        mean = mean.view(*slots.shape[:2], -1, mean.shape[-1])  # (B,H,G,D)
        counted = slots.valid & (slots.positions >= self.n_sink)
        heads = (self._head(view, mean[:, h], counted[:, h], h) for h in range(slots.shape[1]))
        return torch.stack(list(heads), dim=1)

    def _head(self, view: LayerView, mean: Tensor, counted: Tensor, head: int) -> Tensor:
        """S (B,S) of a KV head, given mean (B,G,D) and counted (B,S); 0 at other slots."""
        slots = view.slots
        keys = torch.nn.functional.normalize(slots.keys[:, head].float(), dim=-1)
        values = slots.values[:, head].float().masked_fill(~counted[..., None], 0.0)[:, None]  # (B,1,S,Dv)
        along = (self.tau * (mean @ keys.mT)).masked_fill(~counted[:, None], float("-inf"))  # (B,G,S)
        peak = along.amax(-1, keepdim=True)
        weight = (along - peak.masked_fill(peak.isneginf(), 0.0)).exp()
        share = (weight + FLOOR) * slots.log_votes[:, head].exp()[:, None].float()
        one = torch.eye(values.shape[-1], device=values.device)
        capacity = one + values.mT @ (share[..., None] * values)  # (B,G,Dv,Dv)
        broken = ~capacity.isfinite().all(-1).all(-1)  # a solve that fails would end that of the whole batch
        capacity = torch.where(broken[..., None, None], one, capacity)
        solved = torch.linalg.solve(capacity, values.mT.expand(*capacity.shape[:3], -1))  # (B,G,Dv,S)
        leverage = (values.mT * solved).sum(2).masked_fill(broken[..., None], float("nan"))
        score: Tensor = (weight * leverage).mean(1)
        return score
