"""Replies that may differ between two engines: where two scores are nearer to each other than their rounding is.

Two engines add in different orders, so that scores differ by some parts in ten thousand after a few layers. Where the
last slot that stays and the first that leaves are nearer than that, each engine may keep another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.methods import Method
from keepkv.score.base import ALL_OF_IT, Wrapped

ROUNDING = 3e-4  # relative: of scores in the third layer of a random model, between two ways to read its prompt: 2e-4
DRAWS = 16


@dataclass(frozen=True)
class Rounded(Wrapped):
    """A score as another engine may compute it: each number is off by ``by``, about, of its size."""

    by: float = ROUNDING
    seed: int = 0

    passed_on = ALL_OF_IT

    def __call__(self, view: LayerView) -> Tensor:
        found = self.score(view)
        made = torch.Generator().manual_seed(self.seed * 1_000_003 + int(view.seen[0]) * 101 + view.layer)
        return found * (1 + self.by * torch.randn(found.shape, generator=made, dtype=found.dtype))


def is_tie(method: Method, reply: list[int], replied: Callable[[Method], list[int]]) -> bool:
    """Whether ``reply`` is one that rounding alone gives. replied: what a method replies to the same request."""
    draws: Any = (replace(method, score=Rounded(method.score, seed=seed)) for seed in range(1, DRAWS + 1))
    return any(replied(one) == reply for one in draws)
