"""The process that measures one point: ``python -m keepkv.characterize.drive.worker``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from keepkv.characterize.drive.base import Driver, Timeline
from keepkv.characterize.drive.loop import Loop, Window
from keepkv.characterize.grid.levels import CHECKPOINT, Point
from keepkv.characterize.grid.possible import path_of
from keepkv.characterize.grid.read import IN_PROCESS, SERVE, Phases
from keepkv.characterize.record.metrics import queue_grows
from keepkv.characterize.record.rows import RequestRow
from keepkv.characterize.workload.calls import Calls
from keepkv.characterize.workload.graded import graded
from keepkv.core.plugins import load_file
from keepkv.errors import KeepKVError
from keepkv.measure.energy import EnergyMeter, NoMeter, Reading, open_meter
from keepkv.measure.energy.cap import capped
from keepkv.measure.machine import state
from keepkv.measure.rows import plain


@dataclass
class Spec:
    """What a worker is told: the point, its digest, and what is the same for all points of a run."""

    point: Point
    digest: str
    setting: dict[str, Any]
    imports: list[str]

    @classmethod
    def of(cls, held: dict[str, Any]) -> Spec:
        return cls(Point.from_dict(held["point"]), held["digest"], held["setting"], held["imports"])


def measure(spec: Spec) -> dict[str, Any]:
    """Everything that the rows of a point need: ``requests`` and the fields of its ``PointRow`` that are measured."""
    point, setting = spec.point, spec.setting
    for path in spec.imports:
        load_file(path)
    if point.hardware.threads is not None:
        torch.set_num_threads(point.hardware.threads)
    local = setting["driver"] in (IN_PROCESS, SERVE)
    # Of somebody else's server we do not even know on which machine it is.
    meter = open_meter(torch.device(point.hardware.device), setting["energy"]) if local else NoMeter("another machine")
    phases = Phases(**setting["phases"])
    with capped(point.hardware.device, point.hardware.power_cap), _driver(spec) as (driver, tokenizer):
        rest = _rest(meter, phases.idle)
        calls = Calls(point, tokenizer)
        found: list[Reading] = []
        device = torch.device(point.hardware.device)

        def begun() -> None:
            _settle(device)
            meter.begin()

        def ended() -> None:
            _settle(device)
            found.append(meter.end())

        loop = Loop(driver, calls.turns, point.workload, phases, point.seed, begun=begun, ended=ended)
        window, peak, made = asyncio.run(_run(loop, driver))
    [energy] = found
    if setting["driver"] == SERVE:  # what it was started with is known here
        made = {"model": setting["model"], "versions": made["versions"]}
    rows = [_row(line, window, spec.digest, tokenizer) for line in window.lines]
    span = window.end - window.start
    return {
        "requests": [row.to_dict() for row in rows],
        "warm": window.warm,
        "unstable": None if point.workload.arrivals == "closed" else queue_grows(rows, span),
        "window_s": span,
        "joules": energy.joules, "energy_source": energy.source, "energy_quality": energy.quality,
        "energy_why": energy.why, "idle_watts": rest, "peak_bytes": peak, "made_with": made,
        "state": state(device) if local else {},
    }  # fmt: skip


@contextmanager
def _driver(spec: Spec) -> Iterator[tuple[Driver, Any]]:
    """What answers, and the tokenizer."""
    from transformers import AutoTokenizer

    point, setting = spec.point, spec.setting
    model, how = path_of(setting["model"]), setting["driver"]
    if how == IN_PROCESS:
        from keepkv.characterize.drive.inprocess import InProcess
        from keepkv.characterize.drive.weights import load

        loaded, tokenizer = load(model, point.weights, point.hardware)
        yield InProcess(loaded, tokenizer, point.technique, setting["rows"], point.seed, setting["model"]), tokenizer
        return
    from keepkv.characterize.drive.endpoint import Endpoint

    tokenizer = AutoTokenizer.from_pretrained(model)
    if how != SERVE:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        yield Endpoint(how, tokenizer, api=setting["api"], headers=headers), tokenizer
        return
    from keepkv.characterize.drive.server import Server, own_command

    name = point.weights.removeprefix(CHECKPOINT) if point.weights.startswith(CHECKPOINT) else model
    dtype = "bfloat16" if point.weights == "bf16" else point.hardware.dtype
    server = Server(own_command(name, point.hardware.device, dtype, setting["rows"]))
    try:
        yield (
            Endpoint(server.address, tokenizer, api=setting["api"], technique=point.technique, peak=server.peak_bytes),
            tokenizer,
        )
    finally:
        server.close()


async def _run(loop: Loop, driver: Driver) -> tuple[Window, int | None, dict[str, Any]]:
    try:
        window = await loop.run()
        return window, driver.peak_bytes(), driver.made_with()
    finally:
        await driver.close()


def _rest(meter: EnergyMeter, seconds: float) -> float | None:
    """Watts while nothing runs; None where there is no meter or no time for it."""
    if isinstance(meter, NoMeter) or seconds <= 0:
        return None
    meter.begin()
    time.sleep(seconds)
    found = meter.end()
    return None if found.joules is None else found.joules / found.window_s


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(line: Timeline, window: Window, digest: str, tokenizer: Any) -> RequestRow:
    call, start = line.call, window.start
    status = "failed" if line.error is not None else "ok" if line.end is not None else "cut"
    score = graded(tokenizer, call, line.text, line.tokens) if status == "ok" else None
    return RequestRow(
        point=digest, number=call.number, turn=call.turn, family=call.family, status=status,
        arrive=line.arrive - start, admit=None if line.admit is None else line.admit - start,
        times=[at - start for at in line.times], end=None if line.end is None else line.end - start, n_in=line.n_in,
        n_out=line.n_out, cached=line.cached, score=None if score is None else score.value,
        leaked=None if score is None or not call.question.forbidden else score.leaked, reply=line.text,
        error=line.error, **line.kv,
    )  # fmt: skip


def main() -> None:
    """Reads a spec from the first line of stdin, and answers with one line: what was measured, or what went wrong."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand in the answer
    try:
        answer = measure(Spec.of(json.loads(sys.stdin.readline())))
    except Exception as error:
        first = " ".join(str(error).split())
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in first
        said = first if isinstance(error, KeepKVError) else f"{type(error).__name__}: {first}"
        answer = {"error": said, "how": "memory" if memory else "error"}
    answers.write(json.dumps(plain(answer)) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
