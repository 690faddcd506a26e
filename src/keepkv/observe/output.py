"""What slots write into the residual stream, through the output projection of their layer."""

from __future__ import annotations

from torch import Tensor

from keepkv.core.slots import LayerView


def output_norms(view: LayerView) -> Tensor:
    """‖W v‖₂ (B,H,G,S) float32 of the value of each slot through W, the part of the output projection of each query
    head; of a score that ``needs_output``."""
    assert view.output is not None
    values = view.slots.values.float()
    (b, h, s), g = view.slots.shape, view.query_groups
    found = values.new_empty(b, h, g, s)
    for head, weight in enumerate(view.output.float().unflatten(0, (h, g))):  # v·(W Wᵀ)·v: no vector as wide as E
        v = values[:, head]
        for member, w in enumerate(weight):
            found[:, head, member] = ((v @ (w @ w.mT)) * v).sum(-1).clamp(min=0.0).sqrt()
    return found
