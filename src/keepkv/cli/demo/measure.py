"""Measures methods on one context and its questions: no printing, no command line.

The context is compressed once per method, before any question is known; each question is asked on a copy of that
cache, which is not compressed further. The full cache is the reference: for divergence, and for the answers where
none are known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import keepkv
from keepkv.evaluation.maps import survival
from keepkv.evaluation.setup import Variant

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
class Row:
    """One method. ``survival``: for each token of the context, the share of (layer, head) that still hold it."""

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
class _Question:
    prompt: Tensor  # (1,T)
    answer: list[int]  # tokens of the reference answer
    known: str | None
    log_probs: Tensor  # (len(answer),V) of the full cache


@torch.inference_mode()
def measure(
    model: Any,
    tokenizer: Any,
    context: Tensor,
    asked: Sequence[Asked],
    variants: Sequence[Variant],
    budget: float | int | str,
    *,
    reply_tokens: int | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """One row for the full cache, then one per variant.

    context (1,T) token ids. reply_tokens: length of a reply; ``None`` for as many tokens as the known answer has.
    """
    full, seconds = None, 0.0
    for _ in range(2):  # the first pass warms up, the second is timed
        step("full")
        full, seconds = _read(model, context, Variant("full"), 1.0)
    questions = [_reference(model, tokenizer, full, one, reply_tokens) for one in asked]
    rows = [_row(model, tokenizer, context, full, seconds, Variant("full"), questions, reply_tokens)]
    for variant in variants:
        step(variant.label)
        cache, seconds = _read(model, context, variant, budget)
        rows.append(_row(model, tokenizer, context, cache, seconds, variant, questions, reply_tokens))
    return rows


def _read(model: Any, context: Tensor, variant: Variant, budget: int | float | str) -> tuple[Any, float]:
    """The compressed cache of the context, closed to further compression, and the seconds it took."""
    cache = keepkv.Cache(model, method=variant.method, budget=budget, **variant.options)
    start = _clock(model)
    model(input_ids=context, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds = _clock(model) - start
    cache.compressing = False
    return cache, seconds


def _reference(model: Any, tokenizer: Any, full: Any, asked: Asked, reply_tokens: int | None) -> _Question:
    prompt = _ids(tokenizer, asked.prompt, model)
    if asked.answer is None:
        answer = _decode(model, tokenizer, full, prompt, reply_tokens or TIMED)[0]
    else:
        answer = tokenizer.encode(asked.answer, add_special_tokens=False)
    return _Question(prompt, answer, asked.answer, _forced(model, full, prompt, answer))


def _row(
    model: Any,
    tokenizer: Any,
    context: Tensor,
    cache: Any,
    seconds: float,
    variant: Variant,
    questions: Sequence[_Question],
    reply_tokens: int | None,
) -> Row:
    replies = [_reply(model, tokenizer, cache, question, reply_tokens) for question in questions]
    _, decoding = _decode(model, None, cache, questions[0].prompt, TIMED)
    tokens = context.shape[1]
    return Row(
        label=variant.label,
        replies=replies,
        receipt=cache.report(),
        prefill_per_second=tokens / seconds,
        decode_per_second=(TIMED - 1) / decoding,
        survival=survival(cache, tokens).tolist(),
    )


def _reply(model: Any, tokenizer: Any, cache: Any, question: _Question, reply_tokens: int | None) -> Reply:
    log_probs = _forced(model, cache, question.prompt, question.answer)
    kl = (question.log_probs.exp() * (question.log_probs - log_probs)).sum(-1).mean()
    agreement = (log_probs.argmax(-1).cpu() == torch.tensor(question.answer)).float().mean()
    ids, _ = _decode(model, tokenizer, cache, question.prompt, reply_tokens or len(question.answer))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    right = ids == question.answer if question.known is None else question.known.strip() in text
    return Reply(text, right, float(agreement), max(float(kl), 0.0))


def _forced(model: Any, cache: Any, prompt: Tensor, answer: list[int]) -> Tensor:
    """(len(answer),V) float32 log probabilities of each token of ``answer``, given those before."""
    given = torch.tensor([answer[:-1]], dtype=prompt.dtype, device=prompt.device)
    ids = torch.cat([prompt, given], dim=1)
    out = model(input_ids=ids, past_key_values=cache.copy(), use_cache=True, logits_to_keep=len(answer))
    log_probs: Tensor = out.logits[0, -len(answer) :].float().log_softmax(-1)
    return log_probs


def _decode(model: Any, tokenizer: Any, cache: Any, prompt: Tensor, tokens: int) -> tuple[list[int], float]:
    """Greedy reply on a copy of ``cache``, and the seconds of its one-token steps; without tokenizer it never stops."""
    cache, fed, reply = cache.copy(), prompt, []
    start = 0.0
    while True:
        logits = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        reply.append(int(logits[0, -1].argmax()))
        start = start or _clock(model)
        if len(reply) == tokens or (tokenizer is not None and reply[-1] == tokenizer.eos_token_id):
            return reply, _clock(model) - start
        fed = torch.tensor([reply[-1:]], device=prompt.device)


def _ids(tokenizer: Any, text: str, model: Any) -> Tensor:
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)], device=model.device)


def _clock(model: Any) -> float:
    """Seconds, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
