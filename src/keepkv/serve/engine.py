"""The engine: one model, one worker thread, many requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from keepkv.serve.contexts.info import ContextInfo
from keepkv.serve.request import Compression, Event, Request
from keepkv.serve.settings import Settings
from keepkv.serve.stream import Stream


@dataclass(frozen=True)
class Stats:
    """An engine as it is now, and what it has done since it started.

    state: "starting", "running", "stopping", "stopped". rows: requests that decode. reading: whose prompt is read.
    waiting: in the queue. bytes: that caches hold, contexts included, as measured. reserved: of all that may still
    come of what was admitted, those held included. limit: of both. contexts: by name, of which ``contexts_in_memory``;
    context_bytes, context_disk: what they take of memory and disk. The rest counts from the start: finished: requests
    by how they ended, "stop", "length", "cancelled", "failed"; refused: by error. prompt_tokens, cached_tokens,
    completion_tokens; steps: forwards that decoded; decoded: rows in them, in sum. seconds: by what the worker did,
    "read", "compress", "decode", "idle".
    """

    state: str
    rows: int
    reading: int
    waiting: int
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


class Contexts(Protocol):
    """Of an engine; every method may be called by any thread."""

    def create(
        self,
        name: str,
        tokens: Sequence[int],
        text: str = "",
        compression: Compression | None = None,
        *,
        replace: bool = False,
    ) -> Future[ContextInfo]:
        """Read ``tokens`` and compress them. What the future tells is on the disk. Raises at once ``ContextExists``,
        unless ``replace``, and what ``Engine.submit`` raises; the future what reading them did."""
        ...  # fmt: skip

    def get(self, name: str) -> ContextInfo:
        """Raises ``ContextMissing``."""
        ...

    def tokens(self, name: str) -> tuple[int, ...]:
        """What was read. Raises ``ContextMissing``."""
        ...

    def list(self) -> list[ContextInfo]:
        """All of them, by name."""
        ...

    def delete(self, name: str) -> None:
        """Also of the disk; requests that run on it go on. Raises ``ContextMissing``."""
        ...


class Engine(Protocol):
    """Serves ``model``, of transformers, with its tokenizer."""

    contexts: Contexts

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None: ...

    def start(self) -> None:
        """Start the worker. Raises where the model cannot be served, or the folder of contexts not be read."""
        ...

    def stop(self, grace: float = 10.0) -> None:
        """Take nothing new, wait ``grace`` seconds for what runs, then cancel it, and end the worker."""
        ...

    def submit(self, request: Request, listen: Callable[[Event], object] | None = None) -> Stream:
        """Ask for a reply; any thread may.

        Raises at once ``TooLarge`` where the request is more than this server can ever hold, ``Busy`` where as many
        wait as may, ``ContextMissing``, ``Stopped``, and another ``KeepKVError`` where it cannot be served as it is.
        """
        ...

    def estimate(self, tokens: int, compression: Compression | None = None) -> tuple[int, int, int]:
        """Bytes of a prompt of ``tokens``: compressed, of a plain cache, and at the peak of reading it."""
        ...

    def stats(self) -> Stats: ...
