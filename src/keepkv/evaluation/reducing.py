"""Reducers in an evaluation: prompts that the language model is given less of, under the budget of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError
from keepkv.evaluation.answers import ask, separately
from keepkv.evaluation.records import Batch, Found, enter, map_of
from keepkv.evaluation.rows import ItemRow
from keepkv.evaluation.setup import Setup, Unit, Variant
from keepkv.measure.meters import Peak, Time
from keepkv.tasks import get
from keepkv.tasks.asking import Encoded, Ids
from keepkv.tasks.scoring import Score
from keepkv.vision.reduced import read_reduced, vision_tokens

ROWS = 64  # questions asked together


def check_reducer(setup: Setup, variant: Variant) -> None:
    """Raise ``KeepKVError`` where a reducer cannot be part of ``setup``."""
    if variant.options:
        raise KeepKVError(f"{variant.label}: {variant.method} takes no options")
    if not all(get(name).sees for name in setup.tasks):
        raise KeepKVError(f"{variant.method} leaves out parts of pictures, and a task without any was asked for")


def run(model: Any, tokenizer: Any, unit: Unit, items: Sequence[Encoded], found: Found[ItemRow]) -> None:
    """Measures ``unit``, whose variant is a reducer: each prompt is read anew for each budget.

    As many tokens are given to the model as a method keeps entries in each layer. ratio and bytes are of the whole
    prompt's, as those of methods are; of a conversation every question is asked by itself.
    """
    for budget in unit.budgets:
        scores: list[list[Score]] = [[] for _ in items]
        batches: list[Batch] = []
        for i, item in enumerate(items):
            aware = unit.mode == "aware"
            for j, part in enumerate(item.in_sight() if aware else [item]):
                row = part.context
                with Peak(model.device) as peak, Time(model.device) as reading:
                    cache, mask, index = _read(model, tokenizer, unit, budget, item, row)
                if unit.first and i == j == 0:
                    found.maps.append(map_of(tokenizer, unit, budget, cache, item, row, index))
                receipt = cache.report()
                whole = receipt.full_bytes * len(row) // len(index)
                with Time(model.device) as answering:
                    if aware:
                        scores[i] += ask(model, tokenizer, cache, mask, part.asked)
                    else:
                        scores[i] = separately(model, tokenizer, cache, mask, [item], ROWS)[0]
                made = replace(receipt, full_bytes=whole, compressed=len(index) < len(row))
                batches.append(Batch(made, reading.seconds, answering.seconds, len(row), peak.bytes))
        enter(unit, budget, items, scores, batches, found)


def _read(model: Any, tokenizer: Any, unit: Unit, budget: Any, item: Encoded, row: Ids) -> tuple[Cache, Tensor, Tensor]:
    """A cache that holds what is left of ``row``, its mask, and which of its tokens these are."""
    seen = tokenizer.seen(row, item.item.pictures, model.device)
    vision = int(seen.vision.sum())
    count = vision_tokens(budget, vision, len(row) - vision)
    cache = Cache(model, "full")
    mask, index = read_reduced(model, cache, row, seen, tokenizer, unit.variant.method, count)
    cache.compressing = False
    return cache, mask, index
