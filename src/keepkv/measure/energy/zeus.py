"""What the package zeus reads: NVIDIA and AMD boards, RAPL, Apple, Jetson. Installed by whoever wants it."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from keepkv.measure.energy.base import Reading, made

WINDOW = "keepkv"


class ZeusMeter:
    """A window of ``zeus.monitor.ZeusMonitor``: the board of a GPU, or packages and memory of processors. monitor: in
    the place of its own. Raises ``ModuleNotFoundError`` where zeus is not installed."""

    def __init__(self, device: torch.device, monitor: Any = None) -> None:
        self.gpu = device.type == "cuda"
        if monitor is None:
            kind = importlib.import_module("zeus.monitor").ZeusMonitor
            monitor = kind(gpu_indices=[device.index or 0] if self.gpu else [])
        self.monitor = monitor

    def begin(self) -> None:
        self.monitor.begin_window(WINDOW)

    def end(self) -> Reading:
        found = self.monitor.end_window(WINDOW)
        parts = [found.gpu_energy] if self.gpu else [found.cpu_energy, found.dram_energy]
        known = [joules for part in parts if part for joules in part.values()]
        if not known:
            return Reading(None, "zeus", "none", found.time, why="zeus found no counter of this device")
        return made(sum(known), "zeus", found.time, None)
