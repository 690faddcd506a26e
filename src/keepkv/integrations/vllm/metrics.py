"""What compression did, as Prometheus counters beside vLLM's own.

They are counted in the processes of engine and workers. Where ``PROMETHEUS_MULTIPROC_DIR`` names a folder, as
`keepkv serve` has it, vLLM's ``/metrics`` adds up those of all its processes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_MEANINGS = {
    "requests": "requests with a plan that have finished",
    "compressions": "compressions of a request",
    "slots_kept": "slots of all layers and heads that were held after the last compression of a request that has ended",
    "slots_dropped": "slots that left without a trace",
    "slots_merged": "slots that entered another one",
    "blocks_given_back": "blocks that requests gave back before they had ended",
    "requests_refused": "requests that ended with an error as they could not be served",
}


@cache
def _counters() -> dict[str, Any]:
    from prometheus_client import Counter

    return {name: Counter(f"keepkv:{name}", meaning) for name, meaning in _MEANINGS.items()}


def count(**more: int) -> None:
    """Add to counters, by name."""
    for name, number in more.items():
        _counters()[name].inc(number)


def totals() -> dict[str, int]:
    """What this process has counted so far."""
    return {name: int(one._value.get()) for name, one in _counters().items()}
