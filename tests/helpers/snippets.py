"""Code blocks of pages, and registries that are left as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keepkv.allocate.base import ALLOCATIONS
from keepkv.core.registry import Registry
from keepkv.methods.base import METHODS
from keepkv.reduce.base import REDUCTIONS
from keepkv.score.base import SCORES
from keepkv.store import CODECS, STORES

REGISTRIES: tuple[Registry[Any], ...] = (SCORES, ALLOCATIONS, REDUCTIONS, METHODS, STORES, CODECS)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of ``page`` in ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@contextmanager
def every_registry() -> Iterator[None]:
    """Names that are registered inside are gone afterwards."""
    before = [dict(registry._factories) for registry in REGISTRIES]
    try:
        yield
    finally:
        for registry, factories in zip(REGISTRIES, before, strict=True):
            registry._factories = factories
