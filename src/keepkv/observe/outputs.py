"""Values as the output of attention sees them: how far from it they lie, how long its projection makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.attention import temp_elements


def output_metric(view: LayerView) -> Tensor:
    """W Wᵀ (H,G,Dv,Dv) float32 of ``view.output``: in it, values are as long as what the projection makes of them."""
    weight = by_head(view)
    return torch.stack([own @ own.mT for own in (one.float() for one in weight)])


def by_head(view: LayerView) -> Tensor:
    """``view.output`` by KV head, (H,G,Dv,E)."""
    assert view.output is not None, "a view without output: give it the weight (H*G,Dv,E) of the output projection"
    return view.output.view(view.slots.shape[1], -1, *view.output.shape[1:])


def squared_distances(values: Tensor, points: Tensor, metric: Tensor | None = None) -> Tensor:
    """‖v_i − p_t‖² (B,H,G,T,S) of values (B,H,S,Dv) and points (B,H,G,T,Dv); in a ``metric`` (H,G,Dv,Dv) if given."""
    v, p = values[:, :, None].to(points.dtype), points
    if metric is not None:
        metric = metric.to(points.dtype)
    mv, mp = (v, p) if metric is None else (v @ metric, p @ metric)
    own = (mv * v).sum(-1)[..., None, :] + (mp * p).sum(-1)[..., None]
    return (own - 2 * (p @ mv.mT)).clamp_(min=0.0)


def projected_lengths(view: LayerView) -> Tensor:
    """‖v_i W‖₁ (B,H,S) float32, W ``view.output``, mean over the query heads of the KV head."""
    slots, weight = view.slots, by_head(view)
    (b, h, s), (g, width) = slots.shape, (weight.shape[1], weight.shape[3])
    step = max(1, temp_elements(slots.values) // max(1, b * width))
    out = torch.zeros(b, h, s, device=slots.values.device)
    for head, query in ((i, j) for i in range(h) for j in range(g)):
        own = weight[head, query].float()
        for start in range(0, s, step):
            part = slice(start, start + step)
            out[:, head, part] += (slots.values[:, head, part].float() @ own).abs().sum(-1)
    return out / g
