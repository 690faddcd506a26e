"""Code blocks of pages, and registries that are left as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepkv.allocate.base import ALLOCATIONS
from keepkv.core.registry import Registry
from keepkv.engine.versions import CACHE
from keepkv.methods.base import METHODS
from keepkv.reduce.base import REDUCTIONS
from keepkv.score.base import SCORES
from keepkv.store import CODECS, STORES

REGISTRIES: tuple[Registry[Any], ...] = (SCORES, ALLOCATIONS, REDUCTIONS, METHODS, STORES, CODECS)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of ``page`` in ``language``, as the installed transformers takes them."""
    text = as_installed(page.read_text(encoding="utf-8"))
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def as_installed(text: str) -> str:
    """Code of a page or an example, with the cache's argument named as the installed transformers names it."""
    return re.sub(r"\bcache=(?=\w+[.,)])", f"{CACHE}=", text)


@contextmanager
def every_registry() -> Iterator[None]:
    """Names that are registered inside are gone afterwards."""
    before = [dict(registry._factories) for registry in REGISTRIES]
    try:
        yield
    finally:
        for registry, factories in zip(REGISTRIES, before, strict=True):
            registry._factories = factories
