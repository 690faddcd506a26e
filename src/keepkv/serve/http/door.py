"""What every request passes before it is looked at: the key, the kind of body, and how large that may be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from secrets import compare_digest
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keepkv.serve.http.errors import body_of

OPEN = frozenset({"/", "/health"})  # paths that ask for no key: the page asks its reader for one
PATIENCE = 30.0  # seconds for the next piece of a body
# What was refused is still read a while, or its sender would not hear why: until it pauses, for so long, so many bytes.
PAUSE, LINGER, LEFT_OVER = 2.0, 30.0, 256 << 20


class Door:
    """ASGI middleware. A body is read whole before the application sees it, and no further than ``max_body`` bytes.

    api_key: that requests must bear; None: none. stopping: whether the server is about to stop, and takes nothing new.
    """

    def __init__(self, app: ASGIApp, max_body: int, api_key: str | None, stopping: Callable[[], bool]) -> None:
        self.app, self.max_body, self.stopping = app, max_body, stopping
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (refusal := self._refusal(scope)) is not None:
            await _refuse(receive, send, *refusal)
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(receive)
        except asyncio.TimeoutError:
            await _refuse(receive, send, 408, f"no byte of the body came for {PATIENCE:g} s")
            return
        if body is None:
            return  # the client went away
        if len(body) > self.max_body:
            await _refuse(receive, send, 413, f"the body has more than {self.max_body:,} bytes, the most taken here")
            return
        await self.app(scope, _again(body, receive), send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("authorization", "").encode("utf-8", "replace")
        if self.key is not None and path not in OPEN and not compare_digest(given, self.key):
            return 401, "this server asks for its key, as 'Authorization: Bearer KEY'"
        if scope["method"] != "POST":
            return None
        if self.stopping():
            return 503, "the server is stopping and takes no new requests"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a foreign web page cannot send without being allowed to
            return 415, f"content-type {kind[:80]!r}: send JSON, as application/json"
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self.max_body):
            return 413, f"the body has {length[:40]} bytes, and at most {self.max_body:,} are taken here"
        return None

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or so much of it that it is too large; None where the client went away."""
        parts, size, more = [], 0, True
        while more and size <= self.max_body:
            message = await asyncio.wait_for(receive(), PATIENCE)
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
        return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the whole ``body``, then what comes."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


async def _refuse(receive: Receive, send: Send, status: int, message: str) -> None:
    """Answer at once, and read on a little while the sender may still be sending: a connection that is closed on
    unread bytes is reset, and the answer lost."""
    text = json.dumps(body_of(status, message)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(text)), "connection": "close"}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    pairs: Any = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": text, "more_body": True})
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_drain(receive), LINGER)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    size, more = 0, True
    while more and size < LEFT_OVER:
        message = await asyncio.wait_for(receive(), PAUSE)
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)
