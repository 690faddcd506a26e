"""What a server allows, and what it takes where a request says nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from keepkv.core.options import Checked, Count, Size, between
from keepkv.serve.request import Compression


@dataclass(frozen=True)
class Settings(Checked):
    """Of an engine.

    compression: what requests and contexts are compressed with where they do not say. methods: names that requests may
    ask for; None: all. budget: the most that a request may keep, as a share of its tokens or slots per KV head; 1.0:
    everything. rows: requests that decode at once. prompt, reply: the most tokens of each; None: as the model reads.
    exact: a reply does not depend on what else is served, bit for bit, which costs padding where few rows decode.
    threads: of a CPU, that decode; None: as many as are fastest, tried when the engine starts. Prompts are read by all
    of torch's. chunk: tokens of a prompt that are read between two decoded tokens of the others. queue: requests that
    may wait. memory: bytes of caches, those of contexts included; None: half of what is free when the engine starts.
    contexts: folder of contexts; None: they are kept in memory only, all of them, and go with the engine.
    context_bytes: of contexts in memory; context_disk: of their files; None: no limit of their own.
    """

    compression: Compression = field(default_factory=Compression)
    methods: tuple[str, ...] | None = None
    budget: Annotated[float, between(0, 1)] | Size = 1.0
    rows: Annotated[int, between(1, 1024)] = 16
    prompt: Size | None = None
    reply: Size | None = None
    exact: bool = True
    threads: Annotated[int, between(1, 1024)] | None = None
    chunk: Annotated[int, between(2, 1 << 20)] = 512
    queue: Count = 64
    memory: Annotated[int, between(1, 1 << 62)] | None = None
    contexts: Path | None = None
    context_bytes: Annotated[int, between(1, 1 << 62)] | None = None
    context_disk: Annotated[int, between(1, 1 << 62)] | None = None
