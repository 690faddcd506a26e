"""What every meter of energy gives."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Protocol

ENOUGH_S, ENOUGH_UPDATES = 2.0, 20  # of a window whose reading is good: counters move in steps


@dataclass(frozen=True)
class Reading:
    """Energy of one window.

    joules: None where nothing was measured, and ``why`` says why; never 0 for that. source: what was read. quality:
    "low" where the window was short or the counter moved too seldom for its steps not to matter. window_s: seconds.
    updates: how often the slowest counter moved, or samples of power; None where the source does not tell.
    """

    joules: float | None
    source: str
    quality: Literal["good", "low", "none"]
    window_s: float
    updates: int | None = None
    why: str | None = None


class EnergyMeter(Protocol):
    """``begin``, then ``end``, as often as wanted. Devices are waited for by whoever calls."""

    def begin(self) -> None:
        """A window begins."""

    def end(self) -> Reading:
        """The window that ``begin`` began ends."""


class NoMeter:
    """Nothing can be read; ``why`` says why."""

    def __init__(self, why: str) -> None:
        self.why = why
        self.began = time.perf_counter()

    def begin(self) -> None:
        self.began = time.perf_counter()

    def end(self) -> Reading:
        return Reading(None, "none", "none", time.perf_counter() - self.began, why=self.why)


def made(joules: float, source: str, window_s: float, updates: int | None) -> Reading:
    """The reading of a window. A counter that never moved has measured nothing."""
    if updates == 0:
        return Reading(None, source, "none", window_s, 0, "the counter did not move within the window")
    enough = window_s >= ENOUGH_S and (updates is None or updates >= ENOUGH_UPDATES)
    return Reading(joules, source, "good" if enough else "low", window_s, updates)
