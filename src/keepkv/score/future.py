"""How much the outputs of queries to come would change without a slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.errors import KeepKVError
from keepkv.score.attention import ROWS, TILE, of_heads, weights
from keepkv.score.base import Score, register_score
from keepkv.score.sample import remember_sample, sample
from keepkv.slots import EMPTY, LayerView
from keepkv.spread import spread

EPS = 1e-6  # of a slot that has all attention: its w would be infinite
MASS = "future_mass"  # view.memo: mean attention of each slot, of which merges take the logarithm


@register_score("future")
@dataclass(frozen=True)
class Future(Score):
    """S_i = E_q[(a_i/(1−a_i))²·‖v_i − o(q)‖²]: mean squared change of a head's output if slot i alone were dropped.

    q are ``queries`` of the row's own queries, spread evenly over the text behind its first ``skip`` share, turned back
    by RoPE to position 0 and on to n + Δ, n the tokens seen and Δ between 1 and ``span``: queries of tokens to come, if
    those are distributed as the text's are before RoPE. a_i is the attention of q on slot i, o(q) its output.

    The mean over query heads of the KV head. Computed in Gram form, Σ_q w²(‖v‖² − 2 v·o + ‖o‖²) with w = a/(1−a): two
    matrix products and no queries × slots × D tensor. moment: the exponent, 2 as above; 1 takes w‖v − o‖² instead.
    """

    queries: int = 64
    span: int = 128
    skip: float = 0.125
    moment: int = 2

    needs_rope: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.queries < 1 or self.span < 1:
            raise KeepKVError(f"{self}: queries and span must be at least 1")
        if not 0 <= self.skip < 1:
            raise KeepKVError(f"{self}: skip must lie in [0, 1)")
        if self.moment not in (1, 2):
            raise KeepKVError(f"{self}: moment must be 1 or 2")

    def observe(self, view: LayerView) -> None:
        remember_sample(view, self.queries)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = self.ahead(view)
        score, mass = moments(view, queries, positions, self.moment)
        view.memo[MASS] = mass
        return score

    def masses(self, view: LayerView) -> Tensor:
        """ln of the mean attention of each slot (B,H,S) over the queries to come."""
        if MASS not in view.memo:
            self(view)
        return view.memo[MASS].log()

    def ahead(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Queries (B,H*G,R,D) after RoPE at positions (B,R) behind the text; ``EMPTY`` where there are fewer than R."""
        queries, positions = sample(view, self.queries)
        early = positions < (view.seen[:, None] * self.skip).long()
        some = (~early).any(-1, keepdim=True)  # a text of which all is early keeps what it has
        used = (positions >= 0) & (~early | ~some)
        return ahead(view, queries, positions.masked_fill(~used, EMPTY)[:, None], self.span)


def ahead(view: LayerView, queries: Tensor, positions: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """``queries`` (B,H*G,R,D), after RoPE at ``positions`` (B,H*G,R) or (B,1,R), turned to positions (B,R) behind the
    text: n + Δ, n the tokens seen and Δ between 1 and ``span``; ``EMPTY`` where they are."""
    # Another even sequence than that of the positions, so that where a query stood says nothing about where it goes.
    first = positions[:, 0]
    there = ((spread(first, 2) * span >> 32) + (view.seen[:, None] + 1)).masked_fill_(first < 0, EMPTY)
    if view.rope is not None:
        queries = view.rope.turn(queries, there[:, None] - positions)
    return queries, there


def moments(view: LayerView, queries: Tensor, positions: Tensor, moment: int = 2) -> tuple[Tensor, Tensor]:
    """Mean of (a/(1−a))^moment·‖v − o‖^moment, and of a, over queries (B,H*G,R,D) at positions (B,R) behind every slot:
    both (B,H,S), float32 (float64 for float64). Means are over real queries and the query heads of a KV head."""
    (b, h, s), g = view.slots.shape, view.groups
    dtype = torch.promote_types(view.slots.keys.dtype, torch.float32)
    rows = queries.shape[2]
    score, mass = (torch.zeros(b, h, s, dtype=dtype, device=queries.device) for _ in range(2))
    count = ((positions >= 0).sum(-1).clamp(min=1) * g).to(dtype)[:, None, None]
    # One tile is some queries of some heads: their weights stay in a processor's cache.
    heads = max(1, min(h, TILE // max(1, b * g * s * min(rows, ROWS))))
    tile = max(1, TILE // max(1, b * g * s * heads))
    for first in range(0, h, heads):
        some = slice(first, first + heads)
        near = of_heads(view, first, heads)
        values = near.slots.values.to(dtype)
        gram = torch.zeros((), dtype=dtype)
        for start in range(0, rows, tile):
            part = slice(start, start + tile)
            a = weights(near, queries[:, first * g : (first + heads) * g, part], positions[:, part]).flatten(2, 3)
            out = a @ values  # (B,h,G·r,D)
            mass[:, some] += a.sum(2)
            w = a.div_(1.0 - a + EPS)
            if moment == 1:
                distance = values.square().sum(-1)[:, :, None] - 2 * out @ values.mT + out.square().sum(-1)[..., None]
                score[:, some] += (w * distance.clamp_(min=0.0).sqrt_()).sum(2)
                continue
            beside = torch.cat((out, out.square().sum(-1, keepdim=True), torch.ones_like(out[..., :1])), dim=-1)
            gram = gram + w.square_().mT @ beside  # (B,h,S,D+2)
        if moment == 2:
            cross = (values * gram[..., :-2]).sum(-1)
            score[:, some] = (gram[..., -1] * values.square().sum(-1) - 2 * cross + gram[..., -2]).clamp_(min=0.0)
    return score / count, mass / count
