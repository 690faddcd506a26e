"""Attention of the last queries of the prompt, pooled over neighbouring slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from keepkv.core.intervals import FAR, at
from keepkv.core.options import Kernel, Window, one_of
from keepkv.core.slots import LayerView
from keepkv.observe.attention import received
from keepkv.observe.window import remember, remember_in_spans, span_window, window
from keepkv.score.base import Score, register_score


@register_score("snapkv")
@dataclass(frozen=True)
class SnapKV(Score):
    """SnapKV (arXiv 2404.14469): attention that a slot before the window receives from the window's queries.

    Mean over the last ``window`` queries of the row, then ``pooling`` ("avg" or "max", ``kernel`` slots, odd) over
    neighbouring slots, then the mean over the query heads of the KV head. The softmax runs over all slots. Slots
    inside the window take no part in pooling and keep their own mean attention: ``Method.window`` keeps them.

    Within spans the window is divided: the last queries of each span vote on the slots before them in the span, which
    are pooled among themselves, and slots of these queries get the largest score of the span (arXiv 2510.00231).
    """

    window: Window = 32
    kernel: Kernel = 5
    pooling: Annotated[str, one_of("avg", "max")] = "avg"
    observes: ClassVar[bool] = True
    scores_within_spans: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.window, "span_window": self.window}

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)

    def observe_spans(self, view: LayerView) -> None:
        remember_in_spans(view, self.window)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        real = (positions >= 0).sum(-1)  # (B,)
        mean = received(view, queries, positions) / real.clamp(min=1).view(-1, 1, 1, 1)
        first = view.seen  # position of the window's first query
        if positions.shape[1]:
            first = positions.where(positions >= 0, view.seen[:, None]).amin(-1)
        before = (view.slots.valid & (view.slots.positions < first[:, None, None]))[:, :, None]
        # Empties and the window are zeros, as the border of the pooling is: a padded row scores as it does alone.
        outside = (mean * before).flatten(0, 1)
        pad = self.kernel // 2
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        pooled = pool(outside, self.kernel, stride=1, padding=pad).view_as(mean)
        return pooled.where(before, mean).mean(2)

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        spans, positions = view.spans, view.slots.positions
        assert spans is not None
        queries, asked = span_window(view, self.window)
        home, voters = spans.find(positions), spans.find(asked)  # (B,H,S), (B,V)
        nothing = torch.zeros_like(spans.starts)
        votes = nothing.scatter_add(1, voters.clamp(min=0), (voters >= 0).long())  # (B,K) queries of each span
        first = spans.ends.scatter_reduce(1, voters.clamp(min=0), torch.where(voters >= 0, asked, FAR), "amin")
        voted = (home >= 0) & (at(votes, home) > 0)
        before = voted & (positions < at(first, home))
        mean = received(view, queries, asked, spans.until(positions)) / at(votes, home).clamp(min=1)[:, :, None]
        pooled = self._pool(mean * before[:, :, None], home).mean(2).masked_fill(~before, 0.0)
        peak = pooled.new_zeros(*pooled.shape[:2], spans.size).scatter_reduce(2, home.clamp(min=0), pooled, "amax")
        return torch.where(voted, torch.where(before, pooled, at(peak, home)), own)

    def _pool(self, x: Tensor, home: Tensor) -> Tensor:
        """Pool x (B,H,G,S) over neighbours in the same span ``home`` (B,H,S); all others are zeros, as a border is."""
        reach, size = self.kernel // 2, x.shape[-1]
        padded, homes = pad(x, (reach, reach)), pad(home, (reach, reach), value=-1)
        out = torch.zeros_like(x)
        # From left to right for every slot: neighbourhoods that hold the same slots tie to the last bit.
        for start in range(self.kernel):
            near = padded[..., start : start + size] * (homes[..., start : start + size] == home)[:, :, None]
            out = out + near if self.pooling == "avg" else out.maximum(near)
        return out / self.kernel if self.pooling == "avg" else out
