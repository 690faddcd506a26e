"""Whether a model answers the questions that it is watched on: what it is asked in vain teaches nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.questions import Exchange
from keepkv.engine.cache import Cache
from keepkv.tasks.asking import Ids, step

ENOUGH = 48  # questions that are looked at
LEAST = 0.6  # of them that must be told apart, where guessing tells half


def told_apart(model: PreTrainedModel, cache: Cache, asked: Sequence[Ids]) -> list[bool]:
    """Of the questions ``asked`` on the text that ``cache`` (of one row) has read, of which a wrong answer is known:
    whether the right one is likelier, by the mean of ln p over its tokens. ``cache`` is left as it is."""
    return [
        _likelihood(model, cache, one, one.answer) > _likelihood(model, cache, one.wrong, one.wrong.answer)
        for one in asked
        if isinstance(one, Exchange) and one.wrong is not None
    ]


def _likelihood(model: PreTrainedModel, cache: Cache, ids: Ids, count: int) -> float:
    """Mean ln p of the last ``count`` of ``ids``, fed behind a copy of ``cache``."""
    row = torch.tensor([ids], device=model.device)
    mask = row.new_ones(1, cache.get_seq_length() + len(ids))
    said: Tensor = step(model, cache.copy(), row, mask, keep=count + 1)[0, :-1].float().log_softmax(-1)
    return float(said.gather(1, row[0, -count:, None]).mean())


def said(found: Sequence[bool]) -> list[str]:
    """Lines for a reader: how many answers the model tells from wrong ones, and a warning where they are few."""
    if not found:
        return []
    told = f"the model tells {sum(found)} of {len(found)} right answers from others of their kind"
    lines = [f"{told}, of which the text says nothing"]
    if sum(found) < LEAST * len(found):
        lines.append(
            "WARNING: half would be guessing. What a model attends to while it guesses says nothing: teach it with "
            "questions that it can answer (keepkv.calibrate.calibrate(…, asked=…)), or take a method without a "
            "calibration, such as keepkv2"
        )
    return lines
