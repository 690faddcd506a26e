"""Prompts to reply to: questions of a task of ours, or lines of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepkv import tasks
from keepkv.errors import KeepKVError
from keepkv.evaluation.setup import HELD_OUT
from keepkv.measure.files import text_of
from keepkv.measure.rows import object_of
from keepkv.tasks.asking import Asked, encode
from keepkv.training import texts
from keepkv.training.config import Data

Column = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """rows: what TRL is given, each with ``prompt``, ``answer`` and ``item``. asked: the questions that ``item``
    counts; of a file there are none."""

    rows: list[Column]
    asked: tuple[Asked, ...] = ()

    @property
    def longest(self) -> int | None:
        """Tokens of the longest answer, and one to end it; None for a file."""
        return max(one.limit for one in self.asked) + 1 if self.asked else None


def prompts_of(data: Data, tokenizer: Any) -> Prompts:
    """The prompts of ``data``. Raises ``KeepKVError`` for tasks without single questions, for items that are for
    evaluation, and where no prompt is left."""
    if data.together:
        raise KeepKVError("data: together=True, and replies are drawn to one prompt at a time: give false")
    path = Path(data.source).expanduser()
    is_file = path.suffix in (".jsonl", ".json", ".gz") or path.is_file()
    found = _from_file(path, tokenizer) if is_file else _from_task(data, tokenizer)
    if data.longest is None:
        return found
    kept = [row for row in found.rows if len(tokenizer.encode(_text(row))) <= data.longest]
    if not kept:
        raise KeepKVError(f"data: each of {len(found.rows)} prompts is longer than {data.longest} tokens")
    return Prompts(kept, found.asked)


def _from_task(data: Data, tokenizer: Any) -> Prompts:
    """The questions of a task, each behind its context."""
    task = tasks.get(data.source)
    if task.turns or not task.asks:
        raise KeepKVError(f"task {task.name!r} has no questions that are asked one at a time: choose another")
    if data.seed + data.items > HELD_OUT:
        raise KeepKVError(
            f"seeds {data.seed} to {data.seed + data.items - 1}: from {HELD_OUT} on, items are for evaluation"
        )
    rows: list[Column] = []
    asked: list[Asked] = []
    for seed in range(data.seed, data.seed + data.items):
        item = encode(tokenizer, task.generate(tokenizer, data.length, seed, **data.options))
        if item.item.framed or any(one.question.judged for one in item.asked):
            raise KeepKVError(f"task {task.name!r} has no replies that could be drawn and scored: choose another")
        for one in item.asked:
            question = one.question
            rows.append(_row(item.item.context + question.prompt, question.answer, len(asked), tokenizer))
            asked.append(one)
    return Prompts(rows, tuple(asked))


def in_order(rows: Sequence[Column], many: int, seed: int) -> list[Column]:
    """``many`` of ``rows``, each as often as any other but for one time, shuffled: the whole course of a training, so
    that one that goes on after a kill meets the same prompts."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < many:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order[:many]]


def _from_file(path: Path, tokenizer: Any) -> Prompts:
    """Lines of {"prompt": …, "reply": …}, as other trainings read them: the reply is the right answer. A context stands
    before the prompt."""
    rows: list[Column] = []
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        name = f"{path.name}, line {number}"
        context, prompt, answer = texts.three(object_of(line, name), name)
        rows.append(_row(context + prompt, answer, len(rows), tokenizer))
    if not rows:
        raise KeepKVError(f"no prompts in {str(path)!r}: each line is one, as JSON")
    return Prompts(rows)


def _text(row: Column) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[0]["content"])


def _row(prompt: str, answer: str, item: int, tokenizer: Any) -> Column:
    chat = bool(getattr(tokenizer, "chat_template", None))
    return {"prompt": [{"role": "user", "content": prompt}] if chat else prompt, "answer": answer, "item": item}
