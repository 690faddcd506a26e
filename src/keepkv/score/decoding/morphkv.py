"""Attention of the last queries, added up or at its strongest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from keepkv.core.options import Window, one_of
from keepkv.core.slots import LayerView
from keepkv.observe.window import window
from keepkv.score.base import register_score
from keepkv.score.decoding.before_window import Windowed, attention_among, before_window, with_window_on_top


@register_score("morphkv")
@dataclass(frozen=True)
class MorphKV(Windowed):
    """MorphKV (arXiv 2503.00979): attention of the last ``window`` queries to the slots before them, fused.

    As in the authors' code: logits are added up over the query heads of a KV head, each query's softmax runs over the
    slots before the window, and ``fuse`` is the "sum" over the queries or the "max". Slots of the window get the
    largest score. Two ways that the code has beside it are left out: to merge what leaves, and to cut heads by their
    own masks.
    """

    window: Window = 32
    fuse: Annotated[str, one_of("sum", "max")] = "sum"

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        before = before_window(view, positions)
        return with_window_on_top(attention_among(view, queries, positions, before, "sum", self.fuse), before)
