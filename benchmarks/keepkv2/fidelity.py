"""Attention outputs and next tokens where questions and their true answers are read, against the full cache.

    python -m benchmarks.keepkv2.run --work DIR --parts fidelity ...

The items, protection and bytes are those of the scores. The prompt and the answer of each question are fed behind the
compressed context; a row of ``items.jsonl`` has means over these tokens:

    output_error  ‖o′−o‖ / ‖o‖ of a layer's output, heads concatenated, at the full run's queries; mean over layers
    layers    the same by layer
    kl        KL(full ‖ compressed) of the next token, nats; answer_kl: of the tokens of the answer alone
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.evaluation.fidelity.replay import Call, record, replay
from keepkv.evaluation.journal import Journal
from keepkv.evaluation.records import Found, cell, reason
from keepkv.evaluation.rows import CellKey
from keepkv.evaluation.setup import FULL, Setup, Unit
from keepkv.evaluation.unit import build, look_again, make_cache, within
from keepkv.measure import MadeWith
from keepkv.measure.alone import alone
from keepkv.metrics import kl, relative_error
from keepkv.tasks.asking import Encoded, Ids, likely, pad, read, rows_of, step

QUESTIONS = 4  # of an item at most


@dataclass(frozen=True)
class Reference:
    """The full cache's run over questions and answers. owner: the item of each row. ids, new: tokens fed and which of
    them are any, (B,T); said (B,T): those after which a token of the answer comes. logits (B,T,V)."""

    owner: list[int]
    ids: Tensor
    new: Tensor
    said: Tensor
    logits: Tensor
    calls: list[Call]


@dataclass(frozen=True, kw_only=True)
class AnswerRow(CellKey):
    """One item: means over the tokens of its questions and answers, see above; None where it failed."""

    seed: int
    output_error: float | None = None
    layers: list[float] = field(default_factory=list)
    kl: float | None = None
    answer_kl: float | None = None
    ratio: float | None = None
    error: str | None = None


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, setup: Setup, folder: Path) -> None:
    """Runs what of ``setup`` is not yet recorded in ``folder``."""
    with alone(folder):
        _evaluate(model, tokenizer, Journal(folder, setup, MadeWith.of(model, setup.model), AnswerRow))


def _evaluate(model: Any, tokenizer: Any, journal: Journal[AnswerRow]) -> None:
    made: dict[tuple[Any, ...], tuple[list[Encoded], Reference]] = {}
    done = journal.done
    for number, (stage, setup, unit) in enumerate(journal.units()):
        if number >= done:
            key = (unit.task, unit.length, unit.items)  # tasks share the seeds of their items
            if key not in made:
                made = {key: reference(model, setup, unit, build(tokenizer, setup, unit))}
            try:
                told = likely(tokenizer, setup.questions)
                rows = measure(model, setup, unit, *made[key], told)
            except Exception as error:  # counted, as in evaluations
                text = reason(error)
                rows = [AnswerRow(**cell(unit, b), seed=s, error=text) for b in unit.budgets for s in unit.items]
            journal.add(stage, unit, Found(rows))


def reference(model: Any, setup: Setup, unit: Unit, items: list[Encoded]) -> tuple[list[Encoded], Reference]:
    """The full cache on the first questions of each item."""
    cache = make_cache(model, setup, FULL, 1.0, unit.draw, When("deferred"))
    mask = read(model, cache, [item.context for item in items])
    asked = [(i, one) for i, item in enumerate(items) for one in item.asked[:QUESTIONS]]
    asked = [(i, one) for i, one in asked if one.prompt and one.answer and not one.question.probe]
    owner = [i for i, _ in asked]
    ids, new = pad([one.prompt + one.answer for _, one in asked], model.device)
    said = torch.zeros_like(new, dtype=torch.bool)
    for row, (_, one) in enumerate(asked):
        said[row, -len(one.answer) - 1 : -1] = True
    twin, own = rows_of(cache, mask, owner)
    calls = record(twin)
    logits = step(model, twin, ids, torch.cat((own, new), dim=1), keep=ids.shape[1])
    return items, Reference(owner, ids, new.bool(), said, logits, calls)


def measure(
    model: Any, setup: Setup, unit: Unit, items: list[Encoded], full: Reference, questions: Sequence[Ids] = ()
) -> list[AnswerRow]:
    """A row for each budget and item. questions: what methods that rehearse are told."""
    cache = make_cache(model, setup, unit.variant, 1.0, unit.draw, When("deferred"))
    contexts = [item.context for item in items]
    mask = read(model, cache, contexts)
    look_again(model, cache, contexts, questions)
    rows = []
    for budget in unit.budgets:
        twin = within(cache, unit, budget)
        rows += compare(model, twin, mask, unit, budget, full)
    return rows


def compare(model: Any, cache: Cache, mask: Tensor, unit: Unit, budget: Any, full: Reference) -> list[AnswerRow]:
    """How far ``cache`` is from ``full``, a row for each item."""
    ratio = cache.report().ratio
    twin, own = rows_of(cache, mask, full.owner)
    layers: dict[int, Tensor] = defaultdict(lambda: torch.zeros(()))
    for call, output in zip(full.calls, replay(twin, full.calls), strict=True):
        layers[call.index] = relative_error(call.output.flatten(2), output.flatten(2))
    logits = step(model, twin, full.ids, torch.cat((own, full.new.to(own.dtype)), dim=1), keep=full.ids.shape[1])
    apart = kl(full.logits, logits)
    rows = []
    for item, seed in enumerate(unit.items):
        mine = torch.tensor([owner == item for owner in full.owner])[:, None]
        here, said = full.new & mine, full.said & mine
        errors = [float(error[here].mean()) for _, error in sorted(layers.items())]
        rows.append(
            AnswerRow(
                **cell(unit, budget), seed=seed, output_error=sum(errors) / len(errors), layers=errors,
                kl=float(apart[here].mean()), answer_kl=float(apart[said].mean()), ratio=ratio,
            )
        )  # fmt: skip
    return rows
