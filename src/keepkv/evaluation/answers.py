"""The scores of items, given the cache that holds their contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from keepkv.engine.cache import Cache
from keepkv.tasks.asking import Asked, Encoded, Ids, probability, reply, rows_of
from keepkv.tasks.scoring import Score, grade


def separately(
    model: Any, tokenizer: Any, cache: Cache, mask: Tensor, items: Sequence[Encoded], rows: int
) -> list[list[Score]]:
    """Each question on its own copy of its context's row, at most ``rows`` of them in one batch."""
    pairs = [(i, one) for i, item in enumerate(items) for one in item.asked]
    # Replies of like length go together; the order within an item is restored below.
    pairs.sort(key=lambda pair: (pair[1].question.judged, pair[1].limit))
    found: dict[int, Score] = {}
    for start in range(0, len(pairs), rows):
        chunk = pairs[start : start + rows]
        twin, own = rows_of(cache, mask, [i for i, _ in chunk])
        scores = ask(model, tokenizer, twin, own, [one for _, one in chunk])
        found |= {id(one): score for (_, one), score in zip(chunk, scores, strict=True)}
    return [[found[id(one)] for one in item.asked] for item in items]


def ask(model: Any, tokenizer: Any, cache: Cache, mask: Tensor, asked: Sequence[Asked]) -> list[Score]:
    """One question per row of ``cache``, which is advanced."""
    judged = [one.question.judged for one in asked]
    if all(judged):
        return [Score(value, False, "") for value in probability(model, cache, mask, asked)]
    if any(judged):
        raise TypeError("judged questions and others cannot be asked together")
    # Where a reply may be as long as it needs, its end is its own.
    end = tokenizer.eos_token_id if all(one.question.limit for one in asked) else None
    said, _ = reply(model, cache, mask, [one.prompt for one in asked], max(one.limit for one in asked), end)
    return [
        grade(tokenizer, one.question, one.answer, tokens[: one.limit])
        for one, tokens in zip(asked, said.tolist(), strict=True)
    ]


def in_turn(
    model: Any, tokenizer: Any, cache: Cache, mask: Tensor, items: Sequence[Encoded], rows: int
) -> list[list[Score]]:
    """The questions of each item as turns of one conversation, replies included."""
    scores: list[list[Score]] = []
    for start in range(0, len(items), rows):
        chunk = items[start : start + rows]
        live, (twin, own) = list(chunk), rows_of(cache, mask, range(start, start + len(chunk)))
        found: dict[int, list[Score]] = {id(item): [] for item in chunk}
        last: dict[int, Ids] = {id(item): [] for item in chunk}  # the end of the reply, which is not fed yet
        for turn in range(max(len(item.asked) for item in chunk)):
            kept = [i for i, item in enumerate(live) if turn < len(item.asked)]
            if len(kept) < len(live):
                live, (twin, own) = [live[i] for i in kept], rows_of(twin, own, kept)
            asked = [item.asked[turn] for item in live]
            prompts = [last[id(item)] + one.prompt for item, one in zip(live, asked, strict=True)]
            said, own = reply(model, twin, own, prompts, max(one.limit for one in asked))
            for item, one, tokens in zip(live, asked, said.tolist(), strict=True):
                found[id(item)].append(grade(tokenizer, one.question, one.answer, tokens[: one.limit]))
                last[id(item)] = tokens[-1:]
        scores += [found[id(item)] for item in chunk]
    return scores
