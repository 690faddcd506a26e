"""Texts to train on: lines of a file, or a task of ours as generated data; and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv import tasks
from keepkv.errors import KeepKVError, UnknownName
from keepkv.evaluation.setup import HELD_OUT
from keepkv.measure.files import text_of
from keepkv.measure.rows import object_of
from keepkv.tasks.asking import Asked, Ids, encode

KEYS = ("context", "prompt", "reply")


@dataclass(frozen=True)
class Text:
    """One text, as token ids. read: is read at once and compressed, as a prompt is. rest: is decoded behind it. graded:
    of the rest, which tokens the model is to learn to say. name: for messages."""

    read: Ids
    rest: Ids
    graded: tuple[bool, ...]
    name: str

    @property
    def tokens(self) -> int:
        """How many it has."""
        return len(self.read) + len(self.rest)


def from_file(tokenizer: Any, path: Path) -> list[Text]:
    """Texts of a file of JSON lines {"prompt": …, "reply": …}. Where a line has a "context" too, that is what is read
    and compressed, and the prompt follows it. The end token is put behind each reply.

    Raises ``KeepKVError`` which names the line that is no such text.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for number, text in enumerate(text_of(path).split("\n"), 1):
        if not text.strip():
            continue
        name = f"{path.name}, line {number}"
        context, prompt, reply = three(object_of(text, name), name)
        asked = _plain(tokenizer, prompt) if context else []
        said = [*_plain(tokenizer, reply), *end]
        graded = (False,) * len(asked) + (True,) * len(said)
        found.append(Text(tokenizer.encode(context or prompt), [*asked, *said], graded, name))
    if not found:
        raise KeepKVError(f"no texts in {str(path)!r}: each line is one, as JSON")
    return found


def from_task(
    tokenizer: Any, name: str, length: int, items: int, seed: int, options: dict[str, Any], together: bool = False
) -> list[Text]:
    """``of_seeds`` for ``items`` items; seed: of the first. Raises ``KeepKVError`` for those that evaluations ask."""
    if seed + items > HELD_OUT:
        raise KeepKVError(f"seeds {seed} to {seed + items - 1}: from {HELD_OUT} on, items are for evaluation")
    return of_seeds(tokenizer, name, length, range(seed, seed + items), options, together)


def of_seeds(
    tokenizer: Any, name: str, length: int, seeds: Sequence[int], options: dict[str, Any], together: bool = False
) -> list[Text]:
    """A text for each question of the items ``seeds`` of the task ``name``, of ``length`` tokens. The context is what
    is read and compressed; of a task with long replies the question, too, but for its last token, as evaluations do.
    together: one text for each item, all its questions and answers in a row."""
    task, found = tasks.get(name), []
    for at in seeds:
        item = encode(tokenizer, task.generate(tokenizer, length, at, **options))
        groups = [list(item.asked)] if together else [[one] for one in item.asked]
        texts = [_of_task(item.context, asked, f"{name}, seed {at}") for asked in groups]
        found += [_in_sight(one) for one in texts] if task.decodes else texts
    return found


@dataclass(frozen=True)
class Batch:
    """Texts side by side: input_ids and attention_mask (B,T) int64, what is read padded on the left, the rest on the
    right. read: columns that are read at once. graded (B,W) bool: which of the last W columns are to be learnt, so that
    logits W + 1 columns from the end foretell the first of them. names: of the texts."""

    input_ids: Tensor
    attention_mask: Tensor
    read: int
    graded: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same, on ``device``."""
        moved = (x.to(device) for x in (self.input_ids, self.attention_mask, self.graded))
        ids, mask, graded = moved
        return Batch(ids, mask, self.read, graded, self.names)


def batch(texts: Sequence[Text], padding: int = 0) -> Batch:
    """``texts`` as a batch; padding: id of the token that pads."""
    read, rest = max(len(one.read) for one in texts), max(len(one.rest) for one in texts)
    sides = [(read - len(one.read), rest - len(one.rest)) for one in texts]
    ids = [[padding] * a + one.read + one.rest + [padding] * b for one, (a, b) in zip(texts, sides, strict=True)]
    mask = [[0] * a + [1] * one.tokens + [0] * b for one, (a, b) in zip(texts, sides, strict=True)]
    graded = [[*one.graded, *[False] * b] for one, (_, b) in zip(texts, sides, strict=True)]
    return Batch(torch.tensor(ids), torch.tensor(mask), read, torch.tensor(graded), tuple(one.name for one in texts))


def _of_task(context: Ids, asked: Sequence[Asked], name: str) -> Text:
    rest = [token for one in asked for token in (*one.prompt, *one.answer)]
    graded = [flag for one in asked for flag in [False] * len(one.prompt) + [True] * len(one.answer)]
    return Text(context, rest, tuple(graded), name)


def _in_sight(text: Text) -> Text:
    """``text`` with what comes before the first token to be learnt in what is read, but for one token."""
    more = text.graded.index(True) - 1
    return Text(text.read + text.rest[:more], text.rest[more:], text.graded[more:], text.name)


def three(line: dict[str, Any], name: str) -> tuple[str, str, str]:
    """Context, prompt and reply of a line."""
    for key in line:
        if key not in KEYS:
            raise UnknownName(f"key in {name}:", key, KEYS)
    given = [line.get(key, "") for key in KEYS]
    if not all(isinstance(one, str) for one in given) or not (given[1] and given[2]):
        raise KeepKVError(f'{name}: a text is {{"prompt": "…", "reply": "…"}}, both of them text that is not empty')
    context, prompt, reply = given
    return context, prompt, reply


def _plain(tokenizer: Any, text: str) -> Ids:
    ids: Ids = tokenizer.encode(text, add_special_tokens=False)
    return ids
