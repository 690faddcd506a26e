"""The model in this process: waiting requests are read and answered together, batch by batch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keepkv.characterize.drive.base import Timeline
from keepkv.characterize.grid.levels import FULL, Technique
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes.again import look_again
from keepkv.measure.content import content, held
from keepkv.measure.environment import MadeWith
from keepkv.measure.meters import Peak, now
from keepkv.measure.rows import plain
from keepkv.tasks.asking import Encoded, greedy, pad, read

Waiting = tuple[Timeline, asyncio.Future[None]]


class InProcess:
    """``model`` with the cache that ``technique`` asks for. rows: requests in a batch, at most; a batch takes those
    that wait when the one before it has ended, so the time that a request waits is told."""

    def __init__(
        self, model: Any, tokenizer: Any, technique: Technique, rows: int, seed: int = 0, name: str = ""
    ) -> None:
        self.model, self.tokenizer, self.technique = model, tokenizer, technique
        self.rows, self.seed, self.name = rows, seed, name
        self.end: int | None = getattr(tokenizer, "eos_token_id", None)
        self.waiting: deque[Waiting] = deque()
        self.some, self.over = threading.Semaphore(0), threading.Event()
        if technique.method == FULL:
            model.set_attn_implementation("sdpa")
        self.peak = Peak(model.device)
        self.peak.__enter__()
        self.thread = threading.Thread(target=self._work, name="keepkv-characterize", daemon=True)
        self.thread.start()

    async def send(self, line: Timeline) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((line, done))
        self.some.release()
        await done

    def peak_bytes(self) -> int | None:
        self.peak.__exit__()
        return self.peak.bytes

    def made_with(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(MadeWith.of(self.model, self.name or None))
        return found

    async def close(self) -> None:
        self.over.set()
        self.some.release()
        await asyncio.to_thread(self.thread.join)

    def _work(self) -> None:
        while True:
            self.some.acquire()
            if self.over.is_set():
                return
            taken = [self.waiting.popleft()]
            while self.waiting and len(taken) < self.rows and self.some.acquire(blocking=False):
                taken.append(self.waiting.popleft())
            try:
                self._answer([line for line, _ in taken])
            except Exception as error:  # of whatever kind: these requests failed, the next ones may not
                if _out_of_memory(error):
                    self._tell(taken, f"{type(error).__name__}: out of memory")
                else:
                    self._tell(taken, f"{type(error).__name__}: {' '.join(str(error).split())}")
                continue
            self._tell(taken, None)

    @staticmethod
    def _tell(taken: Sequence[Waiting], error: str | None) -> None:
        for line, done in taken:
            line.error = error
            loop = done.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, done)

    @torch.no_grad()  # as generate has it: quantised weights that are unpacked in a forward are no tensors of inference
    def _answer(self, lines: Sequence[Timeline]) -> None:
        admit = time.perf_counter()
        items = [line.call.encoded(self.tokenizer) for line in lines]
        for line, item in zip(lines, items, strict=True):
            line.admit, line.tokens = admit, []
            line.n_in = len(item.context) + len(item.asked[0].prompt)
        cache, mask = self._read(lines, items)
        ids, new = pad([item.asked[0].prompt for item in items], self.model.device)
        live = set(range(len(lines)))
        for token in greedy(self.model, cache, torch.cat((mask, new), dim=1), ids):
            if self.over.is_set():
                return
            said = token.tolist()  # waits for a GPU
            at = time.perf_counter()
            for i in sorted(live):
                line = lines[i]
                line.times.append(at)
                if said[i] != self.end and line.tokens is not None:
                    line.tokens.append(said[i])
                if said[i] == self.end or len(line.times) >= line.call.limit:
                    self._finish(line, at)
                    live.remove(i)
            if not live:
                return

    def _finish(self, line: Timeline, at: float) -> None:
        line.end, line.n_out, line.cached = at, len(line.times), 0
        line.text = self.tokenizer.decode(line.tokens, skip_special_tokens=True)

    def _read(self, lines: Sequence[Timeline], items: Sequence[Encoded]) -> tuple[Any, Tensor]:
        """A cache that holds the contexts, compressed where the technique says so, and their mask (B,T)."""
        contexts = [item.context for item in items]
        if self.technique.method == FULL:
            from transformers import DynamicCache

            whole = DynamicCache(config=self.model.config.get_text_config(decoder=True))
            mask = read(self.model, whole, contexts)
            size = sum(held(vars(layer)) for layer in whole.layers)
            self._note(lines, items, size, size, size, 0.0)
            return whole, mask
        one = self.technique
        cache: Any = Cache(self.model, one.method, one.budget or 1.0, seed=self.seed, **one.made_options())
        cache.shared.clock = lambda: now(self.model.device)  # waits for a GPU to finish
        if cache.settings.method.score.looks_again:
            cache = cache.copy(when=When("deferred"))
        mask = read(self.model, cache, contexts)
        look_again(self.model, cache, *pad(contexts, self.model.device))
        cache.compress()
        receipt = cache.report()
        self._note(lines, items, receipt.bytes, sum(content(cache)), receipt.full_bytes, receipt.seconds)
        if not cache.settings.method.when.recurs:
            cache.compressing = False
        return cache, mask

    @staticmethod
    def _note(
        lines: Sequence[Timeline], items: Sequence[Encoded], size: float, logical: float, full: float, seconds: float
    ) -> None:
        """Bytes of a batch are its rows' in equal parts, as padding is."""
        n = len(lines)
        for line, item in zip(lines, items, strict=True):
            line.kv = {
                "kv_bytes": size / n, "kv_logical": logical / n, "kv_full": full / n,
                "kv_tokens": float(len(item.context)), "compress_s": seconds,
            }  # fmt: skip


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
