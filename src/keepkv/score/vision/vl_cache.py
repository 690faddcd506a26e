"""Attention of the text that follows what is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Share
from keepkv.core.slots import EMPTY, LayerView
from keepkv.core.stats import Stat
from keepkv.core.tokens import KIND, TEXT
from keepkv.errors import CacheStateError
from keepkv.observe.attention import received
from keepkv.observe.density import large_entries
from keepkv.score.base import Score, register_score

COUNTS, OPEN = "post_vision_entries", "post_vision_open"


@register_score("vl-cache")
@dataclass(frozen=True)
class VLCache(Score):
    """VL-Cache (arXiv 2410.23317): attention that a slot has received from the queries behind the last vision token.

    Statistic ``post_vision``: Σ over these queries, mean over the query heads of the KV head. A later image begins
    anew. Where nothing follows the last image yet, the last query counts; without vision all do, as in ``h2o``.

    It tells the density of a layer, Σ over these queries and all heads of #(A ≥ ``part`` · max of the row) / #causal:
    1 − the paper's sparsity, whose ``part`` is 1 %.
    """

    part: Share = 0.01
    stats: ClassVar[dict[str, Stat]] = {"post_vision": Stat(0.0, "sum")}
    observes: ClassVar[bool] = True
    follows_decode: ClassVar[bool] = True
    tells_density: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        positions = view.query_positions
        asked, anew, still_open = self._asked(view)
        counts = view.state.get(COUNTS)
        if counts is None or len(counts) != len(positions):
            counts = torch.zeros(len(positions), 2, dtype=torch.float64, device=positions.device)
        mass = view.slots.stats["post_vision"]
        mass.masked_fill_(anew[:, None, None], 0.0)
        decoded = positions.shape[1] == 1 and not view.prompt
        queries = view.queries if decoded else view.queries.clone()  # weights are of all queries, whatever ``asked``
        mass.add_(received(view, queries, asked).mean(2))
        found = torch.stack(large_entries(view, queries, asked, self.part), -1)
        view.state[COUNTS] = counts.masked_fill(anew[:, None], 0.0) + found
        view.state[OPEN] = still_open[:, None].to(torch.float32)

    def _asked(self, view: LayerView) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (B,T) of the queries that count, ``EMPTY`` for others, and (B,) bool: rows that begin anew, and
        rows whose last query counts though it is vision."""
        positions = view.query_positions
        real = positions >= 0
        seen = torch.zeros_like(real)
        if view.tokens is not None and (view.prompt or positions.shape[1] > 1):  # what is decoded is text
            seen = real & (view.tokens.of(positions)[..., KIND] != TEXT)
        last = positions.masked_fill(~seen, EMPTY).amax(-1, keepdim=True)
        counted = real & (positions > last)
        ends = seen.any(-1) & ~counted.any(-1)
        counted |= ends[:, None] & (positions == last) & real
        before = view.state.get(OPEN)
        was_open = torch.zeros_like(ends) if before is None else before[:, 0] > 0
        anew = seen.any(-1) | (was_open & counted.any(-1))
        return positions.masked_fill(~counted, EMPTY), anew, torch.where(real.any(-1), ends, was_open)

    def __call__(self, view: LayerView) -> Tensor:
        return view.slots.stats["post_vision"]

    def density(self, view: LayerView) -> Tensor:
        counts = view.state.get(COUNTS)
        if counts is None:
            raise CacheStateError(
                "the score 'vl-cache' has seen no query since the last compression, by which layers share the budget. "
                "Make the cache with When('deferred') or When(every=…), feed text, and then compress."
            )
        return counts[:, 0] / counts[:, 1].clamp(min=1.0)
