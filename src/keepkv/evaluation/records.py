"""What an evaluation records: rows of items, what they took, and where tokens survived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keepkv.engine.cache import Cache
from keepkv.evaluation.asking import Encoded
from keepkv.evaluation.maps import survival
from keepkv.evaluation.setup import Unit
from keepkv.tasks.scoring import Score

Record = dict[str, Any]
KEY = ("task", "length", "mode", "method", "budget")  # which cell a record belongs to


@dataclass
class Found:
    """Records of one unit: a row per budget and item, and per budget what it took and, of the first item, a map."""

    items: list[Record] = field(default_factory=list)
    speed: list[Record] = field(default_factory=list)
    maps: list[Record] = field(default_factory=list)


def failed(unit: Unit, error: Exception) -> Found:
    """The records of a unit that could not be run: its items count as failed."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    rows = [_row(unit, budget, seed) | {"error": text} for budget in unit.budgets for seed in unit.items]
    return Found(items=rows)


def sizes_of(cache: Cache, rows: int) -> Record:
    """What the receipt says, per row where it is of all."""
    receipt = cache.report()
    slots = [sum(x[row] for x in map(_mean_heads, receipt.kept.values())) / len(receipt.kept) for row in range(rows)]
    sizes = {"ratio": receipt.ratio, "bytes": receipt.bytes / rows, "full_bytes": receipt.full_bytes / rows}
    return sizes | {"compressed": receipt.compressed, "slots": slots}


def _mean_heads(heads_of_rows: list[list[int]]) -> list[float]:
    return [sum(heads) / len(heads) for heads in heads_of_rows]


def enter(
    unit: Unit, budget: Any, items: Sequence[Encoded], scores: list[list[Score]], notes: list[Record], found: Found
) -> None:
    """Adds the rows of one budget to ``found``; ``notes``: sizes and times of each batch that was read."""
    slots = [slot for note in notes for slot in note["slots"]]
    rows_per_item = [len(item.asked) if unit.mode == "aware" else 1 for item in items]
    sizes = {key: sum(note[key] for note in notes) / len(notes) for key in ("ratio", "bytes", "full_bytes")}
    for seed, item, mine, rows in zip(unit.items, items, scores, rows_per_item, strict=True):
        own, slots = slots[:rows], slots[rows:]
        # What is asked only for what it leaks scores nothing.
        values = [score.value for score, one in zip(mine, item.asked, strict=False) if not one.question.probe]
        found.items.append(
            _row(unit, budget, seed)
            | {
                "tokens": len(item.context),
                "score": sum(values) / len(values),
                "scores": values,
                "leaked": [score.leaked for score in mine],
                "replies": [score.reply for score in mine],
                **sizes,
                "slots": sum(own) / len(own),
                "compressed": all(note["compressed"] for note in notes),
                "tags": item.item.tags,
            }
        )
    judged = {id(one) for item in items for one in item.asked if one.question.judged}
    written = sum(one.limit for item in items for one in item.asked if id(one) not in judged)
    total = {key: sum(note[key] for note in notes) for key in ("prefill_s", "answer_s", "tokens_read")}
    peaks = [note["peak_bytes"] for note in notes if note["peak_bytes"] is not None]
    entry = _cell(unit, budget) | {"seeds": list(unit.items), **total, "tokens_written": written}
    found.speed.append(entry | {"peak_bytes": max(peaks, default=None)})


def _cell(unit: Unit, budget: Any) -> Record:
    return dict(zip(KEY, (unit.task, unit.length, unit.mode, unit.variant.label, budget), strict=True))


def cell_of(record: Record) -> tuple[Any, ...]:
    """The values of ``KEY``."""
    return tuple(record[name] for name in KEY)


def places(unit: Unit) -> list[tuple[Any, ...]]:
    """Cell and seed of each row that ``unit`` has, in order."""
    return [(*cell_of(_cell(unit, budget)), seed) for budget in unit.budgets for seed in unit.items]


def _row(unit: Unit, budget: Any, seed: int) -> Record:
    unknown = dict.fromkeys(("tokens", "score", "ratio", "bytes", "full_bytes", "slots", "error"))
    empty: Record = {"scores": [], "leaked": [], "replies": [], "compressed": False, "tags": {}}
    return _cell(unit, budget) | {"seed": seed} | unknown | empty


def map_of(tokenizer: Any, unit: Unit, budget: Any, cache: Cache, item: Encoded, ids: list[int]) -> Record:
    """Where the tokens ``ids`` of the first item survived."""
    return _cell(unit, budget) | {
        "seed": unit.items[0],
        "kept": [rows[0] for rows in cache.report().kept.values()],  # slots by layer and KV head
        "survival": [round(value, 4) for value in survival(cache, len(ids)).tolist()],
        "tokens": [tokenizer.decode([token]) for token in ids],
        "questions": [one.question.prompt.strip() for one in item.asked],
        "answers": [one.question.answer.strip() for one in item.asked],
    }
