"""Attention of the last queries, less what other keys say already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from keepkv.errors import KeepKVError
from keepkv.score.attention import ROWS, TILE, logits, of_heads
from keepkv.score.base import Score, register_score
from keepkv.score.window import remember, window
from keepkv.slots import LayerView


@register_score("r-kv")
@dataclass(frozen=True)
class RKV(Score):
    """R-KV (arXiv 2505.24133): lam·attention − (1 − lam)·redundancy, of the slots before the window.

    Attention as in the authors' code: logits of the last ``window`` queries, the largest of the query heads of a KV
    head, softmax over the slots before the window, mean over the queries, largest of ``kernel`` neighbours.
    Redundancy: ``redundancy`` with cosines above ``threshold`` as near-duplicates. Both sum to 1 over a head, but for
    the pooling and the window. lam is 0.1 in the paper, 0.07 in its code. Slots of the window get the largest score.
    """

    window: int = 8
    kernel: int = 7
    lam: float = 0.1
    threshold: float = 0.5

    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise KeepKVError(f"{self}: window must be at least 1, kernel an odd number of slots")
        if not 0 <= self.lam <= 1:
            raise KeepKVError(f"{self}: lam must lie in [0, 1]")

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        before = before_window(view, positions)
        # Empties and the window are zeros, as the border of the pooling is: a padded row scores as it does alone.
        local = self._attention(view, queries, positions, before)
        pooled = max_pool1d(local, self.kernel, stride=1, padding=self.kernel // 2)
        return crowned(self.lam * pooled - (1 - self.lam) * redundancy(view, self.threshold), before)

    def _attention(self, view: LayerView, queries: Tensor, positions: Tensor, before: Tensor) -> Tensor:
        """(B,H,S): mean over the window of attention to the slots ``before`` it (B,H,S) bool, zero elsewhere."""
        h, g, real = view.slots.shape[1], view.groups, (positions >= 0)[:, None, :, None]
        found = []
        for head in range(h):  # what is held at a time is the logits of one
            u = logits(of_heads(view, head, 1), queries[:, head * g : (head + 1) * g], positions).amax(2)
            given = u.masked_fill_(~before[:, head : head + 1, None], float("-inf")).softmax(-1)
            found.append(given.masked_fill_(~real | given.isnan(), 0.0).sum(2))  # NaN where nothing is before it
        return torch.cat(found, dim=1) / real.sum(2).clamp(min=1)


def before_window(view: LayerView, positions: Tensor) -> Tensor:
    """(B,H,S) bool: valid slots older than the first of the window's queries, at ``positions`` (B,W)."""
    first = view.seen
    if positions.shape[1]:
        first = positions.where(positions >= 0, view.seen[:, None]).amin(-1)
    return view.slots.valid & (view.slots.positions < first[:, None, None])


def crowned(scores: Tensor, before: Tensor) -> Tensor:
    """``scores`` (B,H,S) where ``before`` (B,H,S) is true, and elsewhere the largest of these, 0 if there are none."""
    best = scores.masked_fill(~before, float("-inf")).amax(-1, keepdim=True)
    return torch.where(before, scores, best.masked_fill(best.isneginf(), 0.0))


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
