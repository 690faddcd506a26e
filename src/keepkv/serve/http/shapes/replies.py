"""Replies as they come from the engine: events of several requests in one line, and what they add up to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from keepkv.errors import Stopped
from keepkv.serve.engine import Engine
from keepkv.serve.http.errors import Broken
from keepkv.serve.request import Event, Failed, Finished, Prompt, Request, Token
from keepkv.serve.stream import Stream

LOG = logging.getLogger("uvicorn.error")  # where the rest of the server says what went wrong


class Gone(Exception):
    """The client went away: nobody hears what is answered."""


class Replies:
    """Replies to ``requests``, which the engine is asked for by ``begin``.

    receive: of ASGI; it tells when the client goes away, and then every row is freed.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], receive: Receive) -> None:
        self._engine, self._requests, self._receive = engine, requests, receive
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()
        self._streams: list[Stream] = []

    async def begin(self) -> Replies:
        """Ask for them; what the engine refuses is raised, and nothing is asked for then."""
        try:
            await run_in_threadpool(self._submit)  # the engine may have to work out what they take
        except BaseException:
            self.cancel()
            raise
        return self

    def _submit(self) -> None:
        for index, request in enumerate(self._requests):
            self._streams.append(self._engine.submit(request, partial(self._hear, index)))

    def _hear(self, index: int, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    def cancel(self) -> None:
        """Free every row that still runs."""
        for stream in self._streams:
            stream.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Index of the request, and event. Raises ``Broken`` where one fails, ``Stopped`` where the server ends it, and
        ``Gone``; whatever ends the iteration frees the rows that are left."""
        watch = asyncio.create_task(self._watch())
        left = len(self._streams)
        try:
            while left:
                index, event = await self._queue.get()
                if event is None:
                    raise Gone
                if isinstance(event, Failed):
                    if not event.refused:
                        LOG.error("a reply failed: %s", event.error)
                    raise Broken(event)
                if isinstance(event, Finished):
                    left -= 1
                    if event.reason == "cancelled":
                        raise Stopped("the server stopped before the reply ended")
                yield index, event
        finally:
            watch.cancel()
            self.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.cancel()
        self._queue.put_nowait((-1, None))


@dataclass
class Reply:
    """One whole reply: its tokens, what scoring its prompt told, and how it ended."""

    tokens: list[Token] = field(default_factory=list)
    prompt: Prompt | None = None
    end: Finished | None = None

    def take(self, event: Event) -> None:
        """Enter an event."""
        if isinstance(event, Token):
            self.tokens.append(event)
        elif isinstance(event, Prompt):
            self.prompt = event
        elif isinstance(event, Finished):
            self.end = event

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(token.text for token in self.tokens) + self.finished.text

    @property
    def finished(self) -> Finished:
        """How it ended."""
        assert self.end is not None, "the engine ended a reply without saying so"
        return self.end


async def whole(replies: Replies, count: int) -> list[Reply]:
    """All of them, when they have ended."""
    found = [Reply() for _ in range(count)]
    async for index, event in replies:
        found[index].take(event)
    return found


def usage(ends: Sequence[Finished], choices: int) -> dict[str, Any]:
    """Numbers of tokens. choices: replies to each prompt, which is counted once."""
    prompts = ends[::choices]
    read, said = sum(end.prompt_tokens for end in prompts), sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": read,
        "completion_tokens": said,
        "total_tokens": read + said,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts)},
    }


def receipts(ends: Sequence[Finished]) -> dict[str, Any]:
    """What goes beside the choices of a response: receipts, one where there is one reply; empty where none is."""
    found = [dict(end.receipt) for end in ends if end.receipt is not None]
    if not found:
        return {}
    return {"keepkv": {"receipt": found[0]} if len(found) == 1 else {"receipts": found}}
