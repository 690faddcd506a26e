"""/v1/contexts: documents that are read and compressed once, and /v1/estimate: what that would take."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from keepkv.serve.contexts.info import ContextInfo
from keepkv.serve.http.errors import Refused
from keepkv.serve.http.front import Front
from keepkv.serve.http.shapes.asked import ContextAsked, EstimateAsked, KeepKV
from keepkv.serve.http.shapes.compression import compression_of, spans_of


def routes(front: Front) -> APIRouter:
    """The endpoints of ``front``."""
    router = APIRouter()
    contexts = front.engine.contexts

    @router.post("/v1/contexts", status_code=201)
    async def create(asked: ContextAsked) -> dict[str, Any]:
        made = await run_in_threadpool(_create, front, asked)
        return told(await asyncio.wrap_future(made), receipt=asked.keepkv.receipt)

    @router.get("/v1/contexts")
    def every() -> dict[str, Any]:
        return {"object": "list", "data": [told(one) for one in contexts.list()]}

    @router.get("/v1/contexts/{name}")
    def one(name: str) -> dict[str, Any]:
        return told(contexts.get(name), receipt=True)

    @router.get("/v1/contexts/{name}/tokens")
    def tokens(name: str) -> dict[str, Any]:
        info = contexts.get(name)
        pieces = front.prompts.again(info.text).pieces
        return {
            "object": "context.tokens",
            "name": name,
            "tokens": pieces,
            "kept": [round(x, 3) for x in info.survival],
        }

    @router.delete("/v1/contexts/{name}")
    def delete(name: str) -> dict[str, Any]:
        contexts.delete(name)
        return {"object": "context.deleted", "name": name, "deleted": True}

    @router.post("/v1/estimate")
    def estimate(asked: EstimateAsked) -> dict[str, Any]:
        _only(asked.keepkv)
        count = asked.tokens or len(front.prompts.text(asked.text or "").ids)
        compressed, plain, peak = front.engine.estimate(max(1, count), compression_of(asked.keepkv))
        now = front.engine.stats()
        return {
            "object": "estimate", "tokens": count, "bytes": compressed, "full_bytes": plain, "peak_bytes": peak,
            "free_bytes": max(0, now.limit - now.reserved), "limit_bytes": now.limit,
        }  # fmt: skip

    return router


def _create(front: Front, asked: ContextAsked) -> Future[ContextInfo]:
    """Ask the engine for a context."""
    _only(asked.keepkv)
    messages = [one.plain for one in asked.messages or ()]
    options, tokenizer = asked.chat_template_kwargs, front.prompts.tokenizer
    prompt, remembered = front.prompts.context(asked.text if asked.text is not None else messages, options)
    prompt = replace(prompt, cut=len(prompt.text))
    special = not tokenizer.chat_template
    spans = spans_of(asked.keepkv.spans, tokenizer, prompt, messages=messages, template=options, special=special)
    name = asked.name or f"context-{uuid.uuid4().hex[:12]}"
    compression = compression_of(asked.keepkv, spans)
    return front.engine.contexts.create(name, prompt.ids, remembered, compression, replace=asked.replace)


def _only(told: KeepKV) -> None:
    """Refuse what is said of a question: there is none."""
    for field in ("context", "document", "compress_question"):
        if getattr(told, field):
            raise Refused(400, f"keepkv.{field} is of a question, and a context has none", param=f"keepkv.{field}")


def told(info: ContextInfo, receipt: bool = False) -> dict[str, Any]:
    """A context as clients see it."""
    shown = {
        "object": "context", "name": info.name, "created": int(info.created), "tokens": info.tokens,
        "bytes": info.bytes, "full_bytes": info.full_bytes, "method": info.method, "budget": info.budget,
        "in_memory": info.in_memory, "problem": info.problem,
    }  # fmt: skip
    return {**shown, "keepkv": {"receipt": dict(info.receipt)}} if receipt else shown
