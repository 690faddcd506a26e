"""Attention of the last queries of the prompt, pooled over neighbouring slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from keepkv.errors import KeepKVError
from keepkv.score.attention import received
from keepkv.score.base import Score, register_score
from keepkv.score.window import remember, window
from keepkv.slots import LayerView


@register_score("snapkv")
@dataclass(frozen=True)
class SnapKV(Score):
    """SnapKV (arXiv 2404.14469): attention that a slot before the window receives from the window's queries.

    Mean over the last ``window`` queries of the row, then ``pooling`` ("avg" or "max", ``kernel`` slots, odd) over
    neighbouring slots, then the mean over the query heads of the KV head. The softmax runs over all slots. Slots
    inside the window take no part in pooling and keep their own mean attention: ``Method.window`` keeps them.
    """

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise KeepKVError(f"{self}: window must be at least 1, kernel an odd number of slots")
        if self.pooling not in ("avg", "max"):
            raise KeepKVError(f"SnapKV(pooling={self.pooling!r}): supported are 'avg' and 'max'")

    def observe(self, view: LayerView) -> None:
        remember(view, self.window)

    def __call__(self, view: LayerView) -> Tensor:
        queries, positions = window(view, self.window)
        real = (positions >= 0).sum(-1)  # (B,)
        mean = received(view, queries, positions) / real.clamp(min=1).view(-1, 1, 1, 1)
        first = view.seen  # position of the window's first query
        if positions.shape[1]:
            first = positions.where(positions >= 0, view.seen[:, None]).amin(-1)
        before = (view.slots.valid & (view.slots.positions < first[:, None, None]))[:, :, None]
        # Empties and the window are zeros, as the border of the pooling is: a padded row scores as it does alone.
        outside = (mean * before).flatten(0, 1)
        pad = self.kernel // 2
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        pooled = pool(outside, self.kernel, stride=1, padding=pad).view_as(mean)
        return pooled.where(before, mean).mean(2)
