"""Counters of processors and their memory: RAPL, through Linux powercap, AMD's in the same tree."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from keepkv.measure import meters
from keepkv.measure.energy.base import EnergyMeter, NoMeter
from keepkv.measure.energy.counter import Counter, CounterMeter


def open_cpu(root: Path | None = None, period: float | None = 0.05) -> EnergyMeter:
    """Packages and the memory beside them; cores are part of their package, "psys" contains all. root: the tree of
    powercap. Counters are often for root alone, and virtual machines have none."""
    where = meters.POWERCAP if root is None else root
    zones = sorted(path.parent for path in where.glob("intel-rapl:*/name") if meters.COUNTED.match(path.read_text()))
    if not zones:
        return NoMeter("no RAPL here: powercap has no zone of a package or of memory")
    try:
        counters = [
            Counter(partial(joules, zone / "energy_uj"), joules(zone / "max_energy_range_uj")) for zone in zones
        ]
        return CounterMeter(counters, "rapl", period=period)
    except PermissionError:
        return NoMeter("RAPL may not be read: let this user read energy_uj of powercap, or run as root")
    except (OSError, ValueError) as error:
        return NoMeter(f"RAPL cannot be read: {error}")


def joules(file: Path) -> float:
    """What a file of powercap says, in microjoules there."""
    return int(file.read_text()) / 1e6
