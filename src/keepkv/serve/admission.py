"""Who may come in: bytes that are reserved before anything is read, and given back as they are known better."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepkv.attention.attend import TILE_BYTES
from keepkv.engine.cache import Cache
from keepkv.engine.receipt import held_by
from keepkv.errors import TooLarge
from keepkv.plan.live import Live
from keepkv.plan.units import size
from keepkv.serve.batch.job import bytes_of
from keepkv.serve.batch.reading import Reader, late
from keepkv.store.base import allocated

SLACK = 64  # tokens that a store may have room for beyond those it holds
PIECES = 3  # of a prompt that are read to measure: stores grow from the second on
MOST, FEW = 1 << 24, 1 << 21  # numbers of a matrix that merging and scores hold at once: they work in tiles


@dataclass(frozen=True)
class Sizes:
    """Bytes of one row of a model, measured when the engine starts.

    plain, heads: of each layer that is compressed: bytes of a token in a plain cache, and KV heads. queries: query
    heads of a layer. stock: window and bytes of a token of each layer that transformers keeps. work, longer: what
    reading ``chunk`` tokens takes beside the caches, and what more it takes for each token that was read before.
    """

    plain: tuple[int, ...]
    heads: tuple[int, ...]
    queries: int
    stock: tuple[tuple[int, int], ...]
    work: int
    longer: float
    chunk: int

    @classmethod
    def measured(cls, model: Any, chunk: int, most: int | None) -> Sizes:
        """By reading a few pieces of a prompt, of ``chunk`` tokens unless that is more than ``most`` in sum."""
        tokens = chunk if most is None else max(1, min(chunk, most // PIECES))
        with torch.inference_mode(), Live() as live:
            cache, reader, peaks = late(Cache(model, "full")), Reader(model, tokens), []
            for _ in range(PIECES):
                live.restart()
                for _ in reader.question(cache, [0] * tokens):
                    pass
                peaks.append(max(0, live.peak - bytes_of(cache)))
        ours = cache.compressible
        read = PIECES * tokens
        stock = tuple(
            (window, allocated(held_by(layer)) // max(1, min(read, window)))
            for layer in cache.layers
            if layer not in ours and (window := getattr(layer, "sliding_window", 0) or read)
        )
        plain, heads = (tuple(x.store.slot_bytes().plain for x in ours), tuple(x.store.lengths.shape[1] for x in ours))
        queries = max((x.progress.query_heads for x in ours), default=1)
        # In one layer a longer past is copied as it grows, repeated for each query head, and masked.
        repeated = max((p + p * queries // h for p, h in zip(plain, heads, strict=True)), default=0)
        longer = max((peaks[-1] - peaks[-2]) / tokens, repeated + 5 * tokens)
        return cls(plain, heads, queries, stock, max(peaks), longer, tokens)

    def token(self, cache: Cache) -> int:
        """Of a token that ``cache`` holds as it was read, in all layers that are compressed."""
        beside = [layer.store.held.beside for layer in cache.compressible]
        return sum(p + h * b for p, h, b in zip(self.plain, self.heads, beside, strict=True))

    def windows(self, tokens: int) -> int:
        """Of the layers that transformers keeps, for a row of ``tokens``."""
        return sum(min(tokens, window) * each for window, each in self.stock)

    def whole(self, tokens: int) -> int:
        """Of a plain cache."""
        return sum(self.plain) * tokens + self.windows(tokens)

    def kept(self, cache: Cache, tokens: int) -> int:
        """Of ``cache`` when ``tokens`` were read into it and compressed."""
        settings, each = cache.settings, self.token(cache)
        method, budget = settings.method, settings.budget
        if method.when.prefill is None or method.name == "full":
            return each * tokens + self.windows(tokens)
        slots = float(budget.per_head(torch.tensor([tokens]), each, self.windows(tokens))[0])
        slots = max(slots, method.sinks + method.window) + sum(
            span.end - span.start for row in (settings.policy.lists if settings.policy else ()) for span in row
            if span.mode == "protect"
        )  # fmt: skip
        return int(each * min(tokens, slots)) + self.windows(tokens)

    def peak(self, cache: Cache, tokens: int) -> int:
        """While ``tokens`` are read into the empty ``cache`` and compressed, all that it holds included: a bound."""
        method, one = cache.settings.method, self.token(cache) * tokens // max(1, len(self.plain))
        held = self.token(cache) * tokens + self.windows(tokens)
        reading = held + self.work + int(self.longer * max(0, tokens - PIECES * self.chunk))
        if method.when.prefill is None or method.name == "full":
            return reading
        if method.score.observes:
            reading += self._matrix(self.chunk * self.queries * tokens)
        kept = self.kept(cache, tokens) if method.allocate.joint else 0
        pairs = max(self.heads, default=1) * tokens * tokens
        compressing = held + kept + 6 * one + self._matrix(pairs if method.reduce.merges else min(FEW, pairs))
        again = held if method.score.looks_again else 0
        return max(reading, compressing) + again

    def behind(self, cache: Cache, held: int, tokens: int) -> int:
        """While ``tokens`` are read behind what a ``cache`` of ``held`` bytes has, all included."""
        slots = held // max(1, self.token(cache))
        logits = 3 * min(TILE_BYTES, 4 * self.chunk * self.queries * (slots + tokens))
        return held + self.token(cache) * (tokens + SLACK) + self.work + logits

    @staticmethod
    def _matrix(numbers: int) -> int:
        """Of a matrix of so many numbers and what is made of it, a tile at a time."""
        return 2 * 4 * min(MOST, numbers)

    def reply(self, cache: Cache, tokens: int) -> int:
        """Of a reply, whose tokens are held whole until they are compressed."""
        return self.token(cache) * (tokens + SLACK)


class Ledger:
    """Bytes reserved of ``limit``, by who reserved them. For one thread. held: what is taken by others, now."""

    def __init__(self, limit: int, held: Callable[[], int]) -> None:
        self.limit, self.held, self._by = limit, held, dict[int, int]()

    @property
    def reserved(self) -> int:
        """In sum, what others hold included."""
        return sum(self._by.values()) + self.held()

    def reserve(self, who: object, size: int) -> None:
        """Set what ``who`` has reserved; 0 gives it back."""
        self._by.pop(id(who), None)
        if size:
            self._by[id(who)] = size

    def fits(self, size: int) -> bool:
        """Whether so many bytes more are left."""
        return self.reserved + size <= self.limit


def check_ever(need: int, limit: int, what: str) -> None:
    """Raise ``TooLarge`` where ``what`` needs more bytes than there are for all caches together."""
    if need > limit:
        raise TooLarge(
            f"{what} needs {size(need)} at its peak, and this server has {size(limit)} for all caches: give a shorter "
            "text, ask for fewer tokens, or a smaller budget",
            need,
            limit,
        )


def free_memory(devices: Iterable[torch.device]) -> int:
    """Bytes that are free now on the first GPU of ``devices``, or in this machine."""
    for device in devices:
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0])
    return _of_machine()


def _of_machine() -> int:
    """What Linux says is available to this process, or the half of what a machine has where nobody says."""
    try:
        found = int(next(x for x in _lines("/proc/meminfo") if x.startswith("MemAvailable")).split()[1]) << 10
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:  # a container may have less than its machine
        limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}")[0] for name in ("max", "current"))
        return min(found, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="ascii").splitlines()
