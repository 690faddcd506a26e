"""The allocation: how many slots does each layer and head keep?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from keepkv.core.options import Checked
from keepkv.core.registry import Registry
from keepkv.core.slots import LayerView

DENSITY = "density"  # in ``known`` of ``across``: what the score tells of each row, (B,)
Known: TypeAlias = Sequence[Mapping[str, Tensor]]  # what a calibration says of each layer, by name


class Allocate(Checked):
    """Base of allocations, frozen dataclasses without state."""

    ragged: ClassVar[bool] = False  # heads of one row may keep different numbers of slots
    trims: ClassVar[bool] = False  # it may keep fewer slots than fit the budget, unless that holds every token
    joint: ClassVar[bool] = False  # layers share one budget: ``across`` is called once for all, and ``__call__`` never
    needs_calibration: ClassVar[str | None] = None  # the kind that it reads: ``view.calibration``, ``known`` of across
    needs_density: ClassVar[bool] = False  # joint ones: the score must tell the density of attention, ``known`` has it

    def check_calibration(self, known: Known) -> None:
        """Raise ``CalibrationError`` where the tensors of each layer by name, of the kind that ``needs_calibration``
        names, are not what it reads: asked when a cache is made."""

    def layer_budget(self, budget: Tensor, layer: int, layers: int, seen: Tensor | None = None) -> Tensor:
        """(B,) slots per KV head on average that ``layer`` gets when the mean over layers is ``budget`` (B,) float.

        ``seen`` (B,): tokens of each row so far, more than which no layer can use. Rounded so that the sum over layers
        stays at ``layers * budget``.
        """
        return budget

    def __call__(self, scores: Tensor, view: LayerView, budget: Tensor) -> Tensor:
        """Slots to keep (B,H) int64 out of ``view``, given scores (B,H,S) and this layer's budget (B,) int64.

        Protected slots (``view.protected``) are part of the budget and always kept: the result is at least their
        number, and at most the number of valid slots. Sums over heads to H * budget where the slots allow it.
        """
        raise TypeError(f"{type(self).__name__} must implement __call__(scores, view, budget) -> counts")

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        """Slots to keep (B,H) int64 of each layer, given the scores (B,H,S), the ``select.tiers`` (B,H,S) and the mean
        budget (B,) of each: sums over layers and heads to H * Σ budget where the slots allow it. known: the calibration
        of each layer, and ``DENSITY``, given where ``needs_calibration`` or ``needs_density`` asks for it."""
        raise TypeError(f"{type(self).__name__} must implement across(scores, tiers, budgets) -> counts of each layer")


ALLOCATIONS: Registry[Allocate] = Registry("allocation")


def register_allocate(name: str, *, replace: bool = False) -> Callable[[Any], Any]:
    """Register an ``Allocate`` subclass under ``name``; ``replace`` takes the place of another one."""
    return ALLOCATIONS.register(name, replace=replace)
