"""NVIDIA's counters, through the package nvidia-ml-py (import ``pynvml``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from keepkv.measure.energy.base import EnergyMeter, NoMeter
from keepkv.measure.energy.counter import Counter, CounterMeter
from keepkv.measure.energy.power import PowerMeter

MISSING = "no NVML: pip install 'keepkv[energy]'"


def library() -> Any:
    """``pynvml``, started. Raises ``ModuleNotFoundError``, or an error of NVML where there is no driver."""
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml


def handle_of(nvml: Any, device: torch.device) -> Any:
    """The board of ``device``, found by its identity: the indices of torch are of visible devices alone."""
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def open_gpu(devices: Sequence[torch.device], processes: int = 1) -> EnergyMeter:
    """The counter of the boards of ``devices``, Volta or newer, or the sampled power of an older one. processes: how
    many of this measurement use each; where there are more, energy is no one's."""
    try:
        nvml = library()
    except ModuleNotFoundError:
        return NoMeter(MISSING)
    except Exception as error:  # nvml.NVMLError, which has no name before it is loaded
        return NoMeter(f"NVML: {error}")
    try:
        handles = [handle_of(nvml, device) for device in devices]
        return of_handles(nvml, handles, processes)
    except nvml.NVMLError as error:
        return NoMeter(f"NVML: {error}")


def of_handles(nvml: Any, handles: Sequence[Any], processes: int = 1, period: float | None = 0.02) -> EnergyMeter:
    """The meter of boards by their handles. Raises ``nvml.NVMLError`` where neither energy nor power can be read."""

    def joules(handle: Any) -> float:
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    refuse = partial(shared, nvml, handles, processes)
    try:
        counters = [Counter(partial(joules, handle)) for handle in handles]
        return CounterMeter(counters, "nvml-counter", refuse=refuse, period=period)
    except nvml.NVMLError:
        return PowerMeter(
            lambda: sum(int(nvml.nvmlDeviceGetPowerUsage(handle)) for handle in handles) / 1e3,
            "nvml-power", refuse=refuse, period=period,
        )  # fmt: skip


def shared(nvml: Any, handles: Sequence[Any], processes: int) -> str | None:
    """Why the energy of a whole board is not this measurement's alone; None where it is."""
    for handle in handles:
        try:
            partitioned = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
        except nvml.NVMLError:  # a board that cannot be
            partitioned = False
        if partitioned:
            return "the GPU is partitioned (MIG), its counter is of the whole board"
        found = len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        if found > processes:
            return f"{found} processes use the GPU, {processes} of them ours: its counter is of the whole board"
    return None
