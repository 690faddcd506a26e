"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from keepkv.serve.http.errors import Refused
from keepkv.serve.http.front import Front
from keepkv.serve.http.shapes.asked import Chat
from keepkv.serve.http.shapes.compression import compression_of, spans_of
from keepkv.serve.http.shapes.logprobs import of_chat
from keepkv.serve.http.shapes.replies import Gone, Replies, Reply, receipts, usage, whole
from keepkv.serve.http.shapes.sse import streamed
from keepkv.serve.request import Finished, Token
from keepkv.serve.request import Request as Wanted

BARE = (
    "nothing stands before the question, which is the last message of a user and is not compressed. Give the document "
    "in a message before it, or as a context, or ask for compress_question"
)


def routes(front: Front) -> APIRouter:
    """The endpoint of ``front``."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        front.check_model(asked.model)
        front.check_count(asked.n or 1)
        wanted = await run_in_threadpool(wanted_of, front, asked)  # long texts take the tokenizer a while
        answer = _Answer(front, asked, await Replies(front.engine, wanted, request.receive).begin())
        if asked.stream:
            return streamed(answer.chunks())
        try:
            return JSONResponse(await answer.whole(len(wanted)))
        except Gone:
            return Response(status_code=499)

    return router


def wanted_of(front: Front, asked: Chat) -> list[Wanted]:
    """What the engine is asked for, a request for each reply. Raises ``KeepKVError`` where it cannot be served."""
    told, messages = asked.keepkv, [message.plain for message in asked.messages]
    if told.document is not None:
        raise Refused(
            400, "keepkv.document is for /v1/completions: in a chat the last message of a user is the question"
        )
    read = 0
    if told.context is not None:
        if told.says or told.compress_question:
            raise Refused(
                400,
                f"the context {told.context!r} was compressed when it was made, and a question about it is not: ask "
                "for nothing else, or give the document in the request",
            )
        info = front.engine.contexts.get(told.context)
        prompt = front.prompts.behind(info.text, messages, asked.chat_template_kwargs)
        compression, split, read = None, None, info.tokens
    else:
        prompt = front.prompts.chat(messages, asked.chat_template_kwargs)
        split = None if told.compress_question else 0 if _bare(messages) else prompt.split
        if split == 0 and told.says:
            raise Refused(400, BARE)
        prompt = replace(prompt, cut=len(prompt.text)) if split is None else prompt
        template = asked.chat_template_kwargs
        spans = spans_of(told.spans, front.prompts.tokenizer, prompt, messages=messages, template=template)
        compression, split = front.placed(compression_of(told, spans), split, len(prompt.ids))
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    most = front.room(read + len(prompt.ids)) if most is None else most
    listed = (asked.top_logprobs or 0) if asked.logprobs else None
    return [
        Wanted(
            prompt.ids, front.sampling(asked, most, i, logprobs=listed), compression, told.context, split, told.receipt
        )
        for i in range(asked.n or 1)
    ]


def _bare(messages: Sequence[dict[str, str]]) -> bool:
    """Whether no message stands before the last one of a user."""
    asked = [i for i, one in enumerate(messages) if one["role"] == "user"]
    return asked == [0]


@dataclass
class _Answer:
    """Of one request."""

    front: Front
    asked: Chat
    replies: Replies

    def __post_init__(self) -> None:
        self.name, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.front.config.served}

    async def whole(self, count: int) -> dict[str, Any]:
        """The response, when all has been said."""
        found = await whole(self.replies, count)
        ends = [reply.finished for reply in found]
        self.front.ended(ends)
        choices = [self._choice(i, reply) for i, reply in enumerate(found)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(ends, count), **receipts(ends)}

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": of_chat(reply.tokens, self.front.pieces) if self.asked.logprobs else None,
            "finish_reason": reply.finished.reason,
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The response in pieces, as they are said."""
        ends: dict[int, Finished] = {}
        options = self.asked.stream_options
        counted = bool(options and options.include_usage)
        more = {"usage": None} if counted else {}
        for index in range(self.asked.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": ""}) | more
        async for index, event in self.replies:
            if isinstance(event, Finished):
                ends[index] = event
                if event.text:
                    yield self._chunk(index, {"content": event.text}) | more
                yield self._chunk(index, {}, reason=event.reason) | more | receipts([event])
            elif isinstance(event, Token) and (event.text or self.asked.logprobs):
                yield self._chunk(index, {"content": event.text}, [event] if self.asked.logprobs else None) | more
        self.front.ended(list(ends.values()))
        if counted:
            last = {"choices": [], "usage": usage(list(ends.values()), len(ends))}
            yield self._head("chat.completion.chunk") | last

    def _chunk(
        self, index: int, delta: dict[str, str], tokens: Sequence[Token] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        told = of_chat(tokens, self.front.pieces) if tokens is not None else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}
