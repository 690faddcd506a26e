"""Rows of a run directory: a request, a point, and what the seeds of a point say together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from keepkv.characterize.grid.levels import SCHEMA
from keepkv.measure.environment import MadeWith
from keepkv.measure.interval import Estimate
from keepkv.measure.rows import INLINE, Row

RUN, REQUESTS, POINTS, RESULTS = "run.json", "requests.jsonl", "points.jsonl", "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class RequestRow(Row):
    """One request. Times are seconds after the window began, and negative before.

    point: digest of the point. number, turn: of its conversation, numbers below 0 came while warming up. status: "ok";
    "failed", with ``error``; "cut", not finished when the point ended. arrive: when it was due, in an open loop
    whether or not it could be sent then. admit: when work on it began, None where the server does not tell. times: of
    each token, or of each piece of text where pieces are all that is seen; the first one is the first token. end: of
    the last. n_in, n_out: tokens. cached: tokens of the prompt that were not read again.
    score: in [0, 1], None where nothing could be right. kv_bytes: allocated for it, compression done; kv_logical: of
    slots in use; kv_full: of a plain cache; kv_tokens: read into it. compress_s: compressing, of the batch it was in.
    """

    schema: int = SCHEMA
    point: str
    number: int
    turn: int = 0
    family: str = ""
    status: str
    arrive: float
    admit: float | None = None
    times: list[float] = field(default_factory=list)
    end: float | None = None
    n_in: int | None = None
    n_out: int | None = None
    cached: int | None = None
    score: float | None = None
    leaked: bool | None = None
    reply: str = ""
    kv_bytes: float | None = None
    kv_logical: float | None = None
    kv_full: float | None = None
    kv_tokens: float | None = None
    compress_s: float | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        """What tells requests of one point apart: the same for every method."""
        return self.number, self.turn


class Compared:
    """What rows of one technique at one place have in common; they declare these as fields."""

    application: str
    workload: str
    hardware: str
    technique: str
    weights: str

    @property
    def place(self) -> tuple[str, str, str]:
        """Where techniques are compared with each other."""
        return self.application, self.workload, self.hardware

    @property
    def choice(self) -> str:
        """What is compared: technique and weights."""
        return self.technique + ("" if self.weights == "none" else f" + {self.weights}")

    @property
    def is_baseline(self) -> bool:
        """Whether it is the uncompressed cache with the weights as they were saved."""
        return self.technique == "full" and self.weights == "none"


@dataclass(frozen=True, kw_only=True)
class PointRow(Compared, Row):
    """One point. status: "ok"; "error", with what it said; "crash", "memory", "timeout".

    point: digest. spec: all levels of it, as ``Point.from_dict`` reads them. warm: "flat", or "limit" where times still
    moved when the window began. unstable: the queue grew through the window of an open loop. window_s: its length.
    joules, idle_watts: measured in the window, and before it at rest; None where nothing was measured, and energy_why
    says why; energy_source and energy_quality as ``measure.energy.Reading`` has them. peak_bytes: most memory of the
    process that holds the model. state: of the machine when the window ended, as ``measure.machine.state`` has it.
    imported: the tool whose numbers these are; ``metrics`` are then all there is of them.
    """

    schema: int = SCHEMA
    point: str
    status: str
    role: str
    application: str
    workload: str
    technique: str
    weights: str
    hardware: str
    seed: int
    block: int
    spec: dict[str, Any]
    warm: str | None = None
    unstable: bool | None = None
    window_s: float | None = None
    requests: int = 0
    failed: int = 0
    cut: int = 0
    joules: float | None = None
    idle_watts: float | None = None
    energy_source: str = "none"
    energy_quality: str = "none"
    energy_why: str | None = None
    peak_bytes: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    imported: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    made_with: MadeWith = field(metadata=INLINE)
    machine: str = ""
    time: str = ""
    error: str | None = None

    def flat(self) -> dict[str, Any]:
        row = {name: value for name, value in self.to_dict().items() if name not in ("spec", "metrics")}
        row = {name: json.dumps(x) if isinstance(x, dict) else x for name, x in row.items()}
        return row | self.metrics


@dataclass(frozen=True, kw_only=True)
class ResultRow(Compared, Row):
    """All seeds of one choice at one place. metrics: each with its 95 % interval, None where it was not measured.
    points: digests of what it is made of. failed: points that gave nothing, and ``error`` is why one did not.
    worst_family: whose scores fell most."""

    schema: int = SCHEMA
    application: str
    workload: str
    hardware: str
    technique: str
    weights: str
    seeds: list[int]
    points: list[str]
    failed: int = 0
    status: str = "ok"
    unstable: bool | None = None
    energy_source: str = "none"
    energy_quality: str = "none"
    worst_family: str | None = None
    metrics: dict[str, Estimate | None] = field(default_factory=dict)
    error: str | None = None

    def value(self, name: str) -> float | None:
        """The mean of a metric; None where it was not measured."""
        found = self.metrics.get(name)
        return None if found is None else found.mean

    def flat(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if name != "metrics":
                row[name] = " ".join(map(str, value)) if isinstance(value, list) else value
        for name, one in self.metrics.items():
            row |= {name: one and one.mean, f"{name}_low": one and one.low, f"{name}_high": one and one.high}
        return row
