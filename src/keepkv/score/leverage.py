"""What no other slot can say, and queries may ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.kernels.dispatch import choose
from keepkv.score.attention import received, room, strongest, tiles
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
        score = leverage(view, self.ridge)
        if not self.references:
            return score
        asked, queries, positions = self.ahead(view)
        if choose(None, queries, view.slots.keys) == "triton":
            peak = strongest(asked, queries, positions)[:, :, 0]
        else:
            peak, view.memo[MASS] = _peak_and_mass(asked, queries, positions)
        valid = view.slots.valid
        mean = (peak * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
        return score * (peak + mean).pow(self.power)

    def masses(self, view: LayerView) -> Tensor | None:
        """ln of the mean attention of each slot (B,H,S) over the references."""
        if not self.references:
            return None
        if MASS not in view.memo:
            asked, queries, positions = self.ahead(view)
            view.memo[MASS] = received(asked, queries, positions)[:, :, 0] / _count(positions)
        return view.memo[MASS].log()

    def ahead(self, view: LayerView) -> tuple[LayerView, Tensor, Tensor]:
        """References (B,H,R,D) after RoPE at positions (B,R) behind the text, ``EMPTY`` where there are fewer, and
        ``view`` as they ask it, each KV head with one query head."""
        queries, positions = ahead(view, *distinct(view, self.references), self.span)
        return replace(view, queries=queries, sinks=None, weights=None), queries, positions


def leverage(view: LayerView, ridge: float) -> Tensor:
    """ℓ (B,H,S) of ``Leverage``, float32 (float64 for float64); 0 at empty slots."""
    slots = view.slots
    (b, h, s), d = slots.shape, slots.keys.shape[-1]
    dtype = torch.promote_types(slots.keys.dtype, torch.float32)
    share = slots.log_votes.masked_fill(~slots.valid, float("-inf")).softmax(-1).nan_to_num(0.0).to(dtype)
    out = torch.empty(b, h, s, dtype=dtype, device=slots.keys.device)
    step = max(1, min(h, room(slots.keys) // max(1, b * s * d)))
    for first in range(0, h, step):
        some = slice(first, first + step)
        keys, w = slots.keys[:, some].to(dtype, copy=True), share[:, some, :, None]
        if view.rope is not None:
            keys = view.rope.unrotate(keys, slots.positions[:, some].clamp(min=0))
        keys -= w.mT @ keys
        sigma = (keys * w).mT @ keys
        scale = sigma.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(dtype).tiny)
        # Scaled to 1 first, so that neither tiny nor huge keys leave the range of float32.
        sigma = sigma / scale[..., None, None] + ridge * torch.eye(d, dtype=dtype, device=keys.device)
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(sigma), keys.mT, upper=False)
        out[:, some] = torch.linalg.vecdot(white, white, dim=-2) / scale[..., None]
    return out.masked_fill_(~slots.valid, 0.0)


def _peak_and_mass(view: LayerView, queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and mean attention (B,H,S) over queries (B,H,R,D) at positions (B,R)."""
    peak = torch.zeros(view.slots.shape, dtype=torch.promote_types(queries.dtype, torch.float32), device=queries.device)
    mass = torch.zeros_like(peak)
    for heads, _, end, given in tiles(view, queries, positions):
        seen, given = peak[:, heads, :end], given[:, :, 0]
        seen.copy_(seen.maximum(given.amax(2)))
        mass[:, heads, :end] += given.sum(2)
    return peak, mass / _count(positions)


def _count(positions: Tensor) -> Tensor:
    """(B,1,1): real queries of each row, at least 1."""
    return (positions >= 0).sum(-1).clamp(min=1)[:, None, None]
