"""Any server that speaks OpenAI's protocol, over HTTP, with the exact time of each piece of a reply."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from keepkv.characterize.drive.base import Timeline
from keepkv.characterize.grid.levels import FULL, Technique
from keepkv.errors import KeepKVError
from keepkv.measure.environment import versions

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
LONG = 300  # characters of an error that are kept


class Endpoint:
    """A client of the server at ``address``. technique: is asked of our own server with each request, and a receipt
    with it; None: somebody else's, which is sent nothing of ours. tokenizer: counts tokens where the server does not.
    headers: such as a key. peak: bytes of the process that serves, where it is known. transport: of httpx, for tests.
    """

    def __init__(
        self, address: str, tokenizer: Any, *, api: str = "completions", technique: Technique | None = None,
        headers: Mapping[str, str] | None = None, peak: Callable[[], int | None] = lambda: None, transport: Any = None,
    ) -> None:  # fmt: skip
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise KeepKVError("servers are driven with httpx: pip install 'keepkv[characterize]'") from error
        self.tokenizer, self.api, self.technique, self.peak = tokenizer, api, technique, peak
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # Only connecting has a limit of its own: a point has one, and a queue may be long.
        self.client = httpx.AsyncClient(
            base_url=address.rstrip("/").removesuffix("/v1"), limits=unlimited, headers=dict(headers or {}),
            timeout=httpx.Timeout(None, connect=60.0), transport=transport, trust_env=False,
        )  # fmt: skip
        self.failures: tuple[type[Exception], ...] = (httpx.HTTPError, json.JSONDecodeError, KeyError, TypeError)
        self.model: str | None = None

    async def send(self, line: Timeline) -> None:
        try:
            if self.model is None:
                self.model = await self.name()
            async with self.client.stream("POST", PATHS[self.api], json=self.body(line)) as reply:
                if reply.status_code != 200:
                    text = (await reply.aread()).decode("utf-8", "replace")
                    line.error = f"{reply.status_code}: {' '.join(text.split())[:LONG]}"
                    return
                async for chunk in reply.aiter_lines():
                    if chunk.startswith("data:") and (data := chunk[5:].strip()) != "[DONE]":
                        self._take(line, json.loads(data))
        except self.failures as error:
            line.error = f"{type(error).__name__}: {error}"
        if line.error is None:
            self._finish(line)

    async def name(self) -> str:
        """What the server calls its first model."""
        reply = await self.client.get("/v1/models")
        reply.raise_for_status()
        name: str = reply.json()["data"][0]["id"]
        return name

    def body(self, line: Timeline) -> dict[str, Any]:
        """The request, greedy, as the server takes it."""
        call = line.call
        made: dict[str, Any] = {
            "model": self.model, "max_tokens": call.limit, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.api == "chat":
            made["messages"] = [{"role": "user", "content": call.prompt}]
        else:
            made["prompt"] = call.prompt
        if self.technique is not None:
            made["keepkv"] = self._ours(len(call.context))
        return made

    def _ours(self, document: int) -> dict[str, Any]:
        one = self.technique or Technique()
        options = {key: x for key, x in one.options.items() if key != "codec"}
        asked: dict[str, Any] = {"method": one.method, "receipt": True}
        if one.method != FULL:
            asked |= {"budget": one.budget, "options": options, "codec": one.options.get("codec")}
        if self.api == "completions":
            asked["document"] = document
        return {key: x for key, x in asked.items() if x is not None}

    def _take(self, line: Timeline, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            line.error = " ".join(str(chunk["error"]).split())[:LONG]
            return
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
            if text:
                line.times.append(time.perf_counter())
                line.text += text
        if usage := chunk.get("usage"):
            line.n_in, line.n_out = usage.get("prompt_tokens"), usage.get("completion_tokens")
            details = usage.get("prompt_tokens_details") or {}
            line.cached = details.get("cached_tokens")
        if receipt := (chunk.get("keepkv") or {}).get("receipt"):
            line.kv = _bytes_of(receipt, self.technique)

    def _finish(self, line: Timeline) -> None:
        if not line.times:
            line.error = "the reply was empty"
            return
        line.end = line.times[-1]
        if line.n_in is None:
            line.n_in = len(self.tokenizer.encode(line.call.prompt))
        if line.n_out is None:
            line.n_out = len(self.tokenizer.encode(line.text, add_special_tokens=False))

    def peak_bytes(self) -> int | None:
        return self.peak()

    def made_with(self) -> dict[str, Any]:
        return {"model": self.model, "device": "of the server", "dtype": "of the server", "versions": versions()}

    async def close(self) -> None:
        await self.client.aclose()


def _bytes_of(receipt: Mapping[str, Any], technique: Technique | None) -> dict[str, float]:
    """Bytes and seconds of a receipt. A full cache is plain by definition: what our server's takes beyond that, for
    positions and slack, is no compression's doing and none's price."""
    full = float(receipt["full_bytes"])
    held = full if technique is not None and technique.method == FULL else float(receipt["bytes"])
    return {
        "kv_bytes": held, "kv_full": full, "kv_tokens": float(sum(receipt["seen"])),
        "compress_s": float(receipt["seconds"]),
    }  # fmt: skip
