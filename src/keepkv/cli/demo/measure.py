"""Measures methods on one context and its questions: no printing, no command line.

The context is compressed once per method, before any question is known; each question is asked on a copy of that
cache, which is not compressed further. The full cache is the reference: for divergence, and for the answers where
none are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import keepkv
from keepkv.evaluation.setup import FULL, Variant
from keepkv.measure.meters import Time
from keepkv.metrics import kl
from keepkv.tasks.asking import Ids, greedy, pad, read, reply, rows_of, step, survival_of

TIMED = 32  # tokens decoded to measure decoding speed


@dataclass(frozen=True)
class Asked:
    """A question as text that continues the context; ``answer`` is ``None`` where no answer is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Reply:
    """One question answered from one cache.

    right: the known answer, or else the full cache's reply, is what greedy decoding gave.
    agreement: share of the reference answer's tokens that are the most likely next token, given those before.
    kl: mean over those tokens of KL(full cache ‖ this cache) of the next-token distributions, in nats.
    """

    text: str
    right: bool
    agreement: float
    kl: float


@dataclass(frozen=True)
class Compared:
    """What one method did. survival: for each token of the context, the share of (layer, head) that still hold it."""

    label: str
    replies: list[Reply]
    receipt: Any
    prefill_per_second: float
    decode_per_second: float
    survival: list[float]

    @property
    def right(self) -> int:
        """Questions answered right."""
        return sum(reply.right for reply in self.replies)

    @property
    def kl(self) -> float:
        """Mean over the questions."""
        return sum(reply.kl for reply in self.replies) / len(self.replies)

    @property
    def agreement(self) -> float:
        """Mean over the questions."""
        return sum(reply.agreement for reply in self.replies) / len(self.replies)


@dataclass(frozen=True)
class _Reading:
    """A cache that holds the context, compressed and closed to further compression, its mask, and seconds it took."""

    cache: Any
    mask: Tensor
    seconds: float


@dataclass(frozen=True)
class _Question:
    prompt: Ids
    answer: Ids  # tokens of the reference answer
    known: str | None
    logits: Tensor  # (len(answer),V) of the full cache


@torch.inference_mode()
def measure(
    model: Any,
    tokenizer: Any,
    context: Ids,
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    budget: float | int | str,
    *,
    reply_tokens: int | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> list[Compared]:
    """One entry for the full cache, then one per variant.

    context: token ids. reply_tokens: length of a reply; ``None`` for as many tokens as the known answer has.
    """
    for _ in range(2):  # the first pass warms up, the second is timed
        step("full")
        full = _read(model, context, FULL, 1.0)
    questions = [_reference(model, tokenizer, full, one, reply_tokens) for one in asked]
    found = [_compare(model, tokenizer, context, full, FULL, questions, reply_tokens)]
    for variant in variants:
        step(variant.label)
        reading = _read(model, context, variant, budget)
        found.append(_compare(model, tokenizer, context, reading, variant, questions, reply_tokens))
    return found


def _read(model: Any, context: Ids, variant: Variant, budget: int | float | str) -> _Reading:
    cache = keepkv.Cache(model, method=variant.method, budget=budget, **variant.options)
    with Time(model.device) as time:
        mask = read(model, cache, [context])
    cache.compressing = False
    return _Reading(cache, mask, time.seconds)


def _reference(model: Any, tokenizer: Any, full: _Reading, asked: Asked, reply_tokens: int | None) -> _Question:
    prompt = tokenizer.encode(asked.prompt, add_special_tokens=False)
    if asked.answer is None:
        answer = _answer(model, tokenizer, full, prompt, reply_tokens or TIMED)
    else:
        answer = tokenizer.encode(asked.answer, add_special_tokens=False)
    return _Question(prompt, answer, asked.answer, _forced(model, full, prompt, answer))


def _compare(
    model: Any,
    tokenizer: Any,
    context: Ids,
    reading: _Reading,
    variant: Variant,
    questions: Sequence[_Question],
    reply_tokens: int | None,
) -> Compared:
    return Compared(
        label=variant.label,
        replies=[_reply(model, tokenizer, reading, question, reply_tokens) for question in questions],
        receipt=reading.cache.report(),
        prefill_per_second=len(context) / reading.seconds,
        decode_per_second=_decode_per_second(model, reading, questions[0].prompt),
        survival=survival_of(reading.cache, len(context))[0].tolist(),
    )


def _reply(model: Any, tokenizer: Any, reading: _Reading, question: _Question, reply_tokens: int | None) -> Reply:
    logits = _forced(model, reading, question.prompt, question.answer)
    ids = _answer(model, tokenizer, reading, question.prompt, reply_tokens or len(question.answer))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    right = ids == question.answer if question.known is None else question.known.strip() in text
    agreement = (logits.argmax(-1).cpu() == torch.tensor(question.answer)).float().mean()
    return Reply(text, right, float(agreement), float(kl(question.logits, logits).mean()))


def _forced(model: Any, reading: _Reading, prompt: Ids, answer: Ids) -> Tensor:
    """Logits (len(answer),V) of each token of ``answer``, given those before."""
    twin, mask = rows_of(reading.cache, reading.mask, [0])
    ids, new = pad([prompt + answer[:-1]], model.device)
    return step(model, twin, ids, torch.cat((mask, new), dim=1), keep=len(answer))[0]


def _answer(model: Any, tokenizer: Any, reading: _Reading, prompt: Ids, tokens: int) -> Ids:
    """A greedy reply of ``tokens`` at most, on a copy of the cache."""
    twin, mask = rows_of(reading.cache, reading.mask, [0])
    said: Ids = reply(model, twin, mask, [prompt], tokens, tokenizer.eos_token_id)[0][0].tolist()
    return said


def _decode_per_second(model: Any, reading: _Reading, prompt: Ids) -> float:
    """Tokens per second of one-token steps after ``prompt``, on a copy of the cache."""
    twin, mask = rows_of(reading.cache, reading.mask, [0])
    ids, new = pad([prompt], model.device)
    said = greedy(model, twin, torch.cat((mask, new), dim=1), ids)
    next(said)  # feeds the prompt
    with Time(model.device) as time:
        for token in islice(said, TIMED - 1):
            int(token)  # as everything does that streams
    return (TIMED - 1) / time.seconds
