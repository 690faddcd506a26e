"""Attention of the last queries, less what other keys say already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import max_pool1d

from keepkv.core.options import Cosine, Kernel, Share, Window
from keepkv.core.slots import LayerView
from keepkv.observe.redundancy import redundancy
from keepkv.observe.window import window
from keepkv.score.base import register_score
from keepkv.score.decoding.before_window import Windowed, attention_among, before_window, with_window_on_top


@register_score("r-kv")
@dataclass(frozen=True)
class RKV(Windowed):
    """R-KV (arXiv 2505.24133): lam·attention − (1 − lam)·redundancy, of the slots before the window.

    Attention as in the authors' code: logits of the last ``window`` queries, the largest of the query heads of a KV
    head, softmax over the slots before the window, mean over the queries, largest of ``kernel`` neighbours.
    Redundancy: ``redundancy`` with cosines above ``threshold`` as near-duplicates. Both sum to 1 over a head, but for
    the pooling and the window. lam is 0.1 in the paper, 0.07 in its code. Slots of the window get the largest score.
    """

    signed: ClassVar[bool] = True

    window: Window = 8
    kernel: Kernel = 7
    lam: Share = 0.1
    threshold: Cosine = 0.5

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        before = before_window(view, positions)
        # Empties and the window are zeros, as the border of the pooling is: a padded row scores as it does alone.
        real = (positions >= 0).sum(-1).clamp(min=1)[:, None, None]
        local = attention_among(view, queries, positions, before, "max") / real
        pooled = max_pool1d(local, self.kernel, stride=1, padding=self.kernel // 2)
        return with_window_on_top(self.lam * pooled - (1 - self.lam) * redundancy(view, self.threshold), before)
