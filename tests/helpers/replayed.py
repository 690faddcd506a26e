"""Rollouts that are recorded, and how far a replay is from them."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from matrix import METHODS
from running import batch, generate
from torch import Tensor

import keepkv
from keepkv import training
from keepkv.engine.versions import CACHE
from keepkv.methods import make_method
from keepkv.training import Record, Recorder

SMALL = {"window": 4, "sinks": 2}


def dropping() -> list[Any]:
    """Of the variants of the matrix those that only drop slots."""
    return [one for one in METHODS if make_method(*one.values[0]).reduce.drops]


def cache_of(model: Any, method: str = "g-kv", budget: Any = 14, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model, method, budget, **{**SMALL, **options})


def rollout(model: Any, cache: keepkv.Cache, new: int = 8, **options: Any) -> tuple[Tensor, Tensor, Tensor, Record]:
    """Text (B,T), mask (B,T), logits (B,new,V) as they were when decoded, and the record."""
    recorder, inputs = training.record(cache), batch()
    out = generate(model, inputs, cache, new=new, **options)
    mask = torch.cat((inputs["attention_mask"], torch.ones(len(out.sequences), new, dtype=torch.long)), 1)
    return out.sequences, mask, out.scores_, recorder.take()


def distance(model: Any, text: Tensor, mask: Tensor, scores: Tensor, record: Record) -> float:
    """The largest difference of a logit in the replay from the rollout's."""
    with torch.no_grad():
        logits = training.replay(model, text, mask, record)
    return float((logits[:, -scores.shape[1] - 1 : -1] - scores).abs().max())


def step_by_step(model: Any, cache: keepkv.Cache, length: int, new: int) -> tuple[Recorder, list[list[Tensor]]]:
    """Feeds one random row; the positions (1,H,S) that each layer held for each of the last ``new`` queries."""
    recorder = training.record(cache)
    ids = torch.randint(3, zoo.VOCAB, (1, length + new), generator=torch.Generator().manual_seed(length))
    held = []
    with torch.no_grad():
        model(input_ids=ids[:, :length], **{CACHE: cache})
        for token in ids[:, length:].split(1, dim=1):
            model(input_ids=token, **{CACHE: cache})
            held.append([layer.store.positions().clone() for layer in cache.compressible])
    return recorder, held
