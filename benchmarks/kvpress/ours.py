"""Runs keepkv the way the worker runs kvpress."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import keepkv
from keepkv.engine.versions import CACHE

from .outcome import Outcome, kept_lists


def feed(model: PreTrainedModel, cache: Any, tokens: Tensor) -> list[Tensor]:
    """Logits (B,V) after each token of ``tokens`` (B,T), fed one at a time."""
    return [model(t[:, None], **{CACHE: cache}).logits[:, -1] for t in tokens.unbind(1)]


def plain(model: PreTrainedModel, ids: Tensor, continuation: Tensor) -> Outcome:
    """The same with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = [model(ids, **{CACHE: cache}).logits[:, -1], *feed(model, cache, continuation)]
    return Outcome(logits=torch.stack(logits, 1)[0].float())


def prefill(
    model: PreTrainedModel,
    ids: Tensor,
    continuation: Tensor,
    method: str | keepkv.Method,
    budget: int | float,
    while_decoding: bool = False,
    **options: Any,
) -> Outcome:
    """Read ``ids`` (1,S), then feed ``continuation`` (1,T); kept sets are of the end of the prompt, or with
    ``while_decoding`` of the end."""
    cache = keepkv.Cache(model, method, budget, **options)
    layers = range(len(cache.layers))
    with torch.no_grad():
        started = time.perf_counter()
        last = model(ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
        seconds = time.perf_counter() - started
        kept = [kept_lists(cache.kept_positions(i)) for i in layers]
        receipt = cache.report()
        logits = feed(model, cache, continuation)
    if while_decoding:
        kept = [kept_lists(cache.kept_positions(i)) for i in layers]
    else:
        logits = [last, *logits]
    facts = {"prefill_seconds": seconds, "bytes": receipt.bytes, "full_bytes": receipt.full_bytes}
    return Outcome(kept, torch.stack(logits, 1)[0].float(), facts=facts)
