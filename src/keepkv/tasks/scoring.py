"""How a reply is scored: the same rule for every task, by what its question asks for."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from keepkv.metrics.rouge import rouge_l
from keepkv.tasks.asking import read, reply
from keepkv.tasks.base import Item, Question


@dataclass(frozen=True)
class Score:
    """One reply. value in [0, 1]: see ``Question``; correct: the value is 1; leaked: the reply has what it must not;
    loose: the value where the checks are loose, None without checks."""

    value: float
    leaked: bool
    reply: str
    loose: float | None = None

    @property
    def correct(self) -> bool:
        """Whether everything asked for is there."""
        return self.value == 1.0


def grade(tokenizer: Any, question: Question, answer: list[int], reply: list[int]) -> Score:
    """``answer`` and ``reply`` as token ids: what was to be said and what was said."""
    end = getattr(tokenizer, "eos_token_id", None)
    if question.limit and end in reply:  # in a batch the others go on
        reply = reply[: reply.index(end)]
    text = tokenizer.decode(reply, skip_special_tokens=True)
    if question.stop:
        text = text.split(question.stop)[0]
    loose = None
    if question.checks:
        said, checks = text.strip(), question.checks
        value = sum(check.strict(said) for check in checks) / len(checks)
        loose = sum(check.loose(said) for check in checks) / len(checks)
    elif question.metric is not None:
        value = question.metric(text)
    elif question.values:
        value = sum(part in text for part in question.values) / len(question.values)
    elif question.graded:
        same = (mine == theirs for mine, theirs in zip(answer, reply, strict=False))
        value = next((i for i, right in enumerate(same) if not right), min(len(answer), len(reply))) / len(answer)
    else:
        value = float(reply[: len(answer)] == answer)
    return Score(value, leaks(question, text), text, loose)


def leaks(question: Question, reply: str) -> bool:
    """Whether ``reply`` tells what the question forbids."""
    if not question.forbidden:
        return False
    if question.recall is None:
        return question.forbidden in reply
    return rouge_l(question.forbidden, reply) > question.recall


@torch.inference_mode()
def score(model: Any, tokenizer: Any, cache: Any, question: Question) -> Score:
    """Asks one question of a ``cache`` that holds a context (batch 1), and decodes as many tokens as the answer has,
    or up to the question's limit.

    ``cache`` is advanced by the question and the reply: give a copy when it is needed again.
    """
    prompt = tokenizer.encode(question.prompt, add_special_tokens=False)
    answer = tokenizer.encode(question.answer, add_special_tokens=False)
    seen = torch.ones(1, cache.get_seq_length(), dtype=torch.int64, device=model.device)
    end = getattr(tokenizer, "eos_token_id", None) if question.limit else None
    said, _ = reply(model, cache, seen, [prompt], question.limit or len(answer), end)
    return grade(tokenizer, question, answer, said[0].tolist())


@torch.inference_mode()
def score_item(model: Any, tokenizer: Any, item: Item, cache: Any = None) -> list[Score]:
    """One score per question, each asked on its own copy of the context's cache.

    ``cache`` is an empty cache to read the context into (a compressing one, say); by default a plain one.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else cache
    read(model, cache, [tokenizer.encode(item.context)])
    return [score(model, tokenizer, copy.deepcopy(cache), question) for question in item.questions]
