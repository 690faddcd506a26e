"""What a device can do: how fast it copies, how much memory is free."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from keepkv.errors import KeepKVError
from keepkv.measure.machine import said
from keepkv.measure.meters import Time

BUFFER = 256 << 20  # bytes copied at once: far more than any cache of a processor holds
TIMES = 5


def bandwidths(device: torch.device, threads: int, buffer: int = BUFFER) -> tuple[float, float]:
    """Bytes per second of a copy within the memory of ``device``, each byte counted twice, read and written; and of a
    sum, which only reads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(buffer // 4, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        copy = _seconds(device, lambda: target.copy_(source))
        read = _seconds(device, source.sum)
    finally:
        torch.set_num_threads(before)
    return 2 * source.nbytes / copy, source.nbytes / read


def _seconds(device: torch.device, act: Callable[[], Any]) -> float:
    """Median of a few times, after a first one that touches every page."""
    taken = []
    for _ in range(TIMES + 1):
        with Time(device) as time:
            act()
        taken.append(time.seconds)
    return median(taken[1:])


def open_device(name: str) -> torch.device:
    """The device ``name``; raises where there is none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise KeepKVError(f"no device {name!r} here: {str(error).partition(chr(10))[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise KeepKVError(f"device {name!r}: keepkv bench measures on cpu and cuda")
    return device


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on ``device``; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = said("/proc/meminfo", "MemAvailable")
    return None if found is None else int(found.split()[0]) * 1024
