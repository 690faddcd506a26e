"""Rows of a sweep: one system at one point, with everything needed to read it alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Percentiles
from keepkv.measure.rows import INLINE, Row


@dataclass(frozen=True, kw_only=True)
class BenchRow(Row):
    """Seconds, bytes, and bytes per second; None is what was not measured.

    kind: "sweep" or "overhead". layers: of the model. label: the system as the command line takes it. budget: as asked.
    batch: rows; under a ``cap`` the largest whose cache fits, by arithmetic, and ``fits`` says whether it did. block:
    systems of one block took turns with each other. hardware: the processor or GPU.

    prefill: reading the prompt, compression included. compression: alone. first: from the prompt to the first token on
    the host. decode: per forward of ``batch`` tokens. throughput: tokens per second while decoding. speedup: this
    throughput over that of the plain cache, turn by turn in the block.
    cache_bytes, full_bytes, ratio: after decoding, of this cache, of a plain one, and their quotient. slots: mean per
    head. peak_bytes, base_bytes: most memory while reading and decoding, and memory before it, model included.
    weight_bytes, slot_bytes, vote_bytes: what a forward must read at least; bandwidth: of a copy, median over the turns
    of the block; floor: the quotient. read_bandwidth: of reading alone. over_floor: decode / floor. per_layer: decode /
    layers, in rows of overhead.
    energy: joules of the machine per forward while decoding, where it has a counter.
    time: when the row was begun. error: why there are no numbers.
    """

    kind: str
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
    hardware: str
    threads: int
    chunk: int | None
    new: int
    block: int
    fits: bool | None = None
    prefill: Percentiles | None = None
    compression: Percentiles | None = None
    first: Percentiles | None = None
    decode: Percentiles | None = None
    throughput: Percentiles | None = None
    speedup: Percentiles | None = None
    per_layer: Percentiles | None = None
    over_floor: Percentiles | None = None
    energy: Percentiles | None = None
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
    made_with: MadeWith = field(metadata=INLINE)
    time: str = ""
    error: str | None = None

    def flat(self) -> dict[str, Any]:
        """One column for each number, without the single turns."""
        row: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if name in REPEATED:
                row |= {f"{name}_{part}": value and value[part] for part in ("median", "p20", "p80")}
            else:
                row[name] = json.dumps(value) if name in ("versions", "options", "imports") else value
        return row


REPEATED = (
    "prefill", "compression", "first", "decode", "throughput", "speedup", "per_layer", "over_floor", "energy",
)  # fmt: skip
