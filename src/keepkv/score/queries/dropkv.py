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

    project: measure behind the output projection, ‖(v_i − o)W‖, as the layer does; the paper does not. A slot that is
    all that a query sees leaves an output of 0.
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
            own = None if metric is None else metric[heads]
            total[:, heads, :end] += _moved(attn, near, own, view.sink_logits is not None).sum(3).mean(2)
        return total.float()


def _moved(attn: Tensor, values: Tensor, metric: Tensor | None, sinks: bool) -> Tensor:
    """Squared move of the output (B,H,G,T,S) without each slot, given attention (B,H,G,T,S) and values (B,H,S,Dv).

    Near a = 1 both 1 − a and v − o are differences of equals. One slot of a query at most is, its largest: there the
    move is taken as a·(v − u), u the output of the others, which are added up without it. sinks: a model's attention
    sinks have a part of the attention too.
    """
    v = values[:, :, None]
    most, top = attn.max(-1, keepdim=True)
    others = attn.scatter(-1, top, 0.0)
    rest, left = others @ v, others.sum(-1, keepdim=True)
    v_top = v.expand(-1, -1, attn.shape[2], -1, -1).gather(3, top.expand(*top.shape[:-1], v.shape[-1]))
    left = left.maximum(1 - most) if sinks else left
    apart = most * (v_top - rest / left.masked_fill(left <= 0, 1.0))
    squares = (apart if metric is None else apart @ metric.to(apart.dtype)) * apart
    odds = others / (1 - others)
    moved = odds.square_() * squared_distances(values, rest + most * v_top, metric)
    return moved.scatter_(-1, top, squares.sum(-1, keepdim=True))
