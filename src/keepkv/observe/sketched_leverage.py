"""Leverage of keys in a random projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.attention import temp_elements


def sketched_leverage(view: LayerView, inside: Tensor, sketch: int, ridge: float) -> Tensor:
    """ℓ_i = x_iᵀ(Σ x xᵀ + ridge·I)⁻¹x_i, x = Φᵀ(k − mean k), k keys before RoPE: (B,H,S), float32, or float64 as keys.

    Over the slots ``inside`` (B,H,S) bool, 0 elsewhere, NaN in heads whose keys are not finite; one of p votes counts p
    times. sketch: columns of Φ; 0: Φ = I.
    """
    slots = view.slots
    (b, h, s), d = slots.shape, slots.keys.shape[-1]
    dtype, device = torch.promote_types(slots.keys.dtype, torch.float32), slots.keys.device
    exact = dtype if device.type == "mps" else torch.float64  # for sums of squares: the ridge is small beside them
    votes = slots.log_votes.exp().masked_fill(~inside, 0.0).to(dtype)[..., None]
    share = votes / votes.sum(2, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    places = view.key_places()
    phi = gaussian(view, sketch).to(device, dtype) if sketch else None
    out = torch.empty(b, h, s, dtype=dtype, device=device)
    step = max(1, min(h, temp_elements(slots.keys) // max(1, b * s * d)))
    for first in range(0, h, step):
        some = slice(first, first + step)
        keys = slots.keys[:, some].to(dtype, copy=True)
        if view.rope is not None:
            keys = view.rope.unrotate(keys, places[:, some])
        keys -= share[:, some].mT @ keys
        x = (keys if phi is None else keys @ phi[some]).to(exact)
        gram = (x * votes[:, some]).mT @ x
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        added = (x.shape[-1] * torch.finfo(exact).eps * trace).clamp(min=ridge)
        gram.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
        # One factorisation that fails would end that of the whole batch.
        broken = ~gram.isfinite().all(-1).all(-1)[..., None]
        gram = torch.where(broken[..., None], torch.eye(x.shape[-1], dtype=exact, device=device), gram)
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), x.mT, upper=False)
        out[:, some] = torch.linalg.vecdot(white, white, dim=-2).masked_fill(broken, float("nan")).to(dtype)
    return out.masked_fill_(~inside, 0.0)


def gaussian(view: LayerView, size: int) -> Tensor:
    """Φ (H,D,``size``) float32 of variance 1/size, from the seed and the layer alone: the same for every row and at
    every compression."""
    generator = torch.Generator().manual_seed((view.seed * 1_000_003 + view.layer) % (1 << 63))
    (_, h, _), d = view.slots.shape, view.slots.keys.shape[-1]
    return torch.randn(h, d, size, generator=generator) / math.sqrt(size)
