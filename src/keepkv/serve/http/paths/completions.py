"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from keepkv.serve.http.errors import Refused
from keepkv.serve.http.front import Front
from keepkv.serve.http.shapes.asked import Completion, KeepKV
from keepkv.serve.http.shapes.compression import compression_of, spans_of
from keepkv.serve.http.shapes.logprobs import joined, of_prompt, of_tokens
from keepkv.serve.http.shapes.prompts import Prompt
from keepkv.serve.http.shapes.replies import Gone, Replies, Reply, receipts, usage, whole
from keepkv.serve.http.shapes.sse import streamed
from keepkv.serve.request import Finished, Token
from keepkv.serve.request import Prompt as Scored
from keepkv.serve.request import Request as Wanted

USUAL = 16  # tokens of a reply where the client does not say, as OpenAI has it
WHERE = (
    "the tokens of a prompt are scored, and keepkv must know which of them are the document: those behind are told as "
    "the compressed cache predicts them. Give keepkv.document, or keepkv.method 'full' for the full cache"
)


def routes(front: Front) -> APIRouter:
    """The endpoint of ``front``."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        front.check_model(asked.model)
        front.check_count(len(asked.prompts) * (asked.n or 1))
        prompts, wanted = await run_in_threadpool(_all, front, asked)
        answer = _Answer(front, asked, prompts, await Replies(front.engine, wanted, request.receive).begin())
        if asked.stream:
            return streamed(answer.chunks())
        try:
            return JSONResponse(await answer.whole(len(wanted)))
        except Gone:
            return Response(status_code=499)

    return router


def _all(front: Front, asked: Completion) -> tuple[list[Prompt], list[Wanted]]:
    prompts = [_prompt(front, one, asked.keepkv) for one in asked.prompts]
    return prompts, [one for prompt in prompts for one in wanted_of(front, asked, prompt)]


def _prompt(front: Front, given: str | list[int], told: KeepKV) -> Prompt:
    length = len(given)
    if told.document is not None and told.document > length:
        unit = "characters" if isinstance(given, str) else "tokens"
        raise Refused(400, f"keepkv.document={told.document}: the prompt has {length} {unit}", param="keepkv.document")
    if isinstance(given, str):
        return front.prompts.text(given, told.document, special=told.context is None)
    size = len(front.prompts.tokenizer)
    if wrong := [token for token in given if token >= size]:
        raise Refused(400, f"token {wrong[0]}: the model knows those from 0 to {size - 1}", param="prompt")
    return Prompt.of_ids(given, front.pieces.text(given), told.document)


def wanted_of(front: Front, asked: Completion, prompt: Prompt) -> list[Wanted]:
    """What the engine is asked for one prompt, a request for each reply. Raises ``KeepKVError`` where it cannot be
    served."""
    told, scored = asked.keepkv, bool(asked.echo) and asked.logprobs is not None
    if not prompt.ids:
        raise Refused(400, "the prompt is empty: give a text, or token ids", param="prompt")
    if told.context is not None:
        if told.says or told.compress_question or told.document is not None:
            raise Refused(400, f"the context {told.context!r} was compressed when it was made: ask for nothing else")
        front.engine.contexts.get(told.context)  # before anything is asked for
    spans = spans_of(told.spans, front.prompts.tokenizer, prompt, special=True)
    compression = compression_of(told, spans)
    split = None if told.document is None or told.compress_question else prompt.split
    if split == 0 and told.says:
        raise Refused(400, f"keepkv.document={told.document} is less than a token: nothing is there to compress")
    compression, split = front.placed(compression, split, len(prompt.ids))
    if scored and split is None and told.context is None and front.compresses(compression):
        raise Refused(400, WHERE, param="keepkv.document")
    most = USUAL if asked.max_tokens is None else asked.max_tokens
    listed = {"logprobs": asked.logprobs, "prompt_logprobs": asked.logprobs if scored else None}
    if scored and most == 1:  # who scores a prompt counts on one token behind it, an end of text too
        asked = asked.model_copy(update={"ignore_eos": True})
    return [
        Wanted(
            prompt.ids, front.sampling(asked, most, i, **listed), compression, told.context, split, told.receipt
        )
        for i in range(asked.n or 1)
    ]  # fmt: skip


@dataclass
class _Answer:
    """Of one request."""

    front: Front
    asked: Completion
    prompts: list[Prompt]
    replies: Replies

    def __post_init__(self) -> None:
        self.name, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    def _head(self) -> dict[str, Any]:
        model = self.front.config.served
        return {"id": self.name, "object": "text_completion", "created": self.created, "model": model}

    def _echo(self, index: int) -> str:
        """What stands before reply ``index``."""
        return self.prompts[index // (self.asked.n or 1)].text if self.asked.echo else ""

    async def whole(self, count: int) -> dict[str, Any]:
        """The response, when all has been said."""
        found = await whole(self.replies, count)
        ends = [reply.finished for reply in found]
        self.front.ended(ends)
        choices = [self._choice(i, reply) for i, reply in enumerate(found)]
        counted = usage(ends, self.asked.n or 1)
        return {**self._head(), "choices": choices, "usage": counted, **receipts(ends)}

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        before, told = self._echo(index), None
        if self.asked.logprobs is not None:
            told = of_tokens(reply.tokens, self.front.pieces, len(before))
            if reply.prompt is not None:
                told = joined(self._scored(index, reply.prompt), told)
        return self._shape(index, before + reply.text, told, reply.finished.reason)

    def _scored(self, index: int, scored: Scored) -> dict[str, Any]:
        return of_prompt(scored, self.prompts[index // (self.asked.n or 1)].ids, self.front.pieces)

    def _shape(self, index: int, text: str, told: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The response in pieces, as they are said."""
        ends: dict[int, Finished] = {}
        options, listed = self.asked.stream_options, self.asked.logprobs is not None
        counted = bool(options and options.include_usage)
        more = {"usage": None} if counted else {}
        said: dict[int, int] = {}
        for index in range(len(self.prompts) * (self.asked.n or 1)):
            said[index] = len(self._echo(index))
            if said[index] and not listed:
                yield {**self._head(), "choices": [self._shape(index, self._echo(index), None, None)]} | more
        async for index, event in self.replies:
            told, text, reason = None, "", None
            if isinstance(event, Finished):
                ends[index], text, reason = event, event.text, event.reason
            elif isinstance(event, Token):
                text = event.text
                told = of_tokens([event], self.front.pieces, said[index]) if listed else None
            elif isinstance(event, Scored):
                text, told = self._echo(index), self._scored(index, event)
            said[index] += len(text) if isinstance(event, (Token, Finished)) else 0
            if text or told or reason:
                beside = receipts([event]) if isinstance(event, Finished) else {}
                yield {**self._head(), "choices": [self._shape(index, text, told, reason)]} | more | beside
        self.front.ended(list(ends.values()))
        if counted:
            ordered = [ends[index] for index in sorted(ends)]
            yield {**self._head(), "choices": [], "usage": usage(ordered, self.asked.n or 1)}
