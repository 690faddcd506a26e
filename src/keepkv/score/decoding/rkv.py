"""Attention of the last queries, less what other keys say already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from keepkv.core.options import Cosine, Kernel, Share, Window
from keepkv.core.slots import LayerView
from keepkv.observe.attention import logits, of_heads
from keepkv.observe.redundancy import redundancy
from keepkv.observe.window import remember, window
from keepkv.score.base import Score, register_score


@register_score("r-kv")
@dataclass(frozen=True)
class RKV(Score):
    """R-KV (arXiv 2505.24133): lam·attention − (1 − lam)·redundancy, of the slots before the window.

    Attention as in the authors' code: logits of the last ``window`` queries, the largest of the query heads of a KV
    head, softmax over the slots before the window, mean over the queries, largest of ``kernel`` neighbours.
    Redundancy: ``redundancy`` with cosines above ``threshold`` as near-duplicates. Both sum to 1 over a head, but for
    the pooling and the window. lam is 0.1 in the paper, 0.07 in its code. Slots of the window get the largest score.
    """

    window: Window = 8
    kernel: Kernel = 7
    lam: Share = 0.1
    threshold: Cosine = 0.5

    observes: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.window}

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        before = before_window(view, positions)
        # Empties and the window are zeros, as the border of the pooling is: a padded row scores as it does alone.
        local = self._attention(view, queries, positions, before)
        pooled = max_pool1d(local, self.kernel, stride=1, padding=self.kernel // 2)
        return with_window_on_top(self.lam * pooled - (1 - self.lam) * redundancy(view, self.threshold), before)

    def _attention(self, view: LayerView, queries: Tensor, positions: Tensor, before: Tensor) -> Tensor:
        """(B,H,S): mean over the window of attention to the slots ``before`` it (B,H,S) bool, zero elsewhere."""
        h, g, real = view.slots.shape[1], view.query_groups, (positions >= 0)[:, None, :, None]
        found = []
        for head in range(h):  # what is held at a time is the logits of one
            u = logits(of_heads(view, head, 1), queries[:, head * g : (head + 1) * g], positions).amax(2)
            attn = u.masked_fill_(~before[:, head : head + 1, None], float("-inf")).softmax(-1)
            found.append(attn.masked_fill_(~real | attn.isnan(), 0.0).sum(2))  # NaN where nothing is before it
        return torch.cat(found, dim=1) / real.sum(2).clamp(min=1)


def before_window(view: LayerView, positions: Tensor) -> Tensor:
    """(B,H,S) bool: valid slots older than the first of the window's queries, at ``positions`` (B,W)."""
    first = view.seen
    if positions.shape[1]:
        first = positions.where(positions >= 0, view.seen[:, None]).amin(-1)
    return view.slots.valid & (view.slots.positions < first[:, None, None])


def with_window_on_top(scores: Tensor, before: Tensor) -> Tensor:
    """``scores`` (B,H,S) where ``before`` (B,H,S) is true, and elsewhere the largest of these, 0 if there are none."""
    best = scores.masked_fill(~before, float("-inf")).amax(-1, keepdim=True)
    return torch.where(before, scores, best.masked_fill(best.isneginf(), 0.0))
