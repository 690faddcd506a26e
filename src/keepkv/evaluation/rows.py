"""The rows of an evaluation, as its files hold them: the runner writes them, summary and report read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from keepkv.core.budget import Budget
from keepkv.measure.environment import MadeWith
from keepkv.measure.rows import IF_KNOWN, INLINE, Row

RUN, ITEMS, SPEED, MAPS, CELLS = "run.json", "items.jsonl", "speed.jsonl", "maps.jsonl", "cells.jsonl"
Mode = Literal["agnostic", "aware", "decode"]
BudgetAsked = float | int | str  # a budget, as ``keepkv.Budget`` takes it


@dataclass(frozen=True, kw_only=True)
class Stage(Row):
    """What one command added to an evaluation, of which a reader needs what it was made with."""

    environment: MadeWith


@dataclass(frozen=True, kw_only=True)
class Run(Row):
    """What a reader needs of ``run.json``, which holds all of a ``Setup``. items: of each task, length and seed.
    shares: what budgets below 1 are shares of; bytes where nothing says so, as in files of earlier versions. stages:
    where more was added later, each in turn."""

    model: str
    tasks: list[str]
    lengths: list[int]
    modes: list[Mode]
    methods: list[str]
    budgets: list[BudgetAsked]
    items: int
    seeds: list[int]
    environment: MadeWith
    shares: Literal["bytes", "tokens"] = "bytes"
    stages: list[Stage] = field(default_factory=list)

    def made_with(self, item: ItemRow) -> MadeWith:
        """What ``item`` was made with: by its stage, and of a peer by its own versions."""
        made = self.environment if item.stage is None else self.stages[item.stage].environment
        return replace(made, versions=item.versions) if item.versions else made

    def named(self, budget: BudgetAsked) -> BudgetAsked:
        """``budget`` of a row of this run as it is written today: ``10%bytes`` for a bare share of bytes."""
        if self.shares == "bytes" and isinstance(budget, float) and budget < 1:
            return Budget(share_of_bytes=budget).value
        return budget


@dataclass(frozen=True, kw_only=True)
class CellKey(Row):
    """Which cell a row belongs to. method: with its options, as the command line takes it."""

    task: str
    length: int
    mode: Mode
    method: str
    budget: BudgetAsked

    @property
    def cell(self) -> tuple[str, int, str, str, BudgetAsked]:
        """Equal in all rows of a cell."""
        return self.task, self.length, self.mode, self.method, self.budget


C = TypeVar("C", bound=CellKey)


def named(rows: Iterable[C], run: Run) -> list[C]:
    """``rows`` of ``run`` with their budgets as they are written today."""
    return [row if (now := run.named(row.budget)) == row.budget else replace(row, budget=now) for row in rows]


@dataclass(frozen=True, kw_only=True)
class ItemRow(CellKey):
    """One item of a task. seed: which item. score in [0, 1], None where the item failed, which ``error`` explains.

    tokens: of the context. scores, leaked, replies: of each question; those asked only for what they leak have no
    score. ratio, bytes, full_bytes, slots (mean per head): after the compression, mean over the rows of a batch.
    compressed: whether anything was. tags: of the item. versions: of a peer that ran in an environment of its own.
    stage: which of the run's stages it is of; None: the first.
    """

    seed: int
    tokens: int | None = None
    score: float | None
    scores: list[float] = field(default_factory=list)
    leaked: list[bool] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    ratio: float | None = None
    bytes: float | None = None
    full_bytes: float | None = None
    slots: float | None = None
    compressed: bool = True
    tags: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    versions: dict[str, str] | None = field(default=None, metadata=IF_KNOWN)
    stage: int | None = field(default=None, metadata=IF_KNOWN)


@dataclass(frozen=True, kw_only=True)
class SpeedRow(CellKey):
    """The items that were run together. seeds: which items. Times in seconds. tokens_read: of prompts; tokens_written:
    of replies. peak_bytes: most memory at once, None where it is not known."""

    seeds: list[int] = field(default_factory=list)
    prefill_s: float
    answer_s: float
    tokens_read: float
    tokens_written: float
    peak_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class MapRow(CellKey):
    """What was kept of one item. kept: slots by layer and KV head; survival: of each token, the share of (layer, head)
    that still hold it; tokens: their text. vision, grid: which of them are seen, in order, and the rows and columns of
    cells that each step of these has."""

    seed: int
    kept: list[list[float]]
    survival: list[float]
    tokens: list[str]
    questions: list[str]
    answers: list[str]
    vision: list[int] | None = field(default=None, metadata=IF_KNOWN)
    grid: list[int] | None = field(default=None, metadata=IF_KNOWN)


@dataclass(frozen=True, kw_only=True)
class CellRow(CellKey):
    """What the items of a cell say together.

    n: items scored; questions: of all of them; failed: items that were not scored, and ``error`` is why one was not.
    score: mean over items; low, high: its 95 % interval. minus_full: mean of the differences from the full cache, item
    by item. ratio: bytes / full_bytes. leaked: share of the questions. seed: of each draw of items. What is None is not
    known, or there was nothing to measure it on.
    """

    n: int
    questions: int = 0
    failed: int
    score: float | None
    low: float | None
    high: float | None
    minus_full: float | None
    minus_full_low: float | None
    minus_full_high: float | None
    ratio: float | None
    bytes: float | None
    full_bytes: float | None
    slots: float | None = None
    tokens: float | None = None
    leaked: float | None = None
    peak_bytes: float | None
    read_per_s: float | None
    written_per_s: float | None
    error: str | None = None
    seed: list[int] = field(default_factory=list)
    made_with: MadeWith = field(metadata=INLINE)

    def flat(self) -> dict[str, Any]:
        columns = {name: value for name, value in self.to_dict().items() if name not in ("versions", "imports")}
        return columns | self.made_with.files_and_versions | {"seed": " ".join(map(str, self.seed))}
