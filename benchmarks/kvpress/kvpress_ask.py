"""Asks questions of a cache that kvpress compressed; started by the worker, inside the environment of kvpress."""

from __future__ import annotations

import contextlib
import copy
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def ask(model: Any, press: Any, prompt: Tensor, questions: list[dict[str, Any]], conversation: bool) -> tuple[Any, Any]:
    """Reads ``prompt`` (1,S) under ``press`` and asks ``questions``, each of a copy of the cache, or one after another.

    A question has ``prompt`` and ``answer``, both (1,T) ids, and ``limit``: tokens of the reply; 0: nothing is said,
    and the geometric mean probability of the answer is returned. Returns the cache as it was read, and facts: replies
    (token ids, or the probability), seconds.
    """
    cache = DynamicCache(config=model.config)
    started = time.perf_counter()
    with press(model) if press else contextlib.nullcontext():
        model(prompt, past_key_values=cache, logits_to_keep=1)
    middle = time.perf_counter()
    read = copy.deepcopy(cache)
    replies, position, unfed = [], prompt.shape[1], prompt[:, :0]
    for question in questions:
        twin = cache if conversation else copy.deepcopy(cache)
        fed = torch.cat((unfed, question["prompt"]), 1)
        if question["limit"]:
            said = reply(model, twin, fed, position, question["limit"])
            replies.append(said)
            if conversation:
                unfed, position = said[:, -1:], position + fed.shape[1] + len(said[0]) - 1
        else:
            replies.append(probability(model, twin, fed, question["answer"], position))
    facts = {
        "prefill_seconds": middle - started,
        "answer_seconds": time.perf_counter() - middle,
        "replies": [one if isinstance(one, float) else one[0].tolist() for one in replies],
    }
    return read, facts


def forward(model: Any, cache: Any, ids: Tensor, start: int) -> Tensor:
    """Logits (1,T,V) of ``ids`` (1,T) at their true positions."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    logits: Tensor = model(ids, past_key_values=cache, position_ids=positions).logits
    return logits


def reply(model: Any, cache: Any, fed: Tensor, start: int, limit: int) -> Tensor:
    """Greedy reply (1,limit); its last token is not fed."""
    said: list[Tensor] = []
    while True:
        said.append(forward(model, cache, fed, start)[:, -1].argmax(-1, keepdim=True))
        if len(said) == limit:
            return torch.cat(said, 1)
        start, fed = start + fed.shape[1], said[-1]


def probability(model: Any, cache: Any, fed: Tensor, answer: Tensor, start: int) -> float:
    """Geometric mean probability of the answer's tokens that follow a token fed here."""
    known = answer if fed.shape[1] else answer[:, 1:]
    logits = forward(model, cache, torch.cat((fed, answer), 1), start)
    guess = logits[:, -known.shape[1] - 1 : -1].double().log_softmax(-1)
    return float(guess.gather(-1, known[..., None]).mean().exp())
