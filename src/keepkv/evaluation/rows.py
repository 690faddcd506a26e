"""Rows of results: one measurement each, with everything needed to read it alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from keepkv.errors import KeepKVError
from keepkv.metrics import Estimate


@dataclass(frozen=True)
class FidelityRow:
    """One method at one budget, against the full cache on the same segments.

    budget: as asked. slots: kept per KV head, mean over layers and heads. bytes, full_bytes, ratio: from the receipt,
    after the compression, mean over segments. context: tokens compressed; continuation: tokens teacher-forced after
    them; greedy: tokens of a greedy reply at most. seed: of the bootstrap, and with the segment's number of methods
    that draw. metrics: by name, see ``fidelity``. layers: relative output error by layer.
    """

    model: str
    method: str
    options: dict[str, Any]
    budget: float | int | str
    slots: float
    bytes: float
    full_bytes: float
    ratio: float
    context: int
    continuation: int
    greedy: int
    segments: int
    metrics: dict[str, Estimate]
    layers: dict[int, Estimate]
    seed: int
    versions: dict[str, str]
    device: str
    dtype: str
    revision: str | None

    @property
    def label(self) -> str:
        """Method and options as the command line takes them."""
        return label(self.method, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return {**asdict(self), "options": {key: plain(value) for key, value in self.options.items()}}

    def flat(self) -> dict[str, Any]:
        """One column for each number, without the values of single segments: for tables."""
        nested = ("metrics", "layers", "versions", "options")
        row = {key: value for key, value in self.to_dict().items() if key not in nested}
        row |= {"options": json.dumps(self.to_dict()["options"]), **self.versions}
        for name, estimate in self.metrics.items():
            row |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return row | {f"output_error_layer_{layer}": estimate.mean for layer, estimate in self.layers.items()}


def label(method: str, options: dict[str, Any]) -> str:
    """``keepkv:key=zip``."""
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{method}:{text}" if text else method


def folder(path: str) -> Path:
    """A directory to write to, made where it is missing; to be called before measuring."""
    made = Path(path).expanduser()
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeepKVError(f"cannot write to {path!r}: {error.strerror}") from error
    return made


class Measured(Protocol):
    """A row of any table."""

    def to_dict(self) -> dict[str, Any]: ...

    def flat(self) -> dict[str, Any]: ...


def write(rows: Sequence[Measured], into: Path, name: str) -> list[Path]:
    """``into/name.jsonl`` with everything and ``into/name.csv`` with one column for each number."""
    lines, flat = into / f"{name}.jsonl", into / f"{name}.csv"
    try:
        lines.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows), encoding="utf-8")
        with flat.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0].flat()))
            writer.writeheader()
            writer.writerows(row.flat() for row in rows)
    except OSError as error:
        raise KeepKVError(f"cannot write to {str(into)!r}: {error.strerror}") from error
    return [lines, flat]


def plain(value: Any) -> Any:
    """What JSON can hold in the place of an option."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
