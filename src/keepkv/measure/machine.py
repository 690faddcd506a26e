"""What a machine says of itself."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> str:
    """Name of the GPU, or of the processor with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = said("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def said(file: str, name: str) -> str | None:
    """What the first line ``name: …`` of a file of the system says; None where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def state(device: torch.device) -> dict[str, Any]:
    """What of a machine changes from one measurement to the next. ``load``: processes that ran or waited to, mean of
    the last minute; ``cores``. Of a GPU with NVML: ``driver``, ``sm_mhz``, ``celsius``, ``cap_w``. What is not told is
    left out."""
    found: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        found |= {"load": round(os.getloadavg()[0], 2), "cores": os.cpu_count()}
    if device.type == "cuda":
        found |= _gpu(device)
    return found


def _gpu(device: torch.device) -> dict[str, Any]:
    from keepkv.measure.energy.nvml import handle_of, library

    try:
        nvml = library()
        handle = handle_of(nvml, device)
        return {
            "driver": str(nvml.nvmlSystemGetDriverVersion()),
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "cap_w": nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3,
        }
    except Exception as error:  # no library, no driver, or one that tells less
        return {"nvml": f"{type(error).__name__}: {error}"}
