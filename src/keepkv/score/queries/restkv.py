"""What the mean output of the last queries loses with a slot, smoothed over queries and over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from keepkv.core.options import Kernel, Rate, Window
from keepkv.core.slots import LayerView
from keepkv.observe.attention import tiles
from keepkv.observe.outputs import output_metric
from keepkv.observe.window import remember, window
from keepkv.score.base import Score, register_score


@register_score("rest-kv")
@dataclass(frozen=True)
class ReSTKV(Score):
    """ReST-KV (arXiv 2605.08840): S_i = pool(ā_i/(1 − ā_i)·‖(v_i − ō)W‖), W the output projection.

        ā = the moving average of the attention of the last ``window`` queries: ā ← ``alpha``·a + (1 − ``alpha``)·ā
        ō = Σ_i ā_i v_i over the slots before the window

    pool is the mean of ``kernel`` slots before the window; then the mean over the query heads of the KV head. As in the
    released code, which averages the attention and then looks at the output ("after"), rather than at every query's.
    Not here: that code widens and shifts the pooling of a head by how far its attention moved within the window, for
    the first row of a batch. Slots of the window keep their own effect: ``Method.window`` keeps them.
    """

    window: Window = 32
    kernel: Kernel = 5
    alpha: Rate = 0.3

    needs_output: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.window}

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)

    def __call__(self, view: LayerView) -> Tensor:
        slots, (queries, positions) = view.slots, window(view, self.window)
        first = positions.where(positions >= 0, view.seen[:, None]).amin(-1) if positions.shape[1] else view.seen
        before = (slots.valid & (slots.positions < first[:, None, None]))[:, :, None]
        mean = self._average(view, queries, positions)
        odds = mean / (1 - mean).clamp(min=torch.finfo(mean.dtype).eps)
        effect = odds * self._distances(view, mean * before)
        # Empties and the window are zeros, as the border of the pooling is: a padded row scores as it does alone.
        pooled = avg_pool1d((effect * before).flatten(0, 1), self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.view_as(effect).where(before, effect).mean(2).float()

    def _distances(self, view: LayerView, weights: Tensor) -> Tensor:
        """‖(v_i − ō)W‖ (B,H,G,S), ō the values' sum with ``weights`` (B,H,G,S); a head at a time."""
        metric, out = output_metric(view), torch.empty_like(weights)
        for head, values in enumerate(view.slots.values.to(weights.dtype).unbind(1)):
            away = values[:, None] - (weights[:, head] @ values)[:, :, None]  # (B,G,S,Dv)
            out[:, head] = ((away @ metric[head].to(away.dtype)) * away).sum(-1).clamp_(min=0.0).sqrt()
        return out

    def _average(self, view: LayerView, queries: Tensor, positions: Tensor) -> Tensor:
        """ā (B,H,G,S): the oldest query starts the average."""
        real = positions >= 0
        age = real.sum(-1, keepdim=True) - real.cumsum(-1)
        weight = self.alpha * (1 - self.alpha) ** age.double()
        weight = torch.where(age == real.sum(-1, keepdim=True) - 1, weight / self.alpha, weight).masked_fill(~real, 0.0)
        (b, h, s), dtype = view.slots.shape, torch.promote_types(view.slots.keys.dtype, torch.float32)
        mean = torch.zeros(b, h, view.query_groups, s, dtype=dtype, device=queries.device)
        for heads, part, end, attn in tiles(view, queries, positions):
            mean[:, heads, :, :end] += (attn * weight[:, None, None, part, None].to(dtype)).sum(3)
        return mean
