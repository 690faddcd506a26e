"""What is read behind a text wants of its tokens: what learned scores are taught."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate import answering
from keepkv.calibrate.least_squares import HELD_OUT
from keepkv.core.slots import LayerView
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed, reread, watching
from keepkv.errors import CalibrationError
from keepkv.score.passes.kvzip import STAT, KVzip
from keepkv.tasks.asking import Ids

SINKS = 4  # first tokens of each text that are left out: every method keeps them, and they are like no others
LEAST = 1e-6  # of attention: what gets less is not wanted, and how much less says nothing
BEHIND = ("both", "questions", "text")
HIDDEN, GROUPS = "read_hidden", "read_groups"  # in the state of ``Remembering``


@dataclass(frozen=True)
class Remembering(KVzip):
    """KVzip's score, or KVzip+'s, that remembers the hidden states of the first reading, and how many query heads a KV
    head has."""

    needs_hidden: ClassVar[bool] = True

    def observe(self, view: LayerView) -> None:
        if HIDDEN not in view.state:
            assert view.hidden is not None
            view.state[HIDDEN], view.state[GROUPS] = view.hidden, torch.tensor(view.query_groups)
        super().observe(view)


def wanted(
    kind: str,
    model: PreTrainedModel,
    cache: Cache,
    batches: Iterable[Tensor],
    asked: Sequence[Sequence[Ids]] | None = None,
    behind: str = "both",
    known: list[bool] | None = None,
    least: float = LEAST,
) -> Iterator[list[Tensor]]:
    """Of each text, which ``cache`` has read then, y (B,H,S−SINKS) float32 of every compressible layer: ln of the score
    of KVzip's kind of ``cache`` that tokens get from what is read behind the text, on copies of the cache.

    kind: that is calibrated, for errors. asked: for each text the token ids of questions with their answers, as they
    would be fed behind it. behind: what is read. "questions"; "text": the text again (KVzip, arXiv 2505.23416); "both":
    y is the mean of the two. Without ``asked`` it is the text. known: whether the model tells the answer of an
    ``Exchange`` from the wrong one is added. least: of a score; less counts as this. Texts of ``2·SINKS`` tokens or
    fewer are left out. Raises ``CalibrationError`` for questions that do not fit the texts, and where there are fewer
    than ``HELD_OUT`` of them.
    """
    if behind not in BEHIND:
        raise CalibrationError(f"{kind}(behind={behind!r}): choose from {', '.join(BEHIND)}")
    count = 0
    for number, ids in enumerate(batches):
        if ids.shape[1] <= 2 * SINKS:
            continue
        cache.reset()
        feed(model, cache, ids, ids.new_ones(len(ids), 0))
        logs = []
        if asked is not None and behind != "text":
            if number >= len(asked) or len(ids) > 1:
                raise CalibrationError(
                    f"text {number} has {len(ids)} rows, and there are questions for {len(asked)} texts: give texts of "
                    "one row, and a list of questions for each"
                )
            if known is not None and len(known) < answering.ENOUGH:
                known += answering.told_apart(model, cache, asked[number])
            _ask(model, cache, asked[number], torch.ones_like(ids))
            logs.append(_logs(cache, least))
        if asked is None or behind != "questions":
            reread(model, cache, ids)
            logs.append(_logs(cache, least))
        count += 1
        yield [torch.stack(of_layer).mean(0) for of_layer in zip(*logs, strict=True)]
    if count < HELD_OUT and cache.compressible:
        raise CalibrationError(
            f"{kind} needs at least {HELD_OUT} texts of more than {2 * SINKS} tokens, {count} were given: give more "
            "text, or read fewer tokens at a time"
        )


def _logs(cache: Cache, least: float) -> list[Tensor]:
    """ln of the statistic (B,H,S−SINKS) of each layer."""
    stats = (layer.store.view().stats[STAT] for layer in cache.compressible)
    return [x[:, :, SINKS:].float().clamp(min=least).log() for x in stats]


def _ask(model: PreTrainedModel, cache: Cache, asked: Sequence[Ids], mask: Tensor) -> None:
    """Set the statistic of each slot of ``cache`` to the most that one of ``asked`` attends to it; mask (1,T)."""
    most = [torch.zeros_like(layer.store.view().stats[STAT]) for layer in cache.compressible]
    for ids in asked:
        twin = watching(cache)
        for layer in twin.compressible:
            layer.store.write_stats({STAT: torch.zeros_like(layer.store.view().stats[STAT])})
        feed(model, twin, torch.tensor([ids], device=mask.device), mask)
        for layer, held in zip(twin.compressible, most, strict=True):
            torch.maximum(held, layer.store.view().stats[STAT][:, :, : held.shape[2]], out=held)
    for layer, held in zip(cache.compressible, most, strict=True):
        layer.store.write_stats({STAT: held})
