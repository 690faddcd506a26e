"""The most power that a GPU may take, set for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from keepkv.errors import KeepKVError
from keepkv.measure.energy.nvml import MISSING, handle_of, library


def cannot_cap(device: str, watts: float) -> str | None:
    """Why power of ``device`` cannot be held to ``watts`` by this user; None where it can, which is tried with the cap
    that there is now."""
    if not device.startswith("cuda"):
        return "power can be capped on NVIDIA GPUs alone"
    try:
        nvml = library()
    except ModuleNotFoundError:
        return MISSING
    except Exception as error:  # nvml.NVMLError, which has no name before it is loaded
        return f"NVML: {error}"
    try:
        handle = handle_of(nvml, torch.device(device))
        least, most = (x / 1e3 for x in nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle))
        if not least <= watts <= most:
            return f"{watts:g} W: this board takes caps from {least:g} to {most:g} W"
        nvml.nvmlDeviceSetPowerManagementLimit(handle, nvml.nvmlDeviceGetPowerManagementLimit(handle))
    except (nvml.NVMLError, RuntimeError, AssertionError) as error:
        return f"power cannot be capped by this user: {error}"
    return None


@contextmanager
def capped(device: str, watts: float | None) -> Iterator[None]:
    """Inside, the board of ``device`` takes ``watts`` at most; None changes nothing. Raises ``KeepKVError``."""
    if watts is None:
        yield
        return
    if why := cannot_cap(device, watts):
        raise KeepKVError(why)
    nvml = library()
    handle = handle_of(nvml, torch.device(device))
    before = nvml.nvmlDeviceGetPowerManagementLimit(handle)
    nvml.nvmlDeviceSetPowerManagementLimit(handle, round(watts * 1e3))
    try:
        yield
    finally:
        nvml.nvmlDeviceSetPowerManagementLimit(handle, before)
