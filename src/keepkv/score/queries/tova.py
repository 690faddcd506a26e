"""Attention of the last query, one ranking for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.attention import received
from keepkv.observe.window import remember, remember_in_spans, span_window, window
from keepkv.score.base import Score, register_score


@register_score("tova")
@dataclass(frozen=True)
class TOVA(Score):
    """TOVA (arXiv 2401.06104): attention of the row's last query, mean over all query heads of the layer.

    Every KV head gets the same score for the same token, so with a uniform allocation all heads keep the same
    tokens. Heads that hold different tokens are matched by position; a head without the token counts as zero. Within
    spans the last token of each votes on its span.
    """

    observes: ClassVar[bool] = True
    scores_within_spans: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": 1, "span_window": 1}

    def observe(self, view: LayerView) -> None:
        remember(view, 1)

    def __call__(self, view: LayerView) -> Tensor:
        return _over_heads(view, received(view, *window(view, 1)).mean(2))

    def observe_spans(self, view: LayerView) -> None:
        remember_in_spans(view, 1)

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        spans, positions = view.spans, view.slots.positions
        assert spans is not None
        queries, asked = span_window(view, 1)
        home = spans.find(positions)
        voted = (home[..., None] == spans.find(asked)[:, None, None]).any(-1) & (home >= 0)
        return torch.where(
            voted, _over_heads(view, received(view, queries, asked, spans.until(positions)).mean(2)), own
        )


def _over_heads(view: LayerView, per_head: Tensor) -> Tensor:
    """Mean (B,H,S) over heads of what each token receives in each head, ``per_head`` (B,H,S)."""
    index = view.slots.positions.clamp(min=0).long()  # an empty slot has weight 0, so it adds nothing
    size = int(index.max()) + 1 if index.numel() else 1
    table = per_head.new_zeros(per_head.shape[0], size)  # weight by position
    for head in range(per_head.shape[1]):  # one head at a time: the order of additions is fixed on any device
        table.scatter_add_(1, index[:, head], per_head[:, head])
    table /= per_head.shape[1]
    return table[:, None].expand(-1, index.shape[1], -1).gather(2, index)
