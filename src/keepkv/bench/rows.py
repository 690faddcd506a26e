"""Rows: one contender at one point, with everything needed to read it alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements: median, 20th and 80th percentile (linear interpolation), and each one in order."""

    median: float
    p20: float
    p80: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """None where nothing was measured."""
        known = tuple(x for x in values if x is not None)
        if not known:
            return None
        marks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        low, middle, high = torch.tensor(known, dtype=torch.float64).quantile(marks).tolist()
        return cls(middle, low, high, known)


@dataclass(frozen=True)
class Row:
    """Seconds, bytes, and bytes per second; None is what was not measured.

    kind: "sweep" or "overhead". layers: of the model. label: contender as the command line takes it. budget: as asked.
    batch: rows; under a ``cap`` the largest whose cache fits, by arithmetic, and ``fits`` says whether it did. block:
    contenders of one took turns with each other.

    prefill: reading the prompt, compression included. compression: alone. first: from the prompt to the first token on
    the host. decode: per forward of ``batch`` tokens. throughput: tokens per second while decoding. speedup: this
    throughput over that of the plain cache, turn by turn in the block.
    cache_bytes, full_bytes, ratio: after decoding, of this cache, of a plain one, and their quotient. slots: mean per
    head. peak_bytes, base_bytes: most memory while reading and decoding, and memory before it, model included.
    weight_bytes, slot_bytes, vote_bytes: what a forward must read at least; bandwidth: of a copy, median over the turns
    of the block; floor: the quotient. read_bandwidth: of reading alone. over_floor: decode / floor. per_layer: decode /
    layers, in rows of overhead.
    error: why there are no numbers.
    """

    kind: str
    model: str
    layers: int | None
    label: str
    library: str
    method: str
    options: dict[str, Any]
    store: str | None
    budget: float | int | str | None
    context: int
    batch: int | None
    cap: int | None
    device: str
    hardware: str
    dtype: str
    threads: int
    chunk: int | None
    new: int
    block: int
    fits: bool | None = None
    prefill: Spread | None = None
    compression: Spread | None = None
    first: Spread | None = None
    decode: Spread | None = None
    throughput: Spread | None = None
    speedup: Spread | None = None
    per_layer: Spread | None = None
    over_floor: Spread | None = None
    floor: float | None = None
    bandwidth: float | None = None
    read_bandwidth: float | None = None
    weight_bytes: int | None = None
    slot_bytes: int | None = None
    vote_bytes: int | None = None
    cache_bytes: int | None = None
    full_bytes: int | None = None
    ratio: float | None = None
    slots: float | None = None
    merged: int | None = None
    dropped: int | None = None
    peak_bytes: int | None = None
    base_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    time: str = ""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """One column for each number, without the single turns: for tables."""
        row: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if name in SPREADS:
                row |= {f"{name}_{part}": value and value[part] for part in ("median", "p20", "p80")}
            elif name in ("versions", "options"):
                row[name] = json.dumps(value)
            else:
                row[name] = value
        return row


SPREADS = ("prefill", "compression", "first", "decode", "throughput", "speedup", "per_layer", "over_floor")


def read(path: Path) -> list[Row]:
    """The rows of a ``.jsonl`` file that ``keepkv.evaluation.rows.write`` wrote."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        held = json.loads(line)
        spreads = {
            name: Spread(**held[name] | {"values": tuple(held[name]["values"])}) for name in SPREADS if held[name]
        }
        rows.append(Row(**held | spreads))
    return rows
