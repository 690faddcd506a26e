"""Jobs on a number of processes, until they are done or the time is up."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Call = Callable[[Any], None]
Guess = Callable[[Any, dict[Any, float]], float]  # seconds that a job will take, from those of the finished ones


def drain(
    jobs: Sequence[Any], call: Call, workers: int, limit: float, guess: Guess, tell: Callable[[str], None] = print
) -> dict[Any, float]:
    """Runs ``call(job)`` for each, in order, ``workers`` at a time; returns the seconds that each finished one took.

    A job that would not end within ``limit`` seconds from now is left out for a later one that does; what still runs
    then is terminated. A job that fails is told, and the others go on. Workers are forked: what the caller has
    imported is there at once.
    """
    began = time.monotonic()
    waiting, done = list(jobs), {}
    pool = [_start(call) for _ in range(min(workers, len(waiting)))]
    idle, busy = [pipe for _, pipe in pool], {}
    processes = {pipe: process for process, pipe in pool}
    while True:
        for pipe in list(idle):
            left = began + limit - time.monotonic()
            if (job := next((job for job in waiting if guess(job, done) <= left), None)) is not None:
                waiting.remove(job)
                idle.remove(pipe)
                pipe.send(job)
                busy[pipe] = job
        ready = wait(list(busy), max(0.0, began + limit - time.monotonic())) if busy else []
        if not ready:
            break
        for pipe in ready:
            job = busy.pop(pipe)
            try:
                seconds, error = pipe.recv()
            except EOFError:
                seconds, error = 0.0, "its process died"
                processes[pipe].join()
                del processes[pipe]
                process, pipe = _start(call)
                processes[pipe] = process
            idle.append(pipe)
            if error is None:
                done[job] = seconds
            at = f"{time.monotonic() - began:.0f} s, {len(waiting)} wait"
            tell(f"[{at}] {job.where}: {f'{seconds:.1f} s' if error is None else error}")
    for job in busy.values():
        tell(f"{job.where}: stopped")
    for job in waiting:
        tell(f"{job.where}: not started")
    for process in processes.values():
        process.terminate()
        process.join()
    return done


def _start(call: Call) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(call, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(call: Call, pipe: Any) -> None:
    while True:
        job = pipe.recv()
        began, error = time.perf_counter(), None
        try:
            call(job)
        except Exception:
            error = traceback.format_exc()
        pipe.send((time.perf_counter() - began, error))
