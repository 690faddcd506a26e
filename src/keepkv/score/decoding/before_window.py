"""What the scores of long replies share: they look through the window of the last queries at the slots before it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.observe.attention import logits, of_heads
from keepkv.observe.window import remember
from keepkv.score.base import Score


class Windowed(Score):
    """Base of scores that remember the last ``window`` queries, a field of theirs."""

    window: int
    observes: ClassVar[bool] = True

    @property
    def remembers(self) -> dict[str, int]:
        return {"window": self.window}

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)


def before_window(view: LayerView, positions: Tensor) -> Tensor:
    """(B,H,S) bool: valid slots older than the first of the window's queries, at ``positions`` (B,W)."""
    first = view.seen
    if positions.shape[1]:
        first = positions.where(positions >= 0, view.seen[:, None]).amin(-1)
    return view.slots.valid & (view.slots.positions < first[:, None, None])


def attention_among(
    view: LayerView, queries: Tensor, positions: Tensor, among: Tensor, group: str, over: str = "sum"
) -> Tensor:
    """(B,H,S): attention that slots ``among`` (B,H,S) bool receive from queries (B,H*G,W,D) at positions (B,W), after a
    softmax over these slots alone; zero elsewhere.

    group: "max" or "sum" of the logits of the query heads of a KV head, or "mean" of their attention. over: "sum" or
    "max" over the queries.
    """
    h, g, real = view.slots.shape[1], view.query_groups, (positions >= 0)[:, None, None, :, None]
    found = []
    for head in range(h):  # what is held at a time is the logits of one
        u = logits(of_heads(view, head, 1), queries[:, head * g : (head + 1) * g], positions)  # (B,1,G,W,S)
        if group != "mean":
            u = u.amax(2, keepdim=True) if group == "max" else u.sum(2, keepdim=True)
        attn = u.masked_fill_(~among[:, head : head + 1, None, None], float("-inf")).softmax(-1)
        attn = attn.masked_fill_(~real | attn.isnan(), 0.0)  # NaN where there is nothing among these
        found.append((attn.sum(3) if over == "sum" else attn.amax(3)).mean(2))
    return torch.cat(found, dim=1)


def with_window_on_top(scores: Tensor, before: Tensor) -> Tensor:
    """``scores`` (B,H,S) where ``before`` (B,H,S) is true, and elsewhere the largest of these, 0 if there are none."""
    best = scores.masked_fill(~before, float("-inf")).amax(-1, keepdim=True)
    return torch.where(before, scores, best.masked_fill(best.isneginf(), 0.0))
