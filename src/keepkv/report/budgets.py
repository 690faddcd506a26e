"""Budgets as they are named and placed: shares of tokens or bytes, slots and bytes have an axis each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from keepkv.core.budget import Budget
from keepkv.evaluation.rows import BudgetAsked

TITLES = ("budget: share of the tokens", "budget: share of the bytes", "budget: slots per head", "budget: bytes")


class Axis(NamedTuple):
    """Budgets of one kind, smallest first. at: where each stands between 0 and 1, by its logarithm."""

    title: str
    budgets: list[str]
    at: list[float]


@lru_cache(typed=True)
def budget_label(budget: BudgetAsked) -> str:
    """``10 %``, ``10 % of bytes``, ``512 slots`` or ``256MiB``."""
    if isinstance(budget, int):
        return f"{budget} slots"
    share = share_of(budget)
    return str(budget) if share is None else f"{100 * share:g} %" + (" of bytes" if isinstance(budget, str) else "")


def share_of(budget: BudgetAsked) -> float | None:
    """The share, of tokens or of bytes, that ``budget`` is; None for slots and for bytes."""
    asked = Budget.of(budget)
    return asked.share if asked.share is not None else asked.share_of_bytes


def tick(label: str) -> str:
    """A label of ``budget_label`` on its axis, whose title says the rest."""
    return label.removesuffix(" slots").removesuffix(" of bytes")


def places(asked: Iterable[BudgetAsked]) -> dict[str, tuple[int, float]]:
    """Which of ``TITLES`` each budget belongs to, and the logarithm of what it asks for.

    All of the tokens are all of the bytes: where shares of bytes were asked for, and of tokens only that, it is theirs.
    """
    found = {}
    for budget in asked:
        one = Budget.of(budget)
        amounts = (one.share, one.share_of_bytes, one.slots, one.bytes)
        kind, amount = next((kind, amount) for kind, amount in enumerate(amounts) if amount is not None)
        found[budget_label(budget)] = (kind, math.log(amount))
    if [place for place in found.values() if place[0] == 0] == [(0, 0.0)] and any(
        kind == 1 for kind, _ in found.values()
    ):
        found[budget_label(1.0)] = (1, 0.0)
    return found


def axes(asked: Iterable[BudgetAsked]) -> list[Axis]:
    """One axis for each kind of budget that there is."""
    found = places(asked)
    made = []
    for kind, title in enumerate(TITLES):
        own = sorted((size, label) for label, (of, size) in found.items() if of == kind)
        if own:
            first, last = own[0][0], own[-1][0]
            at = [(size - first) / (last - first) if last > first else 0.5 for size, _ in own]
            made.append(Axis(title, [label for _, label in own], at))
    return made
