"""Attention of the last queries, remembered from one compression to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Cosine, Share, Window, one_of
from keepkv.core.slots import LayerView
from keepkv.core.stats import Stat
from keepkv.observe.attention import tiles
from keepkv.observe.redundancy import redundancy
from keepkv.observe.window import window
from keepkv.score.base import register_score
from keepkv.score.decoding.before_window import Windowed, before_window, with_window_on_top

STAT = "global_score"  # per slot: F after the last compression that it went through
NEVER = -1.0  # a slot that went through none, as F is not negative


@register_score("g-kv")
@dataclass(frozen=True)
class GKV(Windowed):
    """G-KV (arXiv 2512.00504): lam·F − (1 − lam)·R̂ of the slots before the window of the last ``window`` queries.

        local      S[j] = mean over the window's queries of the largest attention, after a softmax over all slots, that
                   j gets from the query heads of its KV head; Ŝ = S / max_j S over the slots before the window
        global     F = max(alpha·F⁻, Ŝ)              mode "max": the largest alpha^(compressions since)·Ŝ
                   F = alpha·F⁻ + (1 − alpha)·Ŝ      mode "mean"
                   F = alpha·F⁻ + Ŝ                  mode "sum"
        redundancy R̂ = R / max_j R, R as of ``observe.redundancy``; lam = 1 leaves it out

    F⁻ is what was stored at the last compression of the slot, before redundancy; of a slot that was never scored Ŝ, or
    0 in mode "sum". It changes only for rows that are compressed. Slots of the window get the largest score and stay
    unscored. Not in the paper: where slots merge, F is the largest of theirs. A sum of shares of a peak could exceed
    it, and would take the mark of an unscored slot for a share.
    """

    signed: ClassVar[bool] = True

    window: Window = 16
    alpha: Share = 0.8
    mode: Annotated[str, one_of("max", "mean", "sum")] = "max"
    lam: Share = 0.5
    threshold: Cosine = 0.5

    stats: ClassVar[dict[str, Stat]] = {STAT: Stat(NEVER, "max")}

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        before = before_window(view, positions)
        local = _of_peak(self._local(view, queries, positions), before)
        held = view.slots.stats[STAT]
        found = self._update(held.where(held >= 0, torch.zeros_like(local) if self.mode == "sum" else local), local)
        view.memo[STAT] = found.where(before, held)
        if self.lam < 1:
            found = self.lam * found - (1 - self.lam) * _of_peak(redundancy(view, self.threshold), before)
        return with_window_on_top(found, before)

    def _local(self, view: LayerView, queries: Tensor, positions: Tensor) -> Tensor:
        """S (B,H,S), from the window's queries (B,H*G,W,D) at positions (B,W). Not divided by the number of queries, as
        it is going to be divided by its maximum."""
        dtype = torch.promote_types(view.slots.keys.dtype, torch.float32)
        total = torch.zeros(view.slots.shape, dtype=dtype, device=queries.device)
        for heads, _, end, attn in tiles(view, queries, positions):
            total[:, heads, :end] += attn.amax(2).sum(2)
        return total

    def _update(self, held: Tensor, local: Tensor) -> Tensor:
        if self.mode == "max":
            return (self.alpha * held).maximum(local)
        return self.alpha * held + (local if self.mode == "sum" else (1 - self.alpha) * local)


def _of_peak(x: Tensor, before: Tensor) -> Tensor:
    """x (B,H,S) ≥ 0 as a share of its largest value among the slots ``before`` (B,H,S) bool; 0 elsewhere."""
    x = x.masked_fill(~before, 0.0)
    return x / x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
