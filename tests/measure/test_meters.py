"""Meters, and what they read on a machine that has none of what they need."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from zoo import model

from keepkv.measure import Energy, MadeWith, Peak, Time, environment, meters

CPU = torch.device("cpu")


def test_time_is_what_passes_inside() -> None:
    with Time(CPU) as outer:
        with Time(CPU) as inner:
            time.sleep(0.02)
        time.sleep(0.02)
    assert 0.02 <= inner.seconds <= outer.seconds - 0.02


def test_a_peak_is_of_what_runs_inside_and_not_of_what_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 26
    with Peak(CPU) as before:
        torch.ones(size).sum()
    with Peak(CPU) as after:
        pass
    if before.bytes is None or after.bytes is None:
        pytest.skip("this system does not tell")
    assert before.bytes - after.bytes > 2 * size
    monkeypatch.setattr(meters, "RESET", Path("/nowhere/clear_refs"))  # its mark would be that of another time
    with Peak(CPU) as unknown:
        pass
    assert unknown.bytes is None


def zone(root: Path, name: str, kind: str, count: int, most: int = 1_000_000_000) -> Path:
    (root / name).mkdir(parents=True)
    for file, text in (("name", kind), ("energy_uj", count), ("max_energy_range_uj", most)):
        (root / name / file).write_text(f"{text}\n")
    return root / name / "energy_uj"


def test_energy_adds_packages_and_memory_and_counters_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "POWERCAP", tmp_path)
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 9_000_000, 9_999_999)
    inside = [zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:1", "psys", 0)]
    with Energy(CPU) as energy:
        package.write_text("8000000")
        memory.write_text("1000000")
        for other in inside:
            other.write_text("7000000")
    assert energy.joules == pytest.approx(3 + 2, abs=1e-5)


def test_without_a_counter_energy_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "POWERCAP", tmp_path)
    with Energy(CPU) as energy:
        pass
    assert energy.joules is None
    zone(tmp_path, "intel-rapl:0", "package-0", 5).unlink()  # as where only root may read it
    with Energy(CPU) as energy:
        pass
    assert energy.joules is None


def test_energy_of_a_gpu_is_nvml_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter of the GPU that torch means, whatever number NVML gives it."""
    counts = iter((1000, 4000, 9500))
    asked: list[str] = []

    class NVMLError(Exception):
        pass

    nvml = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counts),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    gpu = torch.device("cuda:0")
    with Energy(gpu) as energy:
        pass
    assert energy.joules == 5.5 and asked == ["GPU-12-34"]

    def refuse(handle: Any) -> int:
        raise NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    with Energy(gpu) as energy:
        pass
    assert energy.joules is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Energy(gpu) as energy:
        pass
    assert energy.joules is None


def test_made_with_says_model_device_and_software(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "revision", lambda: "abc")
    found = MadeWith.of(model("llama"), "a llama")
    assert (found.model, found.device, found.dtype, found.revision) == ("a llama", "cpu", "float32", "abc")
    assert found.versions == environment.versions() and MadeWith.of(model("llama")).model == "LlamaForCausalLM"
