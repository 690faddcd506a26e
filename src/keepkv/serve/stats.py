"""What is counted of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """An engine as it is now, and what it has done since it started.

    state: "starting", "running", "stopping", "stopped". rows: requests that decode. reading: jobs whose prompt is read.
    waiting: in the queue. widths: of batches; (1,): rows are decoded one by one. threads: of a CPU, that decode. bytes:
    that caches held when they were last measured, contexts included. reserved: of all that may still come of what was
    admitted, those held included. limit: of both. contexts: how many there are, of which ``contexts_in_memory``;
    context_bytes, context_disk: what they take of memory and disk. The rest counts from the start. finished: requests
    by how they ended, "stop", "length", "cancelled", "failed". refused: by error. prompt_tokens, cached_tokens,
    completion_tokens: of requests that ended. steps: forwards that decoded; decoded: rows in them, in sum. seconds: by
    what the worker did, "read", "decode", "idle".
    """

    state: str
    rows: int
    reading: int
    waiting: int
    widths: tuple[int, ...]
    threads: int | None
    bytes: int
    reserved: int
    limit: int
    contexts: int
    contexts_in_memory: int
    context_bytes: int
    context_disk: int
    finished: dict[str, int]
    refused: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: int
    decoded: int
    seconds: dict[str, float]
