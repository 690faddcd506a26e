"""A small evaluation of the embedded model, for tests of what runs it and of what it leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from keepkv.evaluation.setup import Setup, Variant


def setup(**changes: Any) -> Setup:
    """One task, one method, one budget, three items; with ``changes``."""
    held = Setup("embedded", ("niah-multikey-1",), (Variant("keepkv"),), (0.25,), (256,), items=3, batch=2)
    return replace(held, **changes)
