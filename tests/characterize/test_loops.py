"""Closed and open loops, with a driver that answers when it is told to."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from keepkv.characterize.drive.base import Timeline
from keepkv.characterize.drive.loop import Loop, Window
from keepkv.characterize.grid.levels import Workload
from keepkv.characterize.grid.read import Phases
from keepkv.characterize.workload.calls import Call
from keepkv.errors import KeepKVError
from keepkv.tasks.base import Question

PHASES = Phases(warm_least=3, warm_most=6, seconds=0.2, requests=5, most_seconds=2.0, idle=0.0)


class Driver:
    """Answers after ``took`` seconds. most: of requests at once that were ever under way."""

    def __init__(self, took: float = 0.01, fails: bool = False, never: int | None = None) -> None:
        self.took, self.fails, self.never = took, fails, never
        self.now = self.most = 0

    async def send(self, line: Timeline) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            line.admit = time.perf_counter()
            if line.call.number == self.never:
                await asyncio.sleep(60)
            await asyncio.sleep(self.took)
            if self.fails:
                line.error = "500"
                return
            line.times = [line.admit + self.took / 2, line.admit + self.took]
            line.end, line.text = line.times[-1], f" reply {line.call.number}"
        finally:
            self.now -= 1


def turns(number: int, count: int = 1) -> list[Call]:
    return [Call(number, i, "facts", f"context {number}", Question(f" q{i}", " a"), 2, True) for i in range(count)]


def run(driver: Driver, workload: Workload, phases: Phases = PHASES, make=turns, **more) -> Window:
    return asyncio.run(Loop(driver, make, workload, phases, **more).run())


def test_a_closed_loop_keeps_its_clients_busy_and_its_numbers_in_order() -> None:
    driver = Driver()
    window = run(driver, Workload(concurrency=3))
    assert driver.most == 3
    steady = [line.call.number for line in window.lines if line.call.number >= 0]
    assert steady == list(range(len(steady))) and len(steady) >= PHASES.requests
    assert window.end - window.start >= PHASES.seconds
    assert all(line.arrive < window.end for line in window.lines)
    assert all(line.end is not None for line in window.lines)  # drained


def test_warming_up_ends_when_times_are_flat_and_is_told_apart() -> None:
    quiet = run(Driver(0.05), Workload())
    assert quiet.warm == "flat" and sum(line.call.number < 0 for line in quiet.lines) == PHASES.warm_least

    class Slower(Driver):
        async def send(self, line: Timeline) -> None:
            self.took += 0.03
            await super().send(line)

    moving = run(Slower(), Workload())
    assert moving.warm == "limit" and sum(line.call.number < 0 for line in moving.lines) == PHASES.warm_most


def test_an_open_loop_sends_when_due_whether_or_not_others_are_answered() -> None:
    driver = Driver(took=0.3)
    workload = Workload("poisson", rate=40.0)
    window = run(driver, workload, replace(PHASES, warm_least=1, warm_most=1))
    assert driver.most > 3
    due = [line.arrive - window.start for line in window.lines if line.call.number >= 0]
    again = run(Driver(took=0.3), workload, replace(PHASES, warm_least=1, warm_most=1))
    other = [line.arrive - again.start for line in again.lines if line.call.number >= 0]
    n = min(len(due), len(other))
    assert n >= 5 and due[:n] == pytest.approx(other[:n], abs=1e-9)  # what is due does not depend on what happens
    assert due == sorted(due)


def test_a_trace_ends_the_window_when_nothing_more_comes(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at": 0}\n{"at": 0.05}\n{"at": 0.1}\n')
    window = run(Driver(), Workload("trace", trace=str(file)), replace(PHASES, seconds=30.0, requests=100))
    assert sorted(line.call.number for line in window.lines if line.call.number >= 0) == [0, 1, 2]
    assert window.end - window.start < 2


def test_turns_wait_for_the_reply_before_them_and_carry_it() -> None:
    window = run(Driver(), Workload(turns=2), make=lambda number: turns(number, 2))
    talks: dict[int, list[Timeline]] = {}
    for line in window.lines:
        talks.setdefault(line.call.number, []).append(line)
    whole = [held for held in talks.values() if len(held) == 2]
    assert whole
    for first, second in whole:
        assert second.arrive >= first.end
        assert second.call.context == f"{first.call.context} q0 reply {first.call.number}"


def test_what_is_not_answered_in_time_is_cut_off() -> None:
    phases = replace(PHASES, most_seconds=0.4)
    window = run(Driver(never=2), Workload(concurrency=2), phases)
    [cut] = [line for line in window.lines if line.end is None]
    assert cut.call.number == 2 and cut.error is None


def test_a_driver_that_answers_nothing_is_said_at_once() -> None:
    with pytest.raises(KeepKVError, match="no request of the warm-up was answered: 500"):
        run(Driver(fails=True), Workload())


def test_meters_are_told_of_both_edges() -> None:
    edges: list[float] = []
    window = run(
        Driver(),
        Workload(),
        begun=lambda: edges.append(time.perf_counter()),
        ended=lambda: edges.append(time.perf_counter()),
    )
    assert edges[0] <= window.start < window.end <= edges[1]
