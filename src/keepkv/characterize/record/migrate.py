"""Rows of older schemas as rows of this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keepkv.characterize.grid.levels import SCHEMA
from keepkv.errors import KeepKVError

Step = Callable[[dict[str, Any], str], dict[str, Any]]


def _from_0(row: dict[str, Any], file: str) -> dict[str, Any]:
    """Before there were numbers: a technique was called a method."""
    if "method" in row and "technique" not in row:
        row = {"technique": row["method"], **{name: x for name, x in row.items() if name != "method"}}
    return row


STEPS: dict[int, Step] = {0: _from_0}  # from a schema to the next


def migrated(row: dict[str, Any], file: str) -> dict[str, Any]:
    """``row`` of ``file`` in the present schema. Raises ``KeepKVError`` for one of a newer keepkv."""
    schema = row.get("schema", 0)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise KeepKVError(f"{file}: schema {schema!r}, and this keepkv knows those up to {SCHEMA}: take a newer keepkv")
    while schema < SCHEMA:
        row = STEPS[schema](row, file)
        schema += 1
    return row | {"schema": SCHEMA}
