"""What EffiVLM-Bench makes of the rows of an evaluation: OP, loyalty, and the noise under it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from keepkv.engine.cache import Cache
from keepkv.engine.versions import CACHE
from keepkv.evaluation.rows import BudgetAsked, ItemRow
from keepkv.measure.interval import mean
from keepkv.metrics.effivlm import overall_generalisation, overall_performance, ratios
from keepkv.metrics.loyalty import Loyalty, casefolded, overall_loyalty, same_answer
from keepkv.tasks.asking import Encoded, reply, rows_of
from keepkv.vision.seeing import read

Rho = dict[str, float]


@dataclass(frozen=True)
class Aggregate:
    """A method at a budget, over the tasks of one mode and length.

    performance: OP, 1 for the full cache; None where no task has a ratio. rho: of each task; left_out: tasks in which
    the full cache scores 0. loyalty: of replies, white space around them and case apart. entries: cached in a layer on
    average; share: of the full cache's. failed: items that were not run, of which none counts.
    """

    mode: str
    length: int
    method: str
    budget: BudgetAsked
    performance: float | None
    rho: Rho
    left_out: tuple[str, ...]
    loyalty: Loyalty | None
    entries: float | None
    share: float | None
    failed: int


def aggregates(rows: Iterable[ItemRow], aggregate: str = "rms") -> list[Aggregate]:
    """One for each mode, length, method and budget, in the order of the rows; those of the full cache first.

    aggregate: how ratios of tasks become OP, as ``overall_performance`` has it.
    """
    groups: dict[tuple[str, int, str, BudgetAsked], list[ItemRow]] = defaultdict(list)
    for row in rows:
        groups[row.mode, row.length, row.method, row.budget].append(row)
    full = {key[:2]: {(x.task, x.seed): x for x in own} for key, own in groups.items() if key[2] == "full"}
    return [_one(key, own, full.get(key[:2], {}), aggregate) for key, own in groups.items()]


def generalisation(runs: Mapping[str, Sequence[Aggregate]]) -> dict[tuple[str, int, str, BudgetAsked], float]:
    """OG of each mode, length, method and budget over several models, given the aggregates of each by its name."""
    rho: dict[tuple[str, int, str, BudgetAsked], dict[str, Rho]] = defaultdict(dict)
    for model, own in runs.items():
        for one in own:
            if one.rho:
                rho[one.mode, one.length, one.method, one.budget][model] = one.rho
    return {key: overall_generalisation(own) for key, own in rho.items() if len(own) == len(runs)}


def _one(
    key: tuple[str, int, str, BudgetAsked], rows: list[ItemRow], full: dict[Any, ItemRow], aggregate: str
) -> Aggregate:
    ran = [row for row in rows if row.error is None and (row.task, row.seed) in full]
    scores: dict[str, list[float]] = defaultdict(list)
    whole: dict[str, list[float]] = defaultdict(list)
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for row in ran:
        reference = full[row.task, row.seed]
        scores[row.task].append(row.score or 0.0)
        whole[row.task].append(reference.score or 0.0)
        pairs = zip(reference.replies, row.replies, strict=True)
        verdicts[row.task] += [same_answer(a, b, casefolded) for a, b in pairs]
    found = ratios({k: fmean(x) for k, x in scores.items()}, {k: fmean(x) for k, x in whole.items()})
    op = overall_performance([*found.rho.values()], aggregate) if found.rho else None
    whole_slots = [full[row.task, row.seed].slots for row in ran]
    share = mean(row.slots / n for row, n in zip(ran, whole_slots, strict=True) if row.slots is not None and n)
    loyalty = overall_loyalty(verdicts) if verdicts else None
    entries = mean(row.slots for row in ran)
    return Aggregate(*key, op, found.rho, found.left_out, loyalty, entries, share, len(rows) - len(ran))


@dataclass(frozen=True)
class Floor:
    """How loyal nothing at all is: the full cache run again, and transformers' own cache and attention."""

    again: Loyalty
    plain: Loyalty


@torch.inference_mode()
def noise_floor(model: Any, seeing: Any, items: Sequence[Encoded]) -> Floor:
    """Loyalty to the full cache's replies on contexts with pictures, where nothing is compressed."""
    first, again = _full(model, seeing, items), _full(model, seeing, items)
    plain = _plain(model, seeing, items)  # with the attention that the model has where no cache of ours is held

    def against(other: list[list[str]]) -> Loyalty:
        verdicts = {
            str(i): [same_answer(a, b, casefolded) for a, b in zip(one, two, strict=True)]
            for i, (one, two) in enumerate(zip(first, other, strict=True))
        }
        return overall_loyalty(verdicts)

    return Floor(against(again), against(plain))


def _full(model: Any, seeing: Any, items: Sequence[Encoded]) -> list[list[str]]:
    said = []
    for item in items:
        cache = Cache(model, "full")
        mask = read(model, cache, item.context, seeing.seen(item.context, item.item.pictures, model.device), seeing)
        mine = []
        for one in item.asked:
            twin, own = rows_of(cache, mask, [0])
            mine.append(seeing.decode(reply(model, twin, own, [one.prompt], one.limit)[0][0].tolist()))
        said.append(mine)
        del cache, twin
    return said


def _plain(model: Any, seeing: Any, items: Sequence[Encoded]) -> list[list[str]]:
    """The same by the longest way: each question behind its context in a cache of its own."""
    from transformers import DynamicCache

    said = []
    for item in items:
        seen = seeing.seen(item.context, item.item.pictures, model.device)
        mine = []
        for one in item.asked:
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            tokens = torch.tensor([item.context], device=model.device)
            given = seeing.family.pixels(seen.pixels.to(model.dtype))
            _step(model, cache, tokens, seen.places, **given)
            edge, ids, found = int(seen.places.max()) + 1, one.prompt, list[int]()
            while len(found) < one.limit:
                at = edge + torch.arange(len(ids), device=model.device)[None]
                logits = _step(model, cache, torch.tensor([ids], device=model.device), at)
                edge, ids = edge + len(ids), [int(logits.argmax())]
                found += ids
            mine.append(seeing.decode(found))
        said.append(mine)
    return said


def _step(model: Any, cache: Any, ids: Tensor, places: Tensor, **given: Tensor) -> Tensor:
    out = model(input_ids=ids, position_ids=places, use_cache=True, logits_to_keep=1, **given, **{CACHE: cache})
    logits: Tensor = out.logits[0, -1]
    return logits
