"""Attention of the last queries to the reply, one ranking for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool1d

from keepkv.core.options import Kernel, Window
from keepkv.core.slots import LayerView
from keepkv.observe.window import window
from keepkv.score.base import register_score
from keepkv.score.decoding.before_window import Windowed, attention_among, before_window, with_window_on_top


@register_score("rpc")
@dataclass(frozen=True)
class RPC(Windowed):
    """RPC (arXiv 2505.13866): attention of the last ``window`` queries, mean over ``kernel`` neighbours.

    As in the authors' code each softmax runs over what competes: slots before the window that are not kept anyway, as
    those of the prompt are. Summed over the queries, mean over the query heads of a KV head, then pooled. The mean over
    all heads is the method's, which has the heads of a layer keep the same tokens.
    """

    window: Window = 32
    kernel: Kernel = 7

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        before = before_window(view, positions)
        among = before if view.protected is None else before & ~view.protected
        # Zeros elsewhere, as the border of the pooling is: a padded row scores as it does alone.
        pooled = avg_pool1d(
            attention_among(view, queries, positions, among, "mean"), self.kernel, stride=1, padding=self.kernel // 2
        )
        return with_window_on_top(pooled, before)
