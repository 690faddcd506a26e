"""Server-sent events: one JSON object each, an end that clients know, and errors where a status was sent already."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from keepkv.errors import KeepKVError
from keepkv.serve.http.errors import body_of_error
from keepkv.serve.http.shapes.replies import Gone


def streamed(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """A response that sends ``chunks`` as they come."""
    return StreamingResponse(_lines(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _lines(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield _line(chunk)
    except Gone:
        return
    except KeepKVError as error:
        yield _line(body_of_error(error))
    yield "data: [DONE]\n\n"


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
