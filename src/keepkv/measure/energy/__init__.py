"""Energy, measured or not said: counters of GPUs and processors, never a guess from what a chip may take at most."""

from __future__ import annotations

import torch

from keepkv.errors import KeepKVError, UnknownName
from keepkv.measure.energy.base import EnergyMeter, NoMeter, Reading
from keepkv.measure.energy.counter import Counter, CounterMeter
from keepkv.measure.energy.power import PowerMeter, trapezoid

SOURCES = ("auto", "zeus", "none")

__all__ = [
    "SOURCES", "Counter", "CounterMeter", "EnergyMeter", "NoMeter", "PowerMeter", "Reading", "open_meter", "trapezoid",
]  # fmt: skip


def open_meter(device: torch.device, source: str = "auto") -> EnergyMeter:
    """The meter of ``device``. "auto": NVML for a GPU and RAPL for processors, where they can be read; "zeus": what
    the package zeus reads; "none": nothing. Where nothing can be read, readings say why and have no joules.

    Raises ``KeepKVError`` where zeus was asked for and is not there.
    """
    from keepkv.measure.energy import nvml, rapl, zeus

    if source not in SOURCES:
        raise UnknownName("source of energy", source, SOURCES)
    if source == "none":
        return NoMeter("not asked for")
    if source == "zeus":
        try:
            return zeus.ZeusMeter(device)
        except ModuleNotFoundError as error:
            raise KeepKVError("energy: zeus was asked for and is not installed: pip install zeus") from error
    return nvml.open_gpu([device]) if device.type == "cuda" else rapl.open_cpu()
