"""An engine that needs no model: it says the end of its prompt again, and fails where a test wants it to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from keepkv.errors import ContextExists, ContextMissing, KeepKVError
from keepkv.serve.contexts.info import ContextInfo
from keepkv.serve.request import Compression, Event, Failed, Finished, Prompt, Request, Times, Token
from keepkv.serve.stats import Stats
from keepkv.serve.stream import Stream


def receipt(tokens: int, budget: float | int | str) -> dict[str, Any]:
    """As ``keepkv.Receipt.to_dict`` has it, of two layers of two heads."""
    half = tokens // 2
    return {
        "method": "snapkv", "options": {"window": 16}, "budget": budget, "compressed": budget != 1.0, "seen": [tokens],
        "kept": {0: [[half, half // 2]], 1: [[half // 3, tokens]]}, "bytes": 64 * tokens, "full_bytes": 128 * tokens,
        "merged": 3, "dropped": 2 * tokens, "mass_dropped": 0.125, "gone": 0.25, "largest_vote": 2.0, "compressions": 2,
        "seconds": 0.0123, "ratio": 0.5, "held": half,
    }  # fmt: skip


class FakeContexts:
    """In a dict."""

    def __init__(self) -> None:
        self.held: dict[str, ContextInfo] = {}
        self.read: dict[str, tuple[int, ...]] = {}

    def create(
        self, name: str, tokens: Sequence[int], text: str = "", compression: Compression | None = None, *,
        replace: bool = False,
    ) -> Future[ContextInfo]:  # fmt: skip
        if name in self.held and not replace:
            raise ContextExists(f"context {name!r} is there already")
        told = compression or Compression()
        n = len(tokens)
        self.read[name] = tuple(tokens)
        self.held[name] = ContextInfo(
            name, n, 64 * n, 128 * n, told.method or "full", told.budget or 1.0, time.time(), True,
            receipt(n, told.budget or 1.0), tuple(i * 37 % 100 // 25 / 4 for i in range(n)), text,
        )  # fmt: skip
        made: Future[ContextInfo] = Future()
        made.set_result(self.held[name])
        return made

    def get(self, name: str) -> ContextInfo:
        if name not in self.held:
            raise ContextMissing(f"no context {name!r}")
        return self.held[name]

    def list(self) -> list[ContextInfo]:
        return [self.held[name] for name in sorted(self.held)]

    def delete(self, name: str) -> None:
        self.get(name)
        del self.held[name]


class FakeEngine:
    """delay: seconds between two tokens. refuse: raised by ``submit``. fail: told instead of the third token."""

    def __init__(self, tokenizer: Any, delay: float = 0.0) -> None:
        self.tokenizer, self.delay = tokenizer, delay
        self.contexts = FakeContexts()
        self.refuse: KeepKVError | None = None
        self.fail: Failed | None = None
        self.seen: list[Request] = []
        self.streams: list[Stream] = []
        self.running = 0
        self.stopped = False

    limit_tokens = 4096

    def start(self) -> None:
        return None

    def methods(self) -> tuple[str, ...]:
        return ("many-questions", "snapkv")

    def stop(self, grace: float = 10.0) -> None:
        self.stopped = True
        for stream in self.streams:
            stream.cancel()

    def submit(self, request: Request, listen: Callable[[Event], object] | None = None) -> Stream:
        if self.refuse is not None:
            raise self.refuse
        stream = Stream(listen)
        self.seen.append(request)
        self.streams.append(stream)
        self.running += 1
        threading.Thread(target=self._run, args=(request, stream), daemon=True).start()
        return stream

    def estimate(self, tokens: int, compression: Compression | None = None) -> tuple[int, int, int]:
        return 64 * tokens, 128 * tokens, 256 * tokens

    def stats(self) -> Stats:
        state = "stopped" if self.stopped else "running"
        return Stats(
            state=state, rows=self.running, reading=0, waiting=0, widths=(1,), threads=None, bytes=10, reserved=20,
            limit=1 << 30,
            contexts=1, contexts_in_memory=1, context_bytes=5, context_disk=5, finished={"stop": 1},
            refused={"Busy": 2}, prompt_tokens=1, cached_tokens=2, completion_tokens=3, steps=4, decoded=5,
            seconds={"idle": 1.5},
        )  # fmt: skip

    def _run(self, request: Request, stream: Stream) -> None:
        start = time.perf_counter()
        asked, reply = request.sampling, request.tokens[::-1]
        cached = self.contexts.get(request.context).tokens if request.context else 0
        if asked.prompt_logprobs is not None:
            n = len(request.tokens)
            stream.put(Prompt((None, *(-0.5 for _ in range(n - 1))), tuple(((7, -0.25),) for _ in range(n))))
        reason, said = "length", 0
        for number in range(asked.max_tokens):
            if self.fail is not None and number == 2:
                self.running -= 1
                stream.put(self.fail)
                return
            time.sleep(self.delay)
            if stream.cancelled:
                reason = "cancelled"
                break
            token = reply[number % len(reply)]
            top = ((token, -0.125), (9, -3.0))[: asked.logprobs] if asked.logprobs else ()
            logprob = None if asked.logprobs is None else -0.125
            stream.put(Token(token, self.tokenizer.decode([token]), logprob, top))
            said += 1
        end = time.perf_counter()
        told = receipt(len(request.tokens), 0.5) if request.receipt else None
        times = Times(start, start, start, end if said else None, end)
        self.running -= 1
        read = cached + len(request.tokens)
        finished = Finished(reason, "", read, cached, said, times, None, told)  # type: ignore[arg-type]
        stream.put(replace(finished))
