"""Leverage of keys, blended with the attention of blocks of the text in which every token sees all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from keepkv.core.options import Amount, Count, Positive, Queries, Window
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import temp_elements
from keepkv.observe.lengths import lengths
from keepkv.observe.sketched_leverage import sketched_leverage
from keepkv.observe.window import remember, window
from keepkv.score.base import Score, register_score

STAT = "block_attention"
NEVER = -1.0  # a slot to whose block no query is known: attention is not negative


@register_score("compactor")
@dataclass(frozen=True)
class Compactor(Score):
    """Compactor (arXiv 2507.08143): λ·z(ℓ) + z(a), z to mean 0 and variance 1 over the heads and slots of a row.

        ℓ_i = x_iᵀ(Σ x xᵀ + ridge·I)⁻¹x_i    x = Φᵀ(k − mean k), k keys before RoPE, Φ (D,``sketch``) Gaussian of
                                             variance 1/sketch for each layer and head; ``sketch=0``: Φ = I
        a_i = pool(‖v_i‖·mean_g Σ_q p_i(q))  q the queries of the slot's block of ``chunk`` tokens, p their softmax over
                                             the slots of that block, later ones included; mean of 3 neighbours

    p is taken of q·k without the model's scaling, softcap and sinks, as in both codes of the authors (kvpress, and an
    engine of their own with blocks of 128); ``scaled=True`` applies the scaling. The first ``sinks`` and the last
    ``window`` tokens take no part in anything, and get the largest score; blocks are counted from behind the sinks.

    blending: λ. None: the share of tokens that is to leave, as in kvpress, or 0.35, its fallback, where no budget is
    known; 0: no leverage is looked at. ridge: absolute, as in kvpress; raised where sums of squares would be too large
    for it to be more than rounding.

    Statistic ``block_attention``: mean_g Σ_q p. A block is added up once its last query is there and outside the
    window; until then the last chunk + window queries are remembered. So chunks of a prompt make no difference, nor
    does padding: all is counted in positions. An incomplete block is added up for the queries it has. Not in the paper,
    which compresses a prompt once: of a block that a compression came across, the larger of what its parts gave counts
    if not all of its queries are at hand any more, and so does the largest of slots that merge: a sum would take the
    mark of a slot of which nothing is known for a value. A slot to whose block no query is known has z(a) = 0.

    A slot of p votes counts p times in ℓ and as a target of p. Not as published: the rest of a last block that is not
    full, which kvpress fills with zeros that take part in the softmax, is left out.
    """

    signed: ClassVar[bool] = True

    blending: Amount | None = None
    chunk: Window = 256
    sketch: Queries = 48
    ridge: Positive = 1e-2
    scaled: bool = False
    sinks: Count = 8
    window: Queries = 4

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(NEVER, "max")}
    observes: ClassVar[bool] = True

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        return self.blending != 0

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.chunk + self.window}

    def observe(self, view: LayerView) -> None:
        queries, positions = view.queries, view.query_positions
        before = (view.seen - (positions >= 0).sum(-1)).tolist()
        if any(self._complete(a) < self._complete(b) for a, b in zip(before, view.seen.tolist(), strict=True)):
            if "window" in view.state:
                held, held_at = window(view, self.chunk + self.window)
                queries, positions = torch.cat((held, queries), dim=2), torch.cat((held_at, positions), dim=1)
            for row, (old, new) in enumerate(zip(before, view.seen.tolist(), strict=True)):
                for block in range(self._complete(old), self._complete(new)):
                    self._add_up(view, queries, positions, row, block, view.slots.stats[STAT])
        remember(view, self.chunk + self.window)

    def __call__(self, view: LayerView) -> Tensor:
        slots, inside = view.slots, self.inside(view)
        total = slots.stats[STAT].clone()
        queries, positions = window(view, self.chunk + self.window)
        for row, seen in enumerate(view.seen.tolist()):
            self._add_up(view, queries, positions, row, self._complete(seen), total)
        view.memo[STAT] = total  # what the queries that are forgotten after a compression have given
        known = inside & (total >= 0)
        length = lengths(slots.values)
        # What is left out is zeros, as the border of the pooling is: a padded row scores as it does alone.
        pooled = avg_pool1d((total * length).masked_fill(~known, 0.0), 3, stride=1, padding=1)
        score = standardized(pooled, known).float()
        if self.blending != 0:
            leverage = sketched_leverage(view, inside, self.sketch, self.ridge)
            score += self._blending(view)[:, None, None] * standardized(leverage, inside).float()
        best = score.masked_fill(~inside, float("-inf")).amax((1, 2), keepdim=True)
        return torch.where(inside, score, best.masked_fill(best.isneginf(), 0.0))

    def inside(self, view: LayerView) -> Tensor:
        """(B,H,S) bool: slots that are neither among the sinks nor in the window."""
        positions = view.slots.positions
        return (positions >= self.sinks) & (positions < (view.seen - self.window)[:, None, None])

    def _blending(self, view: LayerView) -> Tensor:
        """λ of each row, (B,)."""
        if self.blending is None and view.budget is not None:
            return (1 - view.budget / view.seen.clamp(min=1)).clamp(min=0)
        return torch.full_like(view.seen, 0.35 if self.blending is None else self.blending, dtype=torch.float32)

    def _complete(self, seen: int) -> int:
        """Blocks of a row of ``seen`` tokens to which nothing is added any more."""
        return max(0, seen - self.sinks - self.window) // self.chunk

    def _add_up(self, view: LayerView, queries: Tensor, positions: Tensor, row: int, block: int, into: Tensor) -> None:
        """Set, for the slots of a block of a row, what they receive from its queries among ``queries`` (B,H*G,T,D) at
        ``positions`` (B,T): in ``into`` (B,H,S)."""
        start = self.sinks + block * self.chunk
        stop = min(start + self.chunk, int(view.seen[row]) - self.window)
        asking = ((positions[row] >= start) & (positions[row] < stop)).nonzero()[:, 0]
        at = view.slots.positions[row]
        member = (at >= start) & (at < stop)  # (H,S)
        columns = member.any(0).nonzero()[:, 0]
        if not len(asking) or not len(columns):
            return
        near, g, t = slice(int(columns[0]), int(columns[-1]) + 1), view.query_groups, len(asking)
        step = max(1, temp_elements(queries) // (g * t * (near.stop - near.start)))
        for first in range(0, len(at), step):
            some = slice(first, first + step)
            attn = self._attn(view, queries[row, first * g : (first + step) * g, asking], row, some, near, member)
            old = into[row, some, near]
            # All queries of the block are at hand, or those that are not have given what is there already.
            new = attn if t == stop - start else attn.maximum(old)
            into[row, some, near] = torch.where(member[some, near], new.to(old.dtype), old)

    def _attn(self, view: LayerView, queries: Tensor, row: int, heads: slice, near: slice, member: Tensor) -> Tensor:
        """mean_g Σ_q p, (h,n), of queries (h*G,t,D) over the slots ``member`` (H,S) of some heads and columns."""
        keys, votes = view.slots.keys[row, heads, near], view.slots.log_votes[row, heads, near]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        bias = votes.masked_fill(~member[heads, near], float("-inf"))[:, None].to(dtype)
        asking = queries.to(dtype).reshape(keys.shape[0], -1, queries.shape[-1])
        u = asking @ keys.to(dtype).mT
        total = self._sum((u * view.scaling if self.scaled else u).add_(bias), queries.shape[1])
        return total.nan_to_num_(0.0) / view.query_groups  # NaN where a head holds nothing of the block

    def _sum(self, u: Tensor, queries: int) -> Tensor:
        """Σ p (h,n) over the rows of logits u (h,G*queries,n)."""
        return u.softmax(-1).sum(1)


def standardized(x: Tensor, counted: Tensor) -> Tensor:
    """x (B,H,S) with mean 0 and variance 1 over the entries of a row that are ``counted`` (B,H,S), 0 elsewhere."""
    n = counted.sum((1, 2), keepdim=True)
    mean = x.masked_fill(~counted, 0.0).sum((1, 2), keepdim=True) / n.clamp(min=1)
    away = (x - mean).masked_fill(~counted, 0.0)
    deviation = (away.square().sum((1, 2), keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return away / deviation.clamp(min=1e-6)
