"""Counters of energy that only grow, and begin anew at an end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keepkv.measure.energy.base import Reading, made
from keepkv.measure.energy.watch import Watch


@dataclass(frozen=True)
class Counter:
    """read: joules so far. end: the number at which it begins anew."""

    read: Callable[[], float]
    end: float = float("inf")


class CounterMeter:
    """The sum of what ``counters`` grow by. They are read every ``period`` seconds, which must be shorter than a round
    of the fastest, and which counts how often they move; None: at both ends alone, for whoever calls ``poll``.

    refuse: why the window cannot be attributed to this measurement (others use the device too), or None; asked at both
    ends. clock: seconds.
    """

    def __init__(
        self,
        counters: Sequence[Counter],
        source: str,
        *,
        refuse: Callable[[], str | None] = lambda: None,
        period: float | None = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counters, self.source, self.refuse, self.clock = counters, source, refuse, clock
        self.watch = None if period is None else Watch(self.poll, period)
        for counter in counters:
            counter.read()  # raises where one cannot be read

    def begin(self) -> None:
        self.why = self.refuse()
        self.last = [counter.read() for counter in self.counters]
        self.grown, self.moves = [0.0] * len(self.last), [0] * len(self.last)
        self.began = self.clock()
        if self.watch is not None:
            self.watch.start()

    def poll(self) -> None:
        """Read every counter once."""
        for i, counter in enumerate(self.counters):
            now = counter.read()
            step = now - self.last[i]
            step = step + counter.end if step < 0 else step
            self.grown[i] += step
            self.moves[i] += step > 0
            self.last[i] = now

    def end(self) -> Reading:
        window = self.clock() - self.began
        try:
            if self.watch is not None:
                self.watch.stop()
            self.poll()
        except Exception as error:  # of whatever library: a counter that fails has measured nothing
            return Reading(None, self.source, "none", window, why=f"{type(error).__name__}: {error}")
        why = self.why or self.refuse()
        if why is not None:
            return Reading(None, self.source, "none", window, min(self.moves), why)
        return made(sum(self.grown), self.source, window, min(self.moves))
