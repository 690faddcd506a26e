"""Layer views and loop references that the merge tests share. Everything here is float64 unless asked otherwise."""

from __future__ import annotations

import math
from typing import ClassVar, get_args

import torch
from torch import Tensor

from keepkv.core.slots import EMPTY, LayerView, Slots
from keepkv.core.stats import Merge, Stat
from keepkv.observe import attention
from keepkv.score.content.random import Random


class Kinds(Random):
    """A score that keeps one statistic of each kind, under the name of the kind."""

    stats: ClassVar[dict[str, Stat]] = {kind: Stat(0.0, kind) for kind in get_args(Merge)}


def add_stats(view: LayerView) -> None:
    """Give ``view`` the statistics of ``Kinds``."""
    view.slots.stats.update({name: torch.randn(view.slots.shape, dtype=torch.float64) for name in Kinds.stats})


def combined(kind: str, members: Tensor) -> Tensor:
    """What a statistic of slots becomes, members (n,), the anchor first."""
    return {"sum": members.sum(), "logsumexp": members.logsumexp(0), "max": members.max(), "anchor": members[0]}[kind]


def make_view(
    seed: int = 0,
    rows: int = 1,
    heads: int = 2,
    groups: int = 1,
    slots: int = 24,
    queries: int = 1,
    dim: int = 16,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    votes: bool = False,
    **options: object,
) -> LayerView:
    """A view after a forward whose last ``queries`` tokens are the newest slots; no padding."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    keys = (normal(rows, heads, slots, dim) + 0.7 * normal(1, heads, 1, dim)).to(dtype)
    values = normal(rows, heads, slots, dim + 2).to(dtype)
    asked = (scale * (normal(rows, heads * groups, queries, dim) + 0.3 * normal(1, heads * groups, 1, dim))).to(dtype)
    log_votes = torch.zeros(rows, heads, slots, dtype=dtype)
    if votes:
        log_votes = torch.randint(1, 9, log_votes.shape, generator=rng).to(dtype).log()
    positions = torch.arange(slots, dtype=torch.int32).expand(rows, heads, slots).clone()
    query_positions = torch.arange(slots - queries, slots).expand(rows, queries).clone()
    return LayerView(
        Slots(keys, values, log_votes, positions),
        asked,
        query_positions,
        torch.full((rows,), slots),
        scaling=1 / math.sqrt(dim),
        **options,  # type: ignore[arg-type]
    )


def padded(view: LayerView, slots: int, queries: int = 0) -> LayerView:
    """The one-row view with empty slots and padded queries put before it, as in a longer batch."""
    s = view.slots

    def front(x: Tensor, count: int, dim: int, fill: float) -> Tensor:
        shape = list(x.shape)
        shape[dim] = count
        return torch.cat((x.new_full(shape, fill), x), dim=dim)

    return LayerView(
        Slots(
            front(s.keys, slots, 2, 3.0),
            front(s.values, slots, 2, 5.0),
            front(s.log_votes, slots, 2, 1.0),
            front(s.positions, slots, 2, EMPTY),
            {name: front(x, slots, 2, 0.0) for name, x in s.stats.items()},
        ),
        front(view.queries, queries, 2, 7.0),
        front(view.query_positions, queries, 1, EMPTY),
        view.seen,
        view.scaling,
        softcap=view.softcap,
        sink_logits=view.sink_logits,
        layer=view.layer,
        seed=view.seed,
        protected=None if view.protected is None else front(view.protected, slots, 2, False),
    )


def output(view: LayerView, slots: Slots, queries: Tensor | None = None) -> Tensor:
    """Attention output (B,H,G,T,Dv) of the view's queries, or of later ones, over ``slots``."""
    queries = view.queries if queries is None else queries
    positions = torch.full((queries.shape[0], queries.shape[2]), 10**6)
    weights = attention.weights(LayerView(slots, queries, positions, view.seen, view.scaling, softcap=view.softcap,
                                          sink_logits=view.sink_logits), queries, positions)  # fmt: skip
    return weights @ slots.values[:, :, None].to(weights.dtype)


def keep_every(view: LayerView, step: int) -> Tensor:
    """(B,H,S) bool: every ``step``-th valid slot, shifted by head."""
    positions = view.slots.positions
    shift = torch.arange(positions.shape[1])[None, :, None]
    return (positions >= 0) & ((positions + shift) % step == 0)


def window_rows(view: LayerView, size: int, alpha: float) -> list[list[tuple[float, Tensor, int]]]:
    """Per row the real last queries as (η, (H*G,D), position), η ∝ alpha^age summing to 1."""
    rows = []
    for b in range(view.queries.shape[0]):
        real = [t for t in range(view.queries.shape[2]) if view.query_positions[b, t] >= 0][-size:]
        eta = [alpha ** (len(real) - 1 - n) for n in range(len(real))]
        rows.append(
            [
                (e / sum(eta), view.queries[b, :, t], int(view.query_positions[b, t]))
                for e, t in zip(eta, real, strict=True)
            ]
        )
    return rows
