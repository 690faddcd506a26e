"""Meters: context managers that say how many seconds, bytes and joules the code inside them took.

Every meter reads a gauge. ``Gauge`` itself is the gauge of a machine that has none: what it reads is None. This file
imports torch alone, so that a process of another library can load it by its path.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
POWERCAP = Path("/sys/class/powercap")
M = TypeVar("M", bound="Meter")


def now(device: torch.device) -> float:
    """Seconds on a clock, when everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Gauge:
    """A gauge of nothing."""

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reading = self.gauge.read()


class Time(Meter):
    """``with Time(device) as time: …``; then ``time.seconds``. Waits for a GPU at both ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(_Clock(device))

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


class _Clock(Gauge):
    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, 0.0

    def reset(self) -> None:
        self.start = now(self.device)

    def read(self) -> float:
        return now(self.device) - self.start


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


class _Rapl(Gauge):
    """zones: directories of the kernel's ``powercap`` with a counter of microjoules that wraps around."""

    def __init__(self, zones: list[Path]) -> None:
        self.ranges = {zone / "energy_uj": int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self.start = self._counts()

    def reset(self) -> None:
        self.start = self._counts()

    def read(self) -> float:
        end = self._counts()
        return sum((end[path] - self.start[path]) % (most + 1) for path, most in self.ranges.items()) / 1e6

    def _counts(self) -> dict[Path, int]:
        return {path: int(path.read_text()) for path in self.ranges}


def _cpu_energy() -> Gauge:
    """Packages and the memory beside them. Cores are part of their package, "psys" contains all."""
    try:
        names = {path.parent: path.read_text().strip() for path in POWERCAP.glob("intel-rapl:*/name")}
        zones = [zone for zone, name in names.items() if name.startswith("package") or name == "dram"]
        return _Rapl(zones) if zones else Gauge()
    except (OSError, ValueError):  # counters are often for root alone
        return Gauge()


class _Nvml(Gauge):
    """A counter of millijoules since the driver was loaded. nvml: the module ``pynvml``."""

    def __init__(self, nvml: Any, device: torch.device) -> None:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        self.device, self.count = device, lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        self.start = self.count()

    def reset(self) -> None:
        torch.cuda.synchronize(self.device)
        self.start = self.count()

    def read(self) -> float:
        torch.cuda.synchronize(self.device)
        return (self.count() - self.start) / 1e3


def _gpu_energy(device: torch.device) -> Gauge:
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return Gauge()
    try:
        return _Nvml(nvml, device)
    except nvml.NVMLError:  # GPUs before Volta have no counter
        return Gauge()
