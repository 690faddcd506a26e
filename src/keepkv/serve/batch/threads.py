"""How many threads of a processor decode a model fastest: often fewer than read its prompts fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

TRIES = 5  # of each number, behind one that is not measured
AHEAD = 0.95  # of the time with fewer threads, at most, that more of them have to take


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """torch computes with ``count`` threads in here; None: with as many as before."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(run: Callable[[], object]) -> int:
    """The number of threads with which ``run`` takes least time, of 1, 2, 4 … up to one less than torch's own.

    One is left to those who talk to clients: where they take a core from threads that wait for each other, every step
    waits with them (on two cores one client had a third of the tokens).
    """
    most = max(1, torch.get_num_threads() - 1)
    if most == 1:
        return 1
    best, least = 1, float("inf")
    for count in sorted({most, *(1 << n for n in range(most.bit_length()))}):
        with threads_of(count):
            taken = _seconds(run)
        if taken < AHEAD * least:
            best, least = count, taken
    return best


def _seconds(run: Callable[[], object]) -> float:
    """Of one ``run``, the median of a few."""
    run()
    taken = list[float]()
    for _ in range(TRIES):
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    return median(taken)
