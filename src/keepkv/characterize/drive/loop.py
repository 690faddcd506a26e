"""The phases of a point: warm up until times are flat, a steady window, then drain. Closed and open loops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

from keepkv.characterize.drive.base import Driver, Timeline
from keepkv.characterize.grid.levels import Workload
from keepkv.characterize.grid.read import Phases
from keepkv.characterize.record.metrics import flat
from keepkv.characterize.workload.arrivals import gaps
from keepkv.characterize.workload.calls import Call, follow
from keepkv.errors import KeepKVError

Clock = Callable[[], float]
Turns = Callable[[int], list[Call]]


@dataclass
class Window:
    """What happened. start, end: of the steady window; lines: of all requests, those of the warm-up and those cut off
    among them. warm: "flat" or "limit"."""

    start: float = 0.0
    end: float = 0.0
    warm: str = "limit"
    lines: list[Timeline] = field(default_factory=list)


class Loop:
    """Sends the conversations that ``turns`` makes of numbers to ``driver``, as ``workload`` and ``phases`` say.

    clock: seconds. begun, ended: called at both edges of the window, for meters.
    """

    def __init__(
        self, driver: Driver, turns: Turns, workload: Workload, phases: Phases, seed: int = 0,
        clock: Clock = time.perf_counter, begun: Callable[[], None] = lambda: None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.driver, self.turns, self.workload, self.phases, self.seed = driver, turns, workload, phases, seed
        self.clock, self.begun, self.ended = clock, begun, ended
        self.window = Window()
        self.over = asyncio.Event()

    async def run(self) -> Window:
        """Warm up, measure, drain. Raises ``KeepKVError`` where no request of the warm-up was answered."""
        await self._warm()
        window = self.window
        self.begun()
        window.start = self.clock()
        drive = self._closed(count()) if self.workload.arrivals == "closed" else self._open()
        task = asyncio.ensure_future(drive)
        await self._until_enough(task)
        self.over.set()
        window.end = self.clock()
        self.ended()
        await self._drain(task)
        return window

    async def _warm(self) -> None:
        """Conversations by clients of a closed loop, as many as the workload has."""
        numbers = iter(range(-1, -self.phases.warm_most - 1, -1))
        await self._clients(numbers, lambda: self._flat())
        done = [line for line in self.window.lines if line.error is None]
        if not done:
            errors = [line.error for line in self.window.lines if line.error]
            raise KeepKVError(f"no request of the warm-up was answered: {errors[0] if errors else 'none was sent'}")
        self.window.warm = "flat" if self._flat() else "limit"

    def _flat(self) -> bool:
        done = [line for line in self.window.lines if line.times and line.end is not None]
        last = done[-self.phases.warm_least :]
        if len(last) < self.phases.warm_least:
            return False
        first = [line.times[0] - line.arrive for line in last]
        each = [(line.end - line.times[0]) / (len(line.times) - 1) for line in last if line.end and len(line.times) > 1]
        return flat(first) and (len(each) < 3 or flat(each))

    async def _closed(self, numbers: Iterator[int]) -> None:
        await self._clients(numbers, self.over.is_set)

    async def _clients(self, numbers: Iterator[int], stop: Callable[[], bool]) -> None:
        async def client() -> None:
            for number in numbers:
                if stop():
                    return
                await self._talk(number, self.clock())

        await asyncio.gather(*(client() for _ in range(self.workload.concurrency)))

    async def _open(self) -> None:
        due, talks = self.window.start, []
        for number, gap in enumerate(gaps(self.workload, self.seed)):
            due += gap
            if (wait := due - self.clock()) > 0:
                with suppress(asyncio.TimeoutError):  # the next one is due
                    await asyncio.wait_for(self.over.wait(), wait)
            if self.over.is_set():
                break
            talks.append(asyncio.ensure_future(self._talk(number, due)))
        await asyncio.gather(*talks)

    async def _talk(self, number: int, due: float) -> None:
        """One conversation: each turn comes when the one before it was answered."""
        before: Timeline | None = None
        for call in self.turns(number):
            if before is not None:
                if before.error is not None or self.over.is_set():
                    return
                call, due = follow(call, before.call, before.text), self.clock()
            before = Timeline(call, due)
            self.window.lines.append(before)
            await self.driver.send(before)

    async def _until_enough(self, task: Awaitable[None]) -> None:
        """Until the window has its seconds and its requests, or nothing more comes."""
        phases, running = self.phases, asyncio.ensure_future(task)
        while not running.done():
            passed = self.clock() - self.window.start
            done = sum(line.call.number >= 0 and line.end is not None for line in self.window.lines)
            if passed >= phases.most_seconds or (passed >= phases.seconds and done >= phases.requests):
                return
            await asyncio.wait([running], timeout=0.02)

    async def _drain(self, task: asyncio.Future[None]) -> None:
        """Wait for what is under way, as long as a window may last; the rest is cut off."""
        await asyncio.wait([task], timeout=self.phases.most_seconds)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif (error := task.exception()) is not None:
            raise error
