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
from keepkv.evaluation.unit import look_again
from keepkv.measure.meters import Time
from keepkv.metrics import kl
from keepkv.tasks.asking import Ids, greedy, pad, read, reply, rows_of, step, survival_of

TIMED = 32  # tokens decoded to measure decoding speed


@dataclass(frozen=True)
class Asked:
    """A question as text that continues the context, with what a template puts around it; ``answer`` is ``None`` where
    no answer is known. words: the question alone."""

    prompt: str
    answer: str | None = None
    words: str = ""


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
class _Question:
    prompt: Ids
    answer: Ids  # tokens of the reference answer
    known: str | None
    logits: Tensor  # (len(answer),V) of the full cache


@dataclass(frozen=True)
class _Reading:
    """A cache that holds the context, compressed and closed to further compression, its mask, and seconds it took."""

    model: Any
    tokenizer: Any
    label: str
    cache: Any
    mask: Tensor
    seconds: float

    @classmethod
    def of(cls, model: Any, tokenizer: Any, context: Ids, variant: Variant, budget: int | float | str) -> _Reading:
        cache = keepkv.Cache(model, method=variant.method, budget=budget, **variant.options)
        if twice := cache.settings.method.score.looks_again:
            cache = cache.copy(when=keepkv.When("deferred"))
        with Time(model.device) as time:
            mask = read(model, cache, [context])
            if twice:
                look_again(model, cache, [context])
                cache.compress()
        cache.compressing = False
        return cls(model, tokenizer, variant.label, cache, mask, time.seconds)

    def reference(self, asked: Asked, tokens: int | None) -> _Question:
        """A question with its reference answer: the known one, or what this cache replies."""
        prompt = self.tokenizer.encode(asked.prompt, add_special_tokens=False)
        if asked.answer is None:
            answer = self.answer(prompt, tokens or TIMED)
        else:
            answer = self.tokenizer.encode(asked.answer, add_special_tokens=False)
        return _Question(prompt, answer, asked.answer, self.forced(prompt, answer))

    def compared(self, context: Ids, questions: Sequence[_Question], tokens: int | None) -> Compared:
        return Compared(
            label=self.label,
            replies=[self.reply(question, tokens or len(question.answer)) for question in questions],
            receipt=self.cache.report(),
            prefill_per_second=len(context) / self.seconds,
            decode_per_second=self.decode_per_second(questions[0].prompt),
            survival=survival_of(self.cache, len(context))[0].tolist(),
        )

    def reply(self, question: _Question, tokens: int) -> Reply:
        logits = self.forced(question.prompt, question.answer)
        ids = self.answer(question.prompt, tokens)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        right = ids == question.answer if question.known is None else question.known.strip() in text
        agreement = (logits.argmax(-1).cpu() == torch.tensor(question.answer)).float().mean()
        return Reply(text, right, float(agreement), float(kl(question.logits, logits).mean()))

    def answer(self, prompt: Ids, tokens: int) -> Ids:
        """A greedy reply of ``tokens`` at most."""
        twin, mask = rows_of(self.cache, self.mask, [0])
        said: Ids = reply(self.model, twin, mask, [prompt], tokens, self.tokenizer.eos_token_id)[0][0].tolist()
        return said

    def forced(self, prompt: Ids, answer: Ids) -> Tensor:
        """Logits (len(answer),V) of each token of ``answer``, given those before."""
        twin, ids, mask = self._before(prompt + answer[:-1])
        return step(self.model, twin, ids, mask, keep=len(answer))[0]

    def decode_per_second(self, prompt: Ids) -> float:
        """Tokens per second of one-token steps after ``prompt``."""
        twin, ids, mask = self._before(prompt)
        said = greedy(self.model, twin, mask, ids)
        next(said)  # feeds the prompt
        with Time(self.model.device) as time:
            for token in islice(said, TIMED - 1):
                int(token)  # as everything does that streams
        return (TIMED - 1) / time.seconds

    def _before(self, prompt: Ids) -> tuple[Any, Tensor, Tensor]:
        """A copy of the cache, the tokens (1,T) to feed it, and the mask with them."""
        twin, mask = rows_of(self.cache, self.mask, [0])
        ids, new = pad([prompt], self.model.device)
        return twin, ids, torch.cat((mask, new), dim=1)


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
        full = _Reading.of(model, tokenizer, context, FULL, 1.0)
    questions = [full.reference(one, reply_tokens) for one in asked]
    found = [full.compared(context, questions, reply_tokens)]
    for variant in variants:
        step(variant.label)
        reading = _Reading.of(model, tokenizer, context, variant, budget)
        found.append(reading.compared(context, questions, reply_tokens))
    return found
