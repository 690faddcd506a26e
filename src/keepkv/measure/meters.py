"""Meters: context managers that say how many seconds, bytes and joules the code inside them took.

Every meter has a gauge, which is called at the start and returns what reads it at the end: None on a machine that has
nothing to be read. This file imports torch alone, so that a process of another library can load it by its path.
"""

from __future__ import annotations

import importlib
import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
POWERCAP, COUNTED = Path("/sys/class/powercap"), re.compile("package|dram")
M = TypeVar("M", bound="Meter")
Gauge = Callable[[], Callable[[], float | None]]


def now(device: torch.device) -> float:
    """Seconds on a clock, when everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Meter:
    """``with Meter(gauge) as meter: …``; then ``meter.reading``, None before that."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.reading: float | None = None

    def __enter__(self: M) -> M:
        self.end = self.gauge()
        return self

    def __exit__(self, *error: object) -> None:
        self.reading = self.end()


class Time(Meter):
    """``with Time(device) as time: …``; then ``time.seconds``. Waits for a GPU at both ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(_counters((lambda: now(device), math.inf)))

    @property
    def seconds(self) -> float:
        """0 before the end."""
        return self.reading or 0.0


class Peak(Meter):
    """``with Peak(device) as peak: …``; then ``peak.bytes``: the most memory at once. On a GPU it is what the allocator
    gave out, elsewhere the resident set of this process, model included."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(partial(_allocator_peak, device) if device.type == "cuda" else _resident_peak)

    @property
    def bytes(self) -> int | None:
        """None before the end, and where the system does not tell."""
        return None if self.reading is None else int(self.reading)


class Energy(Meter):
    """``with Energy(device) as energy: …``; then ``energy.joules``. It is what the whole GPU took (NVML, through the
    package ``pynvml``), or all processors and their memory (Linux RAPL), whoever else used them meanwhile."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(_gpu_energy(device) if device.type == "cuda" else _cpu_energy())

    @property
    def joules(self) -> float | None:
        """None before the end, and where no counter can be read."""
        return self.reading


def _counters(*counters: tuple[Callable[[], float], float]) -> Gauge:
    """The sum of what counters that only grow have grown by. Each comes with the number at which it begins anew."""

    def begin() -> Callable[[], float]:
        starts = [count() for count, _ in counters]
        return lambda: sum((count() - start) % end for (count, end), start in zip(counters, starts, strict=True))

    begin()  # raises where one cannot be read
    return begin


def _nothing() -> Callable[[], None]:
    return lambda: None


def _allocator_peak(device: torch.device) -> Callable[[], int]:
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device)


def _resident_peak() -> Callable[[], int | None]:
    def peak() -> int | None:
        found = [line.split() for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(found[0][1]) * 1024 if found else None

    try:
        RESET.write_text("5")  # Linux: the high-water mark starts anew
        peak()
    except OSError:  # not Linux; or the mark cannot be reset, and would be that of another time
        return _nothing()
    return peak


def _cpu_energy() -> Gauge:
    """Packages and the memory beside them. Cores are part of their package, "psys" contains all."""

    def joules(file: Path) -> float:
        return int(file.read_text()) / 1e6

    try:
        zones = [path.parent for path in POWERCAP.glob("intel-rapl:*/name") if COUNTED.match(path.read_text())]
        ends = [joules(zone / "max_energy_range_uj") for zone in zones]
        counts = [partial(joules, zone / "energy_uj") for zone in zones]
        return _counters(*zip(counts, ends, strict=True)) if zones else _nothing
    except (OSError, ValueError):  # counters are often for root alone
        return _nothing


def _gpu_energy(device: torch.device) -> Gauge:
    """The counter of NVML, which starts when the driver is loaded."""
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return _nothing

    def joules() -> float:
        torch.cuda.synchronize(device)
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return _counters((joules, math.inf))
    except nvml.NVMLError:  # GPUs before Volta have no counter
        return _nothing
