"""Makes the rows of an evaluation from what a unit found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from keepkv.engine.cache import Cache
from keepkv.engine.receipt import Receipt
from keepkv.evaluation.rows import CellKey, ItemRow, MapRow, SpeedRow
from keepkv.evaluation.setup import Unit
from keepkv.tasks.asking import Encoded, survival_of
from keepkv.tasks.scoring import Score

R = TypeVar("R", bound=CellKey)


@dataclass
class Found(Generic[R]):
    """Rows of one unit: one per budget and item, and per budget what it took and, of the first item, a map."""

    items: list[R] = field(default_factory=list)
    speed: list[SpeedRow] = field(default_factory=list)
    maps: list[MapRow] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """What a batch of prompts took. receipt: before anything was asked. Times in seconds. tokens_read: of its prompts,
    padding not counted."""

    receipt: Receipt
    prefill_s: float
    answer_s: float
    tokens_read: int
    peak_bytes: int | None

    @property
    def slots(self) -> list[float]:
        """Slots of each row, mean over layers and KV heads."""
        layers = self.receipt.kept.values()
        return [_mean([_mean(layer[row]) for layer in layers]) for row in range(len(self.receipt.seen))]


def failed(unit: Unit, error: Exception) -> Found[ItemRow]:
    """The rows of a unit that could not be run: its items count as failed."""
    none: dict[str, Any] = {"score": None, "compressed": False, "error": reason(error)}
    return Found([ItemRow(**cell(unit, b), seed=seed, **none) for b in unit.budgets for seed in unit.items])


def reason(error: Exception) -> str:
    """Why something failed, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def enter(
    unit: Unit,
    budget: Any,
    items: Sequence[Encoded],
    scores: list[list[Score]],
    batches: Sequence[Batch],
    found: Found[ItemRow],
) -> None:
    """Adds the rows of one budget to ``found``."""
    receipts = [batch.receipt for batch in batches]
    slots = [one for batch in batches for one in batch.slots]
    rows_per_item = [len(item.asked) if unit.mode == "aware" else 1 for item in items]
    for seed, item, mine, rows in zip(unit.items, items, scores, rows_per_item, strict=True):
        own, slots = slots[:rows], slots[rows:]
        # What is asked only for what it leaks scores nothing.
        values = [score.value for score, one in zip(mine, item.asked, strict=False) if not one.question.probe]
        row = ItemRow(
            **cell(unit, budget), seed=seed, tokens=len(item.context), score=_mean(values), scores=values,
            leaked=[score.leaked for score in mine], replies=[score.reply for score in mine],
            ratio=_mean([one.ratio for one in receipts]),
            bytes=_mean([one.bytes / len(one.seen) for one in receipts]),
            full_bytes=_mean([one.full_bytes / len(one.seen) for one in receipts]),
            slots=_mean(own), compressed=all(one.compressed for one in receipts), tags=item.item.tags,
        )  # fmt: skip
        found.items.append(row)
    judged = {id(one) for item in items for one in item.asked if one.question.judged}
    took = SpeedRow(
        **cell(unit, budget), seeds=list(unit.items), prefill_s=sum(batch.prefill_s for batch in batches),
        answer_s=sum(batch.answer_s for batch in batches), tokens_read=sum(batch.tokens_read for batch in batches),
        tokens_written=sum(one.limit for item in items for one in item.asked if id(one) not in judged),
        peak_bytes=max((batch.peak_bytes for batch in batches if batch.peak_bytes is not None), default=None),
    )  # fmt: skip
    found.speed.append(took)


def map_of(
    tokenizer: Any, unit: Unit, budget: Any, cache: Cache, item: Encoded, ids: list[int], index: Tensor | None = None
) -> MapRow:
    """Where the tokens ``ids`` of the first item survived. index (T',): those that the cache was given; None: all."""
    survival = [round(x, 4) for x in survival_of(cache, len(ids) if index is None else len(index))[0].tolist()]
    if index is not None:
        given = dict(zip(index.tolist(), survival, strict=True))
        survival = [given.get(i, 0.0) for i in range(len(ids))]
    seen: dict[str, Any] = {}
    if item.item.pictures:
        token = tokenizer.family.token
        seen = {"vision": [i for i, x in enumerate(ids) if x == token], "grid": list(tokenizer.grid)}
    return MapRow(
        **cell(unit, budget), **seen, seed=unit.items[0],
        kept=[[*rows[0]] for rows in cache.report().kept.values()],
        survival=survival,
        tokens=[tokenizer.decode([token]) for token in ids],
        questions=[one.question.prompt.strip() for one in item.asked],
        answers=[one.question.answer.strip() for one in item.asked],
    )  # fmt: skip


def cell(unit: Unit, budget: Any) -> dict[str, Any]:
    """The fields of ``CellKey`` in the rows of ``unit`` at ``budget``."""
    key = {"task": unit.task, "length": unit.length, "mode": unit.mode}
    return key | {"method": unit.variant.label, "budget": budget}


def places(unit: Unit) -> list[tuple[Any, ...]]:
    """Cell and seed of each row that ``unit`` has, in order."""
    return [(*CellKey(**cell(unit, budget)).cell, seed) for budget in unit.budgets for seed in unit.items]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
