"""One unit of an evaluation: some items, one method, every budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keepkv import tasks
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes import again
from keepkv.errors import KeepKVError
from keepkv.evaluation import reducing
from keepkv.evaluation.answers import ask, in_turn, separately
from keepkv.evaluation.records import Batch, Found, enter, map_of
from keepkv.evaluation.rows import ItemRow
from keepkv.evaluation.setup import FULL, Setup, Unit, Variant
from keepkv.measure.meters import Peak, Time
from keepkv.methods import method_info
from keepkv.tasks.asking import Encoded, Ids, compressed, encode, likely, pad, read
from keepkv.tasks.scoring import Score
from keepkv.vision import seeing
from keepkv.vision.reducers import REDUCERS

ROWS = 64  # questions asked together


class NotCompressed(KeepKVError):
    """A method was to be measured and nothing was compressed."""


def build(tokenizer: Any, setup: Setup, unit: Unit) -> list[Encoded]:
    """The items of ``unit``, generated and encoded; the same for every method."""
    task = tasks.get(unit.task)
    made = (task.generate(tokenizer, unit.length, seed, plain=setup.plain) for seed in unit.items)
    return [encode(tokenizer, item, setup.slack) for item in made]


@torch.inference_mode()
def run(model: Any, tokenizer: Any, setup: Setup, unit: Unit, items: Sequence[Encoded]) -> Found[ItemRow]:
    """Measures ``unit``. Raises whatever goes wrong; records nothing then."""
    found: Found[ItemRow] = Found()
    if unit.variant.method in REDUCERS:
        reducing.run(model, tokenizer, unit, items, found)
    elif unit.mode == "decode":
        for budget in unit.budgets:
            _decoding(model, tokenizer, setup, unit, items, budget, found)
    else:
        _prefilled(model, tokenizer, setup, unit, items, found)
    return found


def make_cache(model: Any, setup: Setup, variant: Variant, budget: Any, draw: int, when: When) -> Cache:
    """A cache for ``variant`` with the protection that the setup gives to every method."""
    known, options = method_info(variant.method).options, dict(variant.options)
    for name, value in (("sinks", setup.sinks), ("window", setup.window)):
        if name in known and value is not None:
            options.setdefault(name, value)
    cache = Cache(model, variant.method, budget, seed=draw, **options)
    return cache.copy(when=when)


def feed(model: Any, tokenizer: Any, cache: Cache, rows: Sequence[Ids], items: Sequence[Encoded]) -> Tensor:
    """Read the contexts ``rows``, with the pictures of their item where it has any; returns their mask (B,T)."""
    if not items[0].item.pictures:
        return read(model, cache, rows)
    (row,), pictures = rows, items[0].item.pictures
    return seeing.read(model, cache, row, tokenizer.seen(row, pictures, model.device), tokenizer)


def look_again(model: Any, cache: Cache, rows: Sequence[Ids], questions: Sequence[Ids] = ()) -> None:
    """What the method of ``cache`` does between reading the contexts ``rows`` and compressing them."""
    again.look_again(model, cache, *pad(rows, model.device), questions=questions)


def _prefilled(
    model: Any, tokenizer: Any, setup: Setup, unit: Unit, items: Sequence[Encoded], found: Found[ItemRow]
) -> None:
    """The prefill is the same for every budget: it is run once, and compressed on copies of its cache."""
    aware = unit.mode == "aware"
    parts = [(i, one) for i, item in enumerate(items) for one in (item.in_sight() if aware else [item])]
    rows = [one.context for _, one in parts]
    scores: dict[Any, list[list[Score]]] = {budget: [[] for _ in items] for budget in unit.budgets}
    batches: dict[Any, list[Batch]] = {budget: [] for budget in unit.budgets}
    width = setup.batch if aware else len(rows)
    for start in range(0, len(rows), width):
        chunk = rows[start : start + width]
        with Peak(model.device) as reading, Time(model.device) as prefill:
            cache = make_cache(model, setup, unit.variant, 1.0, unit.draw, When("deferred"))
            mask = feed(model, tokenizer, cache, chunk, items)
            look_again(model, cache, chunk, likely(tokenizer, setup.questions))
        for budget in unit.budgets:
            with Peak(model.device) as asking:
                twin = within(cache, unit, budget)
                receipt = twin.report()  # before questions are fed
                if unit.first and start == 0:
                    found.maps.append(map_of(tokenizer, unit, budget, twin, items[0], chunk[0]))
                with Time(model.device) as answering:
                    if aware:
                        mine = parts[start : start + len(chunk)]
                        got = ask(model, tokenizer, twin, mask, [one.asked[0] for _, one in mine])
                        for (i, _), score in zip(mine, got, strict=True):
                            scores[budget][i].append(score)
                    else:
                        answer = in_turn if items[0].item.conversation else separately
                        scores[budget] = answer(model, tokenizer, twin, mask, items, ROWS)
            peak = max((x for x in (reading.bytes, asking.bytes) if x is not None), default=None)
            batches[budget].append(Batch(receipt, prefill.seconds, answering.seconds, int(mask.sum()), peak))
    for budget in unit.budgets:
        enter(unit, budget, items, scores[budget], batches[budget], found)


def _decoding(
    model: Any, tokenizer: Any, setup: Setup, unit: Unit, items: Sequence[Encoded], budget: Any, found: Found[ItemRow]
) -> None:
    """Compresses the prompt, and again every so many decoded tokens. One question per item."""
    parts = [item.in_sight()[0] for item in items]
    rows = [one.context for one in parts]
    with Peak(model.device) as peak:
        with Time(model.device) as prefill:
            when = When("immediate", every=setup.every)
            cache = make_cache(model, setup, unit.variant, budget, unit.draw, when)
            mask = feed(model, tokenizer, cache, rows, items)
        with Time(model.device) as answering:
            scores = ask(model, tokenizer, cache, mask, [one.asked[0] for one in parts])
    _check(cache, unit, budget)
    batch = Batch(cache.report(), prefill.seconds, answering.seconds, int(mask.sum()), peak.bytes)
    if unit.first:
        found.maps.append(map_of(tokenizer, unit, budget, cache, items[0], rows[0]))
    enter(unit, budget, items, [[score] for score in scores], [batch], found)


def within(cache: Cache, unit: Unit, budget: Any) -> Cache:
    """A copy of ``cache``, which holds whole prompts, at ``budget`` of ``unit``. Raises ``NotCompressed``."""
    if unit.variant == FULL:
        return compressed(cache, 1.0)
    twin = compressed(cache, budget)
    _check(twin, unit, budget)
    return twin


def _check(cache: Cache, unit: Unit, budget: Any) -> None:
    whole = isinstance(budget, float) and budget == 1
    if unit.variant != FULL and not whole and not cache.report().compressed:
        raise NotCompressed(
            f"{unit.variant.label} at budget {budget} on {unit.task} of {unit.length} tokens compressed nothing: the "
            "tokens fit the budget. Give longer contexts or a smaller budget."
        )
