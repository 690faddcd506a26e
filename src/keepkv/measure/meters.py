"""Meters: context managers that say how many seconds, bytes and joules the code inside them took.

Every meter reads a gauge. ``Gauge`` itself is the gauge of a machine that has none: what it reads is None. This file
imports torch alone, so that a process of another library can load it by its path.
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


def now(device: torch.device) -> float:
    """Seconds on a clock, when everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Gauge:
    """What a meter reads; this one reads nothing."""

    def reset(self) -> None:
        """Begin to measure."""

    def read(self) -> float | None:
        """What was measured since ``reset``; None where nothing can be."""
        return None


class Meter:
    """``with Meter(gauge) as meter: …``; then ``meter.reading``, None before that."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.reading: float | None = None

    def __enter__(self: M) -> M:
        self.gauge.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self.reading = self.gauge.read()


class Time(Meter):
    """``with Time(device) as time: …``; then ``time.seconds``. Waits for a GPU at both ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(_Counters((lambda: now(device), math.inf)))

    @property
    def seconds(self) -> float:
        """0 before the end."""
        return self.reading or 0.0


class Peak(Meter):
    """``with Peak(device) as peak: …``; then ``peak.bytes``: the most memory at once. On a GPU it is what the allocator
    gave out, elsewhere the resident set of this process, model included."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(_AllocatorPeak(device) if device.type == "cuda" else _resident_peak())

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


class _Counters(Gauge):
    """The sum of what counters that only grow have grown by. Each comes with the number at which it begins anew."""

    def __init__(self, *counters: tuple[Callable[[], float], float]) -> None:
        self.counters = counters
        self.reset()  # raises where one cannot be read

    def reset(self) -> None:
        self.starts = [count() for count, _ in self.counters]

    def read(self) -> float:
        return sum((count() - start) % end for (count, end), start in zip(self.counters, self.starts, strict=True))


class _AllocatorPeak(Gauge):
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class _ResidentPeak(Gauge):
    def reset(self) -> None:
        RESET.write_text("5")  # Linux: the high-water mark starts anew

    def read(self) -> int | None:
        found = [line.split() for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(found[0][1]) * 1024 if found else None


def _resident_peak() -> Gauge:
    gauge = _ResidentPeak()
    try:
        gauge.reset()
        gauge.read()
    except OSError:  # not Linux; or the mark cannot be reset, and would be that of another time
        return Gauge()
    return gauge


def _cpu_energy() -> Gauge:
    """Packages and the memory beside them. Cores are part of their package, "psys" contains all."""

    def joules(file: Path) -> float:
        return int(file.read_text()) / 1e6

    try:
        zones = [path.parent for path in POWERCAP.glob("intel-rapl:*/name") if COUNTED.match(path.read_text())]
        ends = [joules(zone / "max_energy_range_uj") for zone in zones]
        counts = [partial(joules, zone / "energy_uj") for zone in zones]
        return _Counters(*zip(counts, ends, strict=True)) if zones else Gauge()
    except (OSError, ValueError):  # counters are often for root alone
        return Gauge()


def _gpu_energy(device: torch.device) -> Gauge:
    """The counter of NVML, which starts when the driver is loaded."""
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return Gauge()

    def joules() -> float:
        torch.cuda.synchronize(device)
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return _Counters((joules, math.inf))
    except nvml.NVMLError:  # GPUs before Volta have no counter
        return Gauge()
