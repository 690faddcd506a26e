"""What the output of attention loses with a slot, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Window
from keepkv.core.slots import LayerView
from keepkv.observe.attention import tiles
from keepkv.observe.outputs import output_metric, squared_distances
from keepkv.observe.window import remember, window
from keepkv.score.base import Score, register_score


@register_score("dropkv")
@dataclass(frozen=True)
class DropKV(Score):
    """DropKV (openreview MqfNzH3TVH): S_i = Σ_q (a_i/(1 − a_i))²·‖v_i − o(q)‖², over the last ``window`` queries.

    Without slot i the rest of the softmax grows by 1/(1 − a_i), so the output o moves by a_i/(1 − a_i)·(o − v_i),
    whatever the other slots and the attention sinks of a model are. Mean over the query heads of the KV head. The same
    step for one query and without the square is CAOTE's (arXiv 2504.14051).

    project: measure behind the output projection, ‖(v_i − o)W‖, as the layer does; the paper does not. A slot that has
    all the attention of a query counts as one with all but a rounding error of it.
    """

    window: Window = 32
    project: bool = False

    observes: ClassVar[bool] = True

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        return self.project

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.window}

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        values, metric = view.slots.values, output_metric(view) if self.project else None
        dtype = torch.promote_types(view.slots.keys.dtype, torch.float32)
        total = torch.zeros(view.slots.shape, dtype=dtype, device=queries.device)
        for heads, _, end, attn in tiles(view, queries, positions):
            near = values[:, heads, :end].to(attn.dtype)
            away = squared_distances(near, attn @ near[:, :, None], None if metric is None else metric[heads])
            odds = attn / (1 - attn).clamp(min=torch.finfo(attn.dtype).eps)
            total[:, heads, :end] += (odds.square_() * away).sum(3).mean(2)
        return total.float()
