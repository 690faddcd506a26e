"""Recorded traces: when requests came, and how long they were."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from keepkv.errors import KeepKVError

FORMS = (
    '{"at": seconds, "n_in": tokens, "n_out": tokens} on each line, a trace of Mooncake (timestamp in ms, '
    "input_length, output_length), or a CSV of Azure's (TIMESTAMP, ContextTokens, GeneratedTokens)"
)


class Arrival(NamedTuple):
    """at: seconds after the first one. n_in, n_out: tokens, where the trace says."""

    at: float
    n_in: int | None = None
    n_out: int | None = None


def read_trace(path: str | Path) -> list[Arrival]:
    """The arrivals in a file, in order of time. Raises ``KeepKVError`` where it is no trace."""
    where = Path(path)
    try:
        with where.open(encoding="utf-8", newline="") as file:
            found = list(_azure(file) if where.suffix == ".csv" else _lines(file))
    except (OSError, UnicodeDecodeError) as error:
        raise KeepKVError(f"cannot read the trace {str(path)!r}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise KeepKVError(f"{str(path)!r} is no trace ({type(error).__name__}: {error}): give {FORMS}") from error
    if not found:
        raise KeepKVError(f"the trace {str(path)!r} is empty: give {FORMS}")
    found.sort(key=lambda one: one.at)
    first = found[0].at
    return [one._replace(at=one.at - first) for one in found]


def _lines(file: Any) -> Iterator[Arrival]:
    for line in file:
        if line.strip():
            row = json.loads(line)
            if "timestamp" in row:
                yield Arrival(float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]))
            else:
                yield Arrival(float(row["at"]), _count(row.get("n_in")), _count(row.get("n_out")))


def _azure(file: Any) -> Iterator[Arrival]:
    for row in csv.DictReader(file):
        at = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
        yield Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _count(given: Any) -> int | None:
    return None if given is None else int(given)
