"""The reduction: what becomes of a slot that is not kept?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from keepkv.core.options import Checked
from keepkv.core.registry import Registry
from keepkv.core.slots import LayerView, Slots
from keepkv.score.base import Score


@dataclass(frozen=True)
class Reduced:
    """Outcome of one reduction: the kept slots, and what became of the others.

    slots: kept slots, rectangular, empty ones first. merged (B,H) and dropped (B,H) int64: slots that entered a
    kept slot, and that left without a trace. lost (B,H,S) bool: the dropped ones, for the receipt's estimate of
    the attention mass given up.
    """

    slots: Slots
    merged: Tensor
    dropped: Tensor
    lost: Tensor


class Reduce(Checked):
    """Base of reductions, frozen dataclasses.

    A reduction is stateless: what it must remember for the next compression lives in ``view.state`` (per row), owned by
    the cache and declared in ``row_starts``.
    """

    merges: ClassVar[bool] = False  # changes log_votes or contents of kept slots
    drops: ClassVar[bool] = False  # kept slots stay as they are: a store may write them straight from the view
    row_starts: ClassVar[dict[str, float]] = {}  # entries it sets in ``view.state``, and what stands for "none yet"

    def __call__(self, view: LayerView, keep: Tensor, scores: Tensor, score: Score) -> Reduced:
        """Reduce ``view.slots`` to those where ``keep`` (B,H,S) bool is true.

        ``scores`` (B,H,S) float32 and ``score`` are what selected them. May set entries of ``view.state`` that
        ``row_starts`` names, and of ``view.memo``; leaves everything else of ``view`` as it is, its slots above all.
        """
        raise TypeError(f"{type(self).__name__} must implement __call__(view, keep, scores, score) -> Reduced")


REDUCTIONS: Registry[Reduce] = Registry("reduction")


def register_reduce(name: str, *, replace: bool = False) -> Callable[[Any], Any]:
    """Register a ``Reduce`` subclass under ``name``; ``replace`` takes the place of another one."""
    return REDUCTIONS.register(name, replace=replace)
