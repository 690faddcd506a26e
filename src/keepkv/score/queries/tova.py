"""Attention of the last query, one ranking for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.attention import received
from keepkv.observe.tokens import over_heads
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
        return _mean(view, received(view, *window(view, 1)))

    def observe_spans(self, view: LayerView) -> None:
        remember_in_spans(view, 1)

    def span_scores(self, view: LayerView, own: Tensor) -> Tensor:
        spans, positions = view.spans, view.slots.positions
        assert spans is not None
        queries, asked = span_window(view, 1)
        home = spans.find(positions)
        voted = (home[..., None] == spans.find(asked)[:, None, None]).any(-1) & (home >= 0)
        return torch.where(voted, _mean(view, received(view, queries, asked, spans.until(positions))), own)


def _mean(view: LayerView, attn: Tensor) -> Tensor:
    """Mean (B,H,S) over all query heads of what each token receives, ``attn`` (B,H,G,S)."""
    return over_heads(attn.mean(2), view.slots.positions) / attn.shape[1]
