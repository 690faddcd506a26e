"""When requests of an open loop come."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import pairwise

from keepkv.characterize.grid.levels import Workload
from keepkv.characterize.workload.trace import read_trace


def gaps(workload: Workload, seed: int) -> Iterator[float]:
    """Seconds from each arrival to the next, the first one from the start; without end, but for a trace.

    Poisson: exponential, of mean 1 / rate. Gamma: of the same mean and a coefficient of variation of ``cv``, hence of
    shape 1 / cv² and scale cv² / rate.
    """
    rng = random.Random(f"arrivals/{seed}")
    if workload.arrivals == "trace":
        times = [0.0, *(one.at / workload.speed for one in read_trace(workload.trace or ""))]
        yield from (later - sooner for sooner, later in pairwise(times))
        return
    rate = workload.rate or math.inf
    shape, scale = 1 / workload.cv**2, workload.cv**2 / rate
    while True:
        yield rng.expovariate(rate) if workload.arrivals == "poisson" else rng.gammavariate(shape, scale)
