"""Leverage of a key among its head's keys (before RoPE), times the attention it may receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from keepkv.core.options import MOST, Amount, Kernel, Positive, Queries, between
from keepkv.core.slots import LayerView
from keepkv.kernels.leverage import key_leverage
from keepkv.observe.attention import received, strongest
from keepkv.observe.window import remember, window
from keepkv.score.base import Score, register_score

MASS = "leverage_mass"  # view.memo: mean attention of each slot, of which merges take the logarithm


@register_score("leverage")
@dataclass(frozen=True)
class Leverage(Score):
    """S_i = ℓ_i·(A_i + floor·Ā): leverage of a key's content, times the attention that some query may give it.

        ℓ_i = k̃_iᵀ(Σ + λI)⁻¹k̃_i     k̃ keys before RoPE less their mean, Σ their covariance, λ = ``ridge``·tr Σ/D
        A_i = max_q max_j a_j(q)     over the last ``queries`` queries of all query heads of the KV head, and the
                                     ``kernel`` slots j around i; Ā its mean over slots

    Mean and covariance of long contexts are those of ``sample`` slots, evenly spaced.

    Leverage scores are used for caches by CurDKV (arXiv 2509.15038), of keys as they are cached, and by Compactor
    (arXiv 2507.08143), before RoPE as here, added to the text's own attention (``score.compactor``). With RoPE undone,
    what is common to a text is common wherever it stands. Σ w_i ℓ_i, w_i the share of votes, is the effective dimension
    of a head's keys, tr Σ(Σ + λI)⁻¹, whatever their scale: scores of heads and layers can be compared and share one
    budget.

    The attention is that of SnapKV's window (arXiv 2404.14469), but the largest rather than the mean, and over a wider
    neighbourhood. Ā keeps a slot that the window does not ask for from losing everything: what questions will be is not
    known. ``queries=0``: leverage alone.

    A slot of p votes counts p times in mean and covariance.
    """

    queries: Queries = 16
    kernel: Kernel = 13
    floor: Amount = 5.0
    ridge: Positive = 1.0
    sample: Annotated[int, between(2, MOST)] = 1024

    needs_rope: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.queries}

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.queries > 0

    def observe(self, view: LayerView) -> None:
        if self.queries:
            remember(view, self.queries)

    def __call__(self, view: LayerView) -> Tensor:
        slots, rope, keys = view.slots, view.rope, view.slots.keys
        if rope is not None and (places := view.key_places()) is not slots.positions:
            keys, rope = rope.unrotate(keys.float(), places), None  # the kernel turns by the index alone
        score = key_leverage(keys, slots.positions, slots.log_votes, ridge=self.ridge, rope=rope, sample=self.sample)
        if not self.queries:
            return score
        peak = strongest(view, *window(view, self.queries)).amax(2)  # 0 at empty slots
        peak = max_pool1d(peak, self.kernel, stride=1, padding=self.kernel // 2)
        total = (peak * slots.valid).sum(-1, keepdim=True)
        return score * (peak + self.floor * total / slots.lengths.clamp(min=1)[..., None])

    def masses(self, view: LayerView) -> Tensor | None:
        """ln of the mean attention of each slot (B,H,S) over the window."""
        if not self.queries:
            return None
        if MASS not in view.memo:
            queries, positions = window(view, self.queries)
            count = (positions >= 0).sum(-1).clamp(min=1)[:, None, None]
            view.memo[MASS] = received(view, queries, positions).mean(2) / count
        mass = view.memo[MASS]
        return mass.clamp_min(torch.finfo(mass.dtype).tiny).log()  # what underflows is little, not nothing: ln 0 − ln 0
