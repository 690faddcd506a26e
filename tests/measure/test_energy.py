"""Energy with made-up counters: what moved is counted, and what did not is no number."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keepkv.errors import KeepKVError
from keepkv.measure import energy
from keepkv.measure.energy import Counter, CounterMeter, NoMeter, PowerMeter, cap, nvml, rapl, trapezoid, zeus


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Board:
    """Counters that grow when told to, and end at ``end``."""

    def __init__(self, *starts: float, end: float = math.inf) -> None:
        self.values, self.end = list(starts), end
        self.counters = [Counter(lambda i=i: self.values[i], end) for i in range(len(starts))]

    def grow(self, i: int, joules: float) -> None:
        self.values[i] = (self.values[i] + joules) % self.end if self.end < math.inf else self.values[i] + joules


def meter_of(board: Board, clock: Clock, **more: Any) -> CounterMeter:
    return CounterMeter(board.counters, "a counter", period=None, clock=clock, **more)


def test_a_counter_that_moves_often_in_a_long_window_is_good() -> None:
    board, clock = Board(1000.0), Clock()
    meter = meter_of(board, clock)
    for _ in range(2):  # the second window counts its own
        meter.begin()
        for _ in range(30):
            clock.now += 0.1
            board.grow(0, 10.0)
            meter.poll()
        found = meter.end()
        assert found.joules == pytest.approx(300.0) and found.quality == "good"
        assert (found.window_s, found.updates, found.source) == (pytest.approx(3.0), 30, "a counter")


def test_a_short_window_is_of_low_quality_and_no_movement_is_no_number() -> None:
    board, clock = Board(5.0), Clock()
    meter = meter_of(board, clock)
    meter.begin()
    clock.now += 0.5
    board.grow(0, 3.0)
    found = meter.end()
    assert (found.joules, found.quality) == (3.0, "low")
    meter.begin()
    clock.now += 10
    found = meter.end()
    assert found.joules is None and found.quality == "none" and "did not move" in (found.why or "")


def test_counters_wrap_even_twice_if_they_are_read_in_between() -> None:
    board, clock = Board(90.0, end=100.0), Clock()
    meter = meter_of(board, clock)
    meter.begin()
    for _ in range(5):
        board.grow(0, 50.0)
        meter.poll()
    assert meter.end().joules == pytest.approx(250.0)


def test_two_boards_are_added_and_the_slower_one_decides_the_quality() -> None:
    board, clock = Board(0.0, 7.0), Clock()
    meter = meter_of(board, clock)
    meter.begin()
    for i in range(25):
        clock.now += 1
        board.grow(0, 2.0)
        if i % 5 == 0:
            board.grow(1, 1.0)
        meter.poll()
    found = meter.end()
    assert found.joules == pytest.approx(55.0) and found.updates == 5 and found.quality == "low"


def test_a_counter_that_fails_on_the_way_has_measured_nothing() -> None:
    state = {"fails": False}

    def read() -> float:
        if state["fails"]:
            raise OSError("gone")
        return 1.0

    meter = CounterMeter([Counter(read)], "a counter", period=None)
    meter.begin()
    state["fails"] = True
    found = meter.end()
    assert found.joules is None and "gone" in (found.why or "")


def test_the_thread_counts_how_often_a_counter_moves() -> None:
    board = Board(0.0)

    def read() -> float:
        board.grow(0, 1.0)
        return board.values[0]

    meter = CounterMeter([Counter(read)], "a counter", period=0.001)
    meter.begin()
    assert meter.watch is not None and meter.watch.thread is not None
    while meter.moves[0] < 3:
        pass
    found = meter.end()
    assert found.updates >= 4 and found.joules == pytest.approx(found.updates) and meter.watch.thread is None


def test_the_trapezoid_of_a_known_power() -> None:
    assert trapezoid([0, 3], [100, 100]) == 300
    assert trapezoid([0, 1, 3], [0, 100, 0]) == 150
    n = 2000
    times = [i * math.pi / n for i in range(n + 1)]
    assert trapezoid(times, [math.sin(t) for t in times]) == pytest.approx(2.0, abs=1e-5)
    assert trapezoid([], []) == trapezoid([1.0], [50.0]) == 0


def test_sampled_power_is_integrated() -> None:
    clock, watts = Clock(), [100.0]
    meter = PowerMeter(lambda: watts[0], "power", period=None, clock=clock)
    meter.begin()
    for _ in range(40):
        clock.now += 0.1
        meter.poll()
    found = meter.end()
    assert found.joules == pytest.approx(400.0) and found.quality == "good"


def zone(root: Path, name: str, kind: str, count: int, most: int = 10_000_000) -> Path:
    (root / name).mkdir(parents=True)
    for file, text in (("name", kind), ("energy_uj", count), ("max_energy_range_uj", most)):
        (root / name / file).write_text(f"{text}\n")
    return root / name / "energy_uj"


def test_rapl_adds_packages_and_memory(tmp_path: Path) -> None:
    package, memory = (
        zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000),
        zone(tmp_path, "intel-rapl:0:1", "dram", 9_000_000),
    )
    zone(tmp_path, "intel-rapl:0:0", "core", 0)
    meter = rapl.open_cpu(tmp_path, period=None)
    meter.begin()
    package.write_text("8000000")
    memory.write_text("1000000")
    assert meter.end().joules == pytest.approx(3 + 2)


def test_without_rapl_or_without_permission_there_is_no_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = rapl.open_cpu(tmp_path)
    assert isinstance(none, NoMeter)
    none.begin()
    found = none.end()
    assert found.joules is None and found.quality == "none" and "no RAPL" in (found.why or "")
    zone(tmp_path, "intel-rapl:0", "package-0", 1)

    def refused(file: Path) -> float:
        raise PermissionError(file)

    monkeypatch.setattr(rapl, "joules", refused)
    barred = rapl.open_cpu(tmp_path)
    assert isinstance(barred, NoMeter) and "root" in barred.why


class NVMLError(Exception):
    """As pynvml calls it."""


def library(counter: bool = True, mig: bool | None = False, processes: int = 1) -> Any:
    """A made-up pynvml with two boards that take 100 and 50 W."""
    clock = {"s": 0.0}

    def energy_of(handle: int) -> int:
        if not counter:
            raise NVMLError("not supported")
        clock["s"] += 0.01
        return int(clock["s"] * 1e5)

    def mode(handle: int) -> tuple[int, int]:
        if mig is None:
            raise NVMLError("not supported")
        return int(mig), 0

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlDeviceGetTotalEnergyConsumption=energy_of, nvmlDeviceGetMigMode=mode,
        nvmlDeviceGetPowerUsage=lambda handle: 100_000 if handle == 0 else 50_000,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=i) for i in range(processes)],
    )  # fmt: skip


def test_nvml_counts_and_older_boards_are_sampled() -> None:
    meter = nvml.of_handles(library(), [0], period=None)
    meter.begin()
    found = meter.end()
    assert found.source == "nvml-counter" and found.joules == pytest.approx(1.0)
    sampled = nvml.of_handles(library(counter=False), [0, 1], period=None)
    assert isinstance(sampled, PowerMeter) and sampled.watts() == pytest.approx(150.0)


@pytest.mark.parametrize(("made", "why"), [(library(mig=True), "MIG"), (library(processes=2), "2 processes")])
def test_energy_of_a_board_that_others_use_is_no_ones(made: Any, why: str) -> None:
    meter = nvml.of_handles(made, [0], period=None)
    meter.begin()
    found = meter.end()
    assert found.joules is None and why in (found.why or "")
    alone = nvml.of_handles(library(mig=None, processes=0), [0], period=None)  # a container sees no processes
    alone.begin()
    assert alone.end().joules is not None


def test_without_the_library_there_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(nvml, "library", missing)
    meter = nvml.open_gpu([torch.device("cuda", 0)])
    assert isinstance(meter, NoMeter) and "keepkv[energy]" in meter.why


def test_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(energy.open_meter(torch.device("cpu"), "none"), NoMeter)
    with pytest.raises(KeepKVError, match="source of energy"):
        energy.open_meter(torch.device("cpu"), "tdp")
    monkeypatch.setattr(zeus.importlib, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    with pytest.raises(KeepKVError, match="pip install zeus"):
        energy.open_meter(torch.device("cpu"), "zeus")


def test_zeus_is_asked_for_a_window() -> None:
    window = SimpleNamespace(time=3.0, gpu_energy={0: 70.0, 1: 30.0}, cpu_energy=None, dram_energy=None)
    monitor = SimpleNamespace(begin_window=lambda name: None, end_window=lambda name: window)
    found = zeus.ZeusMeter(torch.device("cuda"), monitor)
    found.begin()
    assert found.end().joules == 100.0
    cpu = zeus.ZeusMeter(torch.device("cpu"), monitor)
    assert cpu.end().joules is None and cpu.end().quality == "none"


def test_a_cap_is_set_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    watts = {"now": 700_000}

    def put(handle: int, milliwatts: int) -> None:
        watts["now"] = milliwatts

    made = SimpleNamespace(
        NVMLError=NVMLError, nvmlDeviceGetPowerManagementLimitConstraints=lambda handle: (200_000, 700_000),
        nvmlDeviceGetPowerManagementLimit=lambda handle: watts["now"], nvmlDeviceSetPowerManagementLimit=put,
    )  # fmt: skip
    monkeypatch.setattr(cap, "library", lambda: made)
    monkeypatch.setattr(cap, "handle_of", lambda nvml, device: 0)
    with pytest.raises(RuntimeError, match="within"), cap.capped("cuda", 300.0):
        assert watts["now"] == 300_000
        raise RuntimeError("within")
    assert watts["now"] == 700_000
    assert "from 200 to 700 W" in (cap.cannot_cap("cuda", 900.0) or "")

    def barred(handle: int, milliwatts: int) -> None:
        raise NVMLError("no permission")

    made.nvmlDeviceSetPowerManagementLimit = barred
    assert "no permission" in (cap.cannot_cap("cuda", 300.0) or "")


def test_power_is_capped_on_gpus_alone() -> None:
    assert "GPUs alone" in (cap.cannot_cap("cpu", 100) or "")
    with pytest.raises(KeepKVError, match="GPUs alone"), cap.capped("cpu", 100):
        raise AssertionError
    with cap.capped("cpu", None):
        pass
