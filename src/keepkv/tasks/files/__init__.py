"""Tasks from files: benchmarks of others, in the format in which they are published.

``longbench:qasper=/data/qasper.jsonl`` names one with its file; without a path it comes from the hub.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from keepkv.errors import UnknownName
from keepkv.tasks.base import Item, TaskError
from keepkv.tasks.files import ifeval, infinitebench, longbench, longbench_v2, mathematics, vlm
from keepkv.tasks.files.base import Benchmark, FileTask
from keepkv.tasks.files.records import download

_LONG = (longbench.BENCHMARK, longbench_v2.BENCHMARK, infinitebench.BENCHMARK)
_ALL = (*_LONG, mathematics.AIME, mathematics.MATH_500, ifeval.BENCHMARK, vlm.BENCHMARK)
BENCHMARKS: dict[str, Benchmark] = {made.name: made for made in _ALL}


def is_file_task(name: str) -> bool:
    """Whether ``name`` starts as one of ``BENCHMARKS`` does."""
    return name.partition("=")[0].partition(":")[0] in BENCHMARKS


def open_task(name: str, path: str | Path | None = None) -> FileTask:
    """The task ``BENCHMARK``, ``BENCHMARK:PART`` or ``BENCHMARK:PART=PATH``.

    ``path``: a JSON, JSON lines, parquet or tab-separated file, several of them as ``data/test-*.parquet``, or a
    directory that holds one named after the part; None: from the hub. Raises ``UnknownName`` and ``TaskError``.
    """
    head, equals, given = name.partition("=")
    if equals and path is not None:
        raise TaskError(f"two paths for {head!r}: {given!r} and {str(path)!r}; give one")
    return _opened(head, str(path) if path is not None else given or None)


@lru_cache(maxsize=32)
def _opened(head: str, path: str | None) -> FileTask:
    name, _, part = head.partition(":")
    if name not in BENCHMARKS:
        raise UnknownName("benchmark", name, BENCHMARKS)
    held = BENCHMARKS[name]
    if held.parts and part not in held.parts:
        if not part:
            raise TaskError(f"{name} has several parts; name one as {name}:PART: {', '.join(held.parts)}")
        raise UnknownName(f"part of {name}", part, held.parts)
    if part and not held.parts:
        raise TaskError(f"{name} has no parts, given: {part!r}")
    records = held.load(path, part or name) if path else download(*held.hub(part))
    return FileTask(
        head, held.summary, _never, decodes=held.decodes, sees=held.sees, records=records, source=path or name,
        make=lambda record: held.make(record, part),
    )  # fmt: skip


def _never(*args: Any, **options: Any) -> Item:
    raise TaskError("items of a file are read, not built")


__all__ = ["BENCHMARKS", "Benchmark", "FileTask", "is_file_task", "open_task"]
