"""What no other slot can say, and queries may ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.kernels.leverage import leverage
from keepkv.score.attention import received, strongest
from keepkv.score.base import Score, register_score
from keepkv.score.distinct import distinct, remember_distinct
from keepkv.score.future import ahead
from keepkv.slots import LayerView

MASS = "leverage_mass"  # view.memo: mean attention of each slot, of which merges take the logarithm


@register_score("leverage")
@dataclass(frozen=True)
class Leverage(Score):
    """S_i = ℓ_i·(A_i + Ā)^power: leverage of a key's content, times the attention that some query may give it.

        ℓ_i = k̃_iᵀ(Σ + λI)⁻¹k̃_i     k̃ keys before RoPE less their mean, Σ their covariance, λ = ``ridge``·tr Σ/D
        A_i = max_q a_i(q)           over ``references`` queries of each KV head; Ā its mean over slots

    Leverage scores are used for caches by CurDKV (arXiv 2509.15038), of keys as they are cached, and by Compactor
    (arXiv 2507.08143), before RoPE as here, added to the text's own attention (``score.compactor``). With RoPE undone,
    what is common to a text is common wherever it stands. Σ w_i ℓ_i, w_i the share of votes, is the effective dimension
    of a head's keys, tr Σ(Σ + λI)⁻¹, whatever their scale: scores of heads and layers can be compared and share one
    budget.

    References: those of the row's own queries, of all query heads of the KV head, that are least like the others
    (``score.distinct``), turned back by RoPE and on to positions 1 to ``span`` behind the text. Ā keeps a slot that
    none of them asks for from losing everything: what questions will be is not known. ``references=0``: leverage
    alone. A model's attention sinks are left out of A.

    A slot of p votes counts p times in mean and covariance.
    """

    references: int = 512
    span: int = 128
    ridge: float = 1.0
    power: float = 0.5

    needs_rope: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.references < 0 or self.span < 1:
            raise KeepKVError(f"{self}: references must be at least 0 and span at least 1")
        if not self.ridge > 0 or not 0 <= self.power:
            raise KeepKVError(f"{self}: ridge must be larger than 0 and power at least 0")

    def observe(self, view: LayerView) -> None:
        if self.references:
            remember_distinct(view, self.references)

    def __call__(self, view: LayerView) -> Tensor:
        slots = view.slots
        score = leverage(slots.keys, slots.positions, slots.log_votes, ridge=self.ridge, rope=view.rope)
        if not self.references:
            return score
        asked, queries, positions = self.ahead(view)
        peak = strongest(asked, queries, positions)[:, :, 0]
        mean = peak.sum(-1) / slots.lengths.clamp(min=1)  # empty slots have none
        return score * (peak + mean[..., None]).pow(self.power)

    def masses(self, view: LayerView) -> Tensor | None:
        """ln of the mean attention of each slot (B,H,S) over the references."""
        if not self.references:
            return None
        if MASS not in view.memo:
            asked, queries, positions = self.ahead(view)
            count = (positions >= 0).sum(-1).clamp(min=1)[:, None, None]
            view.memo[MASS] = received(asked, queries, positions)[:, :, 0] / count
        return view.memo[MASS].log()

    def ahead(self, view: LayerView) -> tuple[LayerView, Tensor, Tensor]:
        """References (B,H,R,D) after RoPE at positions (B,R) behind the text, ``EMPTY`` where there are fewer, and
        ``view`` as they ask it, each KV head with one query head."""
        queries, positions = ahead(view, *distinct(view, self.references), self.span)
        return replace(view, queries=queries, sinks=None, weights=None), queries, positions
