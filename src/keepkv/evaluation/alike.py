"""Which methods keep the same slots: measured on a text, not told from their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError
from keepkv.methods import method_info
from keepkv.tasks import asking


@dataclass(frozen=True)
class Alike:
    """How much of what one method keeps another keeps too.

    shared: share of the slots that ``method`` keeps, over all layers and heads; None where it was not run. why: the
    reason it was not.
    """

    method: str
    shared: float | None
    why: str = ""


@torch.inference_mode()
def alike(
    model: Any,
    context: Sequence[int],
    method: str,
    others: Sequence[str],
    budget: Budget | float | int | str = 0.25,
    step: Callable[[str], None] = lambda what: None,
) -> list[Alike]:
    """The ``others`` by how many of the slots that ``method`` keeps of ``context`` they keep too, most alike first.

    Every method has its defaults and ``budget``; those that would keep the prompt choose from it. What is refused, as
    it needs a calibration or does not fit the model, comes last with the reason. Raises ``KeepKVError`` where
    ``method`` itself cannot be run or compresses nothing.
    """
    step(method)
    mine = _kept(model, context, method, budget)
    found, not_run = [], []
    for name in others:
        step(name)
        try:
            both = (mine & _kept(model, context, name, budget)).sum()
        except KeepKVError as error:
            not_run.append(Alike(name, None, str(error).partition(". ")[0]))
        else:
            found.append(Alike(name, float(both / mine.sum())))
    return sorted(found, key=lambda one: -(one.shared or 0)) + not_run


def _kept(model: Any, context: Sequence[int], method: str, budget: Budget | float | int | str) -> Tensor:
    """(L,H,T) bool: which tokens of ``context`` each KV head of each compressible layer holds."""
    free: dict[str, Any] = {"prompt": False} if "prompt" in method_info(method).options else {}
    cache = Cache(model, method, budget, seed=0, **free)
    asking.read(model, cache, [list(context)])
    if any(layer.progress.pending for layer in cache.compressible):
        cache.compress()
    if method != "full" and not cache.report().compressed:
        raise KeepKVError(f"{method} with a budget of {budget} compressed nothing of {len(context)} tokens: give less")
    kept = []
    for layer in cache.compressible:
        held = layer.store.positions()[0].long()
        marks = torch.zeros(len(held), len(context) + 1, dtype=torch.bool)
        kept.append(marks.scatter_(1, held.where(held >= 0, len(context)), True)[:, :-1])
    return torch.stack(kept)
