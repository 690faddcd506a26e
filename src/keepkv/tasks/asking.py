"""Reading contexts into a cache and asking questions of it, many rows at a time.

Everything that asks is here: a context is read once, and each question is put to a copy of its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keepkv.core.budget import Budget
from keepkv.core.survival import survival
from keepkv.tasks.base import Item, Question, TaskError
from keepkv.tasks.chat import Frame, frame

if TYPE_CHECKING:
    from keepkv.engine.cache import Cache

Ids = list[int]


@dataclass(frozen=True)
class Asked:
    """A question as token ids; ``limit``: tokens of the reply."""

    question: Question
    prompt: Ids
    answer: Ids
    limit: int


@dataclass(frozen=True)
class Encoded:
    """An item as token ids."""

    item: Item
    context: Ids
    asked: tuple[Asked, ...]

    def in_sight(self) -> list[Encoded]:
        """Each question by itself behind the context, all but its last token, which is left to be asked: what follows
        it is of what is kept then."""
        return [
            replace(self, context=self.context + one.prompt[:-1], asked=(replace(one, prompt=one.prompt[-1:]),))
            for one in self.asked
        ]


def encode(tokenizer: Any, item: Item, slack: int = 0) -> Encoded:
    """``item`` behind the start token and inside the chat template of the tokenizer, where it has them. slack: tokens
    that a reply may have beyond those of its answer."""
    around = Frame() if item.framed else frame(tokenizer)
    asked = []
    for question in item.questions:
        prompt = tokenizer.encode(around.between + question.prompt + around.end, add_special_tokens=False)
        answer = tokenizer.encode(question.answer, add_special_tokens=False)
        asked.append(Asked(question, prompt, answer, question.limit or len(answer) + slack))
    context = tokenizer.encode(around.before + item.context, add_special_tokens=not (around.before or item.framed))
    return Encoded(item, context, tuple(asked))


def likely(tokenizer: Any, questions: Sequence[tuple[str, str]]) -> list[Ids]:
    """Questions with the beginnings of replies, as they would be fed behind a context."""
    around = frame(tokenizer)
    prompts = (around.between + question + around.end + reply for question, reply in questions)
    return [tokenizer.encode(text, add_special_tokens=False) for text in prompts]


def pad(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B,T) int64 each, padded on the left."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def step(model: Any, cache: Any, ids: Tensor, mask: Tensor, keep: int = 1) -> Tensor:
    """Logits (B,keep,V) of a forward of ``ids`` (B,T); ``mask`` (B, all columns so far). Advances ``cache``."""
    from keepkv.engine.places import text_places  # with the engine, which who only reads tasks does not need
    from keepkv.engine.versions import CACHE

    positions = text_places(cache, mask, ids.shape[1])
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True,
        logits_to_keep=keep,
    )  # fmt: skip
    logits: Tensor = out.logits
    return logits


def read(model: Any, cache: Any, rows: Sequence[Ids]) -> Tensor:
    """Feed one context per row; returns their mask (B,T)."""
    ids, mask = pad(rows, model.device)
    step(model, cache, ids, mask)
    return mask


def greedy(model: Any, cache: Any, mask: Tensor, ids: Tensor) -> Iterator[Tensor]:
    """The most likely tokens (B,) after ``ids`` (B,T), one after the other, without end. mask: (B, all columns, those
    of ``ids`` too). Advances ``cache`` by what is fed: a token is fed when the next one is asked for."""
    while True:
        said = step(model, cache, ids, mask)[:, -1].argmax(-1)
        yield said
        ids = said[:, None]
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)


def reply(
    model: Any, cache: Any, mask: Tensor, asked: Sequence[Ids], limit: int, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy replies (B,limit) to one prompt per row, and the mask after them; shorter where every row has said the
    token ``end``. Advances ``cache``; the last token of the replies is not fed any more. Raises ``TaskError`` for an
    empty prompt."""
    if not all(asked):
        raise TaskError("a question without a prompt has nothing to be answered after; a continuation is judged=True")
    ids, new = pad(asked, model.device)
    mask = torch.cat((mask, new), dim=1)
    said: list[Tensor] = []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for token in greedy(model, cache, mask, ids):
        said.append(token)
        if end is not None:
            ended |= token == end
        if len(said) == limit or bool(ended.all()):
            break
    replies = torch.stack(said, dim=1)
    return replies, torch.cat((mask, torch.ones_like(replies[:, 1:])), dim=1)


def probability(model: Any, cache: Cache, mask: Tensor, asked: Sequence[Asked]) -> list[float]:
    """Geometric mean probability of the tokens of each row's answer. The first token of an answer without a prompt is
    left out: nothing is fed here that it follows. Advances ``cache``."""
    ids, new = pad([one.prompt + one.answer for one in asked], model.device)
    most = max(len(one.answer) for one in asked)
    logits = step(model, cache, ids, torch.cat((mask, new), dim=1), keep=min(most + 1, ids.shape[1]))
    found = []
    for row, one in enumerate(asked):
        known = one.answer if one.prompt else one.answer[1:]
        guess = logits[row, -len(known) - 1 : -1].double().log_softmax(-1)
        target = torch.tensor(known, device=guess.device)
        found.append(float(guess.gather(-1, target[:, None]).mean().exp()))
    return found


def compressed(cache: Cache, budget: Budget | float | int | str) -> Cache:
    """A copy of ``cache``, which holds whole contexts, within ``budget``; it compresses no more."""
    twin = cache.copy(budget=budget)
    twin.compress()
    twin.compressing = False
    return twin


def survival_of(cache: Cache, tokens: int) -> Tensor:
    """(B,tokens) float64: the share of (layer, KV head) that still hold each token; see ``survival``. Layers that
    ``cache`` does not compress are left out."""
    return survival([cache.kept_positions(layer.info.index) for layer in cache.compressible], tokens)


def rows_of(cache: Cache, mask: Tensor, rows: Sequence[int]) -> tuple[Cache, Tensor]:
    """A copy of ``cache`` that holds its rows ``rows``, repeats included, and compresses no more; and its mask."""
    twin = cache.copy()
    twin.compressing = False
    index = torch.tensor(rows, device=mask.device)
    twin.batch_select_indices(index)
    return twin, mask[index]
