"""A reply in the making: its prompt is read, then its tokens are decoded one by one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from keepkv.core.survival import survival
from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError
from keepkv.serve.batch.reading import Reader
from keepkv.serve.batch.sampling import Drawn, Likeliest, Sampler
from keepkv.serve.batch.text import Text
from keepkv.serve.request import Failed, Finished, Prompt, Request, Times, Token
from keepkv.serve.stream import Stream

LOG = logging.getLogger("keepkv.serve")
Ended = Callable[["Row", str], None]


class Row:
    """One request that is served.

    open: gives its cache: an empty one, or a copy of its context's. before: the tokens of its context, the last of
    which its text is decoded behind. ends: tokens that end a text. need: bytes that it may take at its peak; growth:
    that its reply may take, at most. ended: is told when it has, and how.
    """

    def __init__(
        self, request: Request, stream: Stream, *, open: Callable[[], Cache], before: Sequence[int], tokenizer: Any,
        reader: Reader, ends: frozenset[int], need: int, growth: int, ended: Ended,
    ) -> None:  # fmt: skip
        self.request, self.stream, self.need, self.growth = request, stream, need, growth
        self.cached, self.cache, self.token = len(before), None, None
        self._open, self._reader, self._ends, self._ended = open, reader, ends, ended
        self._sampler, self.said = Sampler(request.sampling), 0
        self._text = Text(tokenizer, [*before, *request.tokens], request.sampling.stop)
        self._arrived, self._at = time.perf_counter(), dict[str, float]()

    cache: Cache | None
    token: int | None  # the newest of the reply, which the cache has not read yet; None: it has ended, or not begun

    @property
    def cancelled(self) -> bool:
        return self.stream.cancelled

    @property
    def running(self) -> bool:
        """Whether another token is to be decoded."""
        return self.token is not None

    def held(self) -> Cache | None:
        return self.cache

    def turns(self) -> Iterator[None]:
        request, reader = self.request, self._reader
        self._at["admitted"] = time.perf_counter()
        self.cache = self._open()
        if request.context is not None:
            logits = yield from reader.question(self.cache, request.tokens)
        else:
            document = request.tokens[: request.split]
            logits = yield from reader.document(self.cache, document, more=request.split is not None)
            if request.split is not None:
                yield
                logits = yield from reader.question(self.cache, request.tokens[request.split :])
        self._at["read"] = time.perf_counter()
        if reader.listed is not None:
            self.stream.put(_prompt(reader.scores))
        if request.sampling.max_tokens == 0:
            self._finish("length")
        else:
            self.take(logits)

    def take(self, logits: Tensor, best: Likeliest | None = None) -> None:
        """Draw the next token from ``logits`` (V,), tell it, and end the reply where it ends. best: the likeliest, if
        it is known."""
        drawn = self._sampler.draw(logits, best)
        self._at.setdefault("first", time.perf_counter())
        self.said += 1
        sampling = self.request.sampling
        if drawn.id in self._ends and not sampling.ignore_eos:
            return self._finish("stop")
        self.token = drawn.id
        self.stream.put(Token(drawn.id, self._text.add(drawn.id), drawn.logprob, drawn.top))
        if self._text.stopped is not None:
            return self._finish("stop")
        return self._finish("length") if self.said == sampling.max_tokens else None

    def cancel(self) -> None:
        self._finish("cancelled")

    def fail(self, error: Exception) -> None:
        refused = isinstance(error, KeepKVError)
        if not refused:
            LOG.error("a request failed", exc_info=error)
        self._end("failed")
        said = " ".join(str(error).split())
        self.stream.put(Failed(said if refused else f"{type(error).__name__}: {said}"[:400], refused))

    def _finish(self, reason: Literal["stop", "length", "cancelled"]) -> None:
        text, at, now = self._text.end(), self._at, time.perf_counter()
        receipt = self._receipt() if self.request.receipt and self.cache is not None else None
        self._end(reason)
        times = Times(self._arrived, at.get("admitted", now), at.get("read"), at.get("first"), now)
        tokens = self.cached + len(self.request.tokens)
        self.stream.put(Finished(reason, text, tokens, self.cached, self.said, times, self._text.stopped, receipt))

    def _end(self, how: str) -> None:
        """Let go of the cache, and tell."""
        self.cache, self.token = None, None
        self._reader.scores = []
        self._ended(self, how)

    def _receipt(self) -> dict[str, Any]:
        assert self.cache is not None
        return receipt_of(self.cache, self.cached + len(self.request.tokens))


def receipt_of(cache: Cache, tokens: int) -> dict[str, Any]:
    """What ``cache`` reports, and of ``tokens`` which share of all heads holds each."""
    held = [cache.kept_positions(layer.info.index) for layer in cache.compressible if layer.progress.seen]
    alive = survival(held, tokens)[0] if held else torch.ones(tokens)
    return {**cache.report().to_dict(), "survival": [round(x, 4) for x in alive.tolist()]}


def _prompt(scores: Sequence[Drawn | None]) -> Prompt:
    return Prompt(
        tuple(None if x is None else x.logprob for x in scores), tuple(() if x is None else x.top for x in scores)
    )
