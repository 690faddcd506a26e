"""Bytes that torch allocates on a CPU while something runs."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated(act: Callable[[], object]) -> int:
    """Bytes allocated while ``act`` runs, freed ones too."""
    return sum(max(0, size) for size in _events(act))


def peak(act: Callable[[], object]) -> int:
    """The most bytes at once that ``act`` takes beside what was there before."""
    held = most = 0
    for size in _events(act):
        held += size
        most = max(most, held)
    return most


def _events(act: Callable[[], object]) -> list[int]:
    """Sizes of what is allocated, and of what is freed below 0, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda x: x.start_ns())
    return [x.nbytes() for x in events if x.name() == "[memory]"]
