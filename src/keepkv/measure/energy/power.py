"""Energy as power that is sampled: for GPUs without a counter. Bursts between samples are missed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from keepkv.measure.energy.base import Reading, made
from keepkv.measure.energy.watch import Watch


def trapezoid(seconds: Sequence[float], watts: Sequence[float]) -> float:
    """Joules of ``watts`` sampled at ``seconds``, power between two samples taken as a straight line."""
    pairs = list(zip(seconds, watts, strict=True))
    return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(pairs))


class PowerMeter:
    """watts: power now. refuse, period, clock: as ``CounterMeter`` has them."""

    def __init__(
        self,
        watts: Callable[[], float],
        source: str,
        *,
        refuse: Callable[[], str | None] = lambda: None,
        period: float | None = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.watts, self.source, self.refuse, self.clock = watts, source, refuse, clock
        self.watch = None if period is None else Watch(self.poll, period)
        watts()  # raises where it cannot be read

    def begin(self) -> None:
        self.why = self.refuse()
        self.times: list[float] = []
        self.powers: list[float] = []
        self.poll()
        if self.watch is not None:
            self.watch.start()

    def poll(self) -> None:
        """Take one sample."""
        power = self.watts()
        self.times.append(self.clock())
        self.powers.append(power)

    def end(self) -> Reading:
        try:
            if self.watch is not None:
                self.watch.stop()
            self.poll()
        except Exception as error:  # as in ``CounterMeter``
            return Reading(
                None, self.source, "none", self.clock() - self.times[0], why=f"{type(error).__name__}: {error}"
            )
        window, why = self.times[-1] - self.times[0], self.why or self.refuse()
        if why is not None:
            return Reading(None, self.source, "none", window, len(self.times), why)
        return made(trapezoid(self.times, self.powers), self.source, window, len(self.times))
