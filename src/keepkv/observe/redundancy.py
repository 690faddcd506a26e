"""How much of a slot's key is in the other keys of its head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keepkv.core.slots import LayerView
from keepkv.observe.attention import ROWS, TILE


def redundancy(view: LayerView, threshold: float = 0.5) -> Tensor:
    """(B,H,S), sums to 1 over the slots of a head, 0 at empty ones: how much of a slot's key is in other keys.

    softmax over slots i of the mean over slots j of C[i,j], C the cosine of keys after RoPE, C[i,i] = 0. Of all i with
    C[i,j] above ``threshold``, the newest is not charged for j (arXiv 2505.24133): of k keys that are alike the newest
    is charged for none, the second newest for k − 2 and the others for k − 1. Where no key is that near the authors'
    code lets the first slot go free; here nobody. Votes do not count. Needs S·D more memory and a tile of C.
    """
    slots = view.slots
    valid, s = slots.valid, slots.shape[2]
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    charged = torch.stack([_charges(x, real, threshold) for x, real in zip(slots.keys, valid, strict=True)])
    shares = (charged / count).masked_fill_(~valid, float("-inf")).softmax(-1)
    return shares.masked_fill_(~valid, 0.0) if s else shares


def _charges(keys: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """(H,S): Σ_j C[i,j] of one row, keys (H,S,D), valid (H,S)."""
    (h, s, _), dtype = keys.shape, torch.promote_types(keys.dtype, torch.float32)
    unit = normalize(keys.to(dtype), dim=-1).masked_fill_(~valid[..., None], 0.0)
    total = torch.zeros(h, s, dtype=dtype, device=keys.device)
    order = torch.arange(s, dtype=torch.int32, device=keys.device)[:, None]
    heads = max(1, min(h, TILE // max(1, s * ROWS)))
    tile = max(1, TILE // max(1, heads * s))
    for first in range(0, h, heads):
        some = unit[first : first + heads]
        for start in range(0, s, tile):
            near = some @ some[:, start : start + tile].mT  # (h,S,t)
            near.diagonal(-start, 1, 2).zero_()
            newest = torch.where(near > threshold, order, -1).amax(1, keepdim=True).long()  # (h,1,t)
            free = newest.clamp(min=0)
            near.scatter_(1, free, near.gather(1, free).masked_fill_(newest >= 0, 0.0))
            total[first : first + heads] += near.sum(2)
    return total
