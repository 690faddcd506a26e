"""Reading what comes behind a compressed context, as it stands; and refusing caches that were not compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.engine.cache import Cache
from keepkv.errors import KeepKVError
from keepkv.tasks import asking


def logits_after(model: Any, cache: Cache, mask: Tensor, ids: Tensor) -> Tensor:
    """Logits (T,V) after each of ``ids`` (1,T); advances ``cache``, which holds the tokens of ``mask``.

    Where decoded tokens choose what they attend to they are fed one by one, since several at once attend to everything.
    """
    all_of, steps = grown(mask, ids), range(ids.shape[1])
    if cache.settings.select is None:
        return asking.step(model, cache, ids, all_of, keep=len(steps))[0]
    found = [asking.step(model, cache, ids[:, i : i + 1], all_of[:, : mask.shape[1] + i + 1])[0] for i in steps]
    return torch.cat(found)


def grown(mask: Tensor, ids: Tensor) -> Tensor:
    """``mask`` (B,S) with ``ids`` (B,T) behind it, (B,S+T)."""
    return torch.cat((mask, torch.ones_like(ids)), dim=1)


def check_compressed(cache: Cache, label: str, budget: Budget, tokens: int) -> None:
    """Raise ``KeepKVError`` where the method ``label`` compressed nothing of ``tokens`` tokens."""
    if not cache.report().compressed and cache.settings.method.name != "full" and budget.share != 1.0:
        raise KeepKVError(
            f"{label} with a budget of {budget} compressed nothing of {tokens} tokens: its row would be the full cache "
            "under another name. Give a smaller budget, a longer context, or a schedule that compresses the prompt."
        )
