"""Benchmarks of others: their records become items, in order, with their own prompts and metrics.

A record of a file is an item, and the seed says which: ``seed`` modulo ``DRAW``, the distance between the seeds at
which the draws of an evaluation start. Contexts longer than asked lose their middle, as LongBench's own script does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.tasks.base import Item, Question, Task, TaskError, counter
from keepkv.tasks.files.records import FOLDER, Record, Records, read

DRAW = 100_000


@dataclass(frozen=True)
class Benchmark:
    """A family of data sets in one format.

    parts: names of its data sets, and of their files; empty: there is only one. make(record, part): the item.
    hub(part): data set on the Hugging Face hub, its configuration and split, where it is known to be there. sees:
    records name pictures. load(path, part): the records of a file.
    """

    name: str
    summary: str
    make: Callable[[Record, str], Item] = field(repr=False)
    hub: Callable[[str], tuple[str, str | None, str]] = field(repr=False)
    parts: tuple[str, ...] = ()
    decodes: bool = False
    sees: bool = False
    load: Callable[[str, str], Records] = field(default=read, repr=False)


@dataclass(frozen=True)
class FileTask(Task):
    """A data set as a task. records: what ``make`` makes the items of; source: the file or the data set of a hub."""

    records: Records = field(default=(), repr=False)
    make: Callable[[Record], Item] = field(default=lambda record: Item("", ()), repr=False)
    source: str = field(default="", repr=False)

    @property
    def size(self) -> int:
        return len(self.records)

    def generate(self, tokenizer: Any, length: int, seed: int = 0, *, plain: bool = False, **options: Any) -> Item:
        """The item of record ``seed`` modulo ``DRAW``, its context cut to ``length`` tokens in the middle.

        ``plain`` changes nothing: the wording is the benchmark's.
        """
        if options:
            raise TaskError(f"{self.name} takes no options; given: {', '.join(options)}")
        index = seed % DRAW
        if index >= len(self.records):
            raise TaskError(f"{self.name} has {len(self.records)} items, and item {index + 1} was asked: ask for fewer")
        item = self.item(index)
        if item.pictures:
            if (tokens := counter(tokenizer)(item.context) if hasattr(tokenizer, "encode") else 0) > length:
                raise TaskError(
                    f"record {index + 1} of {self.name} has {tokens} tokens with its pictures, and {length} were asked "
                    "for: give longer contexts or smaller pictures"
                )
            return item
        return replace(item, context=cut(tokenizer, item.context, length))

    def item(self, index: int) -> Item:
        """The item of one record, at full length."""
        try:
            return self.make(self.records[index])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, KeepKVError):
                raise
            said = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise TaskError(
                f"record {index + 1} of {self.source!r} is not one of {self.name}: {said}; its fields are "
                f"{', '.join(x for x in self.records[index] if x != FOLDER)}. Is it the file of another benchmark?"
            ) from error


def cut(tokenizer: Any, text: str, length: int) -> str:
    """``text`` of at most ``length`` tokens: the first and the last ones, where there are more."""
    if not hasattr(tokenizer, "encode"):
        if tokenizer(text) <= length:
            return text
        low, high = 0, len(text) // 2
        while low < high:
            half = (low + high + 1) // 2
            low, high = (half, high) if tokenizer(text[:half] + text[-half:]) <= length else (low, half - 1)
        return text[:low] + text[len(text) - low :]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= length:
        return text
    for kept in range(length, 0, -1):  # the two halves may tokenise otherwise where they meet
        head, tail = ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]
        made = tokenizer.decode(head, skip_special_tokens=True) + tokenizer.decode(tail, skip_special_tokens=True)
        if counter(tokenizer)(made) <= length:
            return str(made)
    return ""


def question(
    prompt: str, answers: list[Any], metric: Callable[[str, Any], float], limit: int, *, first_line: bool = False
) -> Question:
    """A question whose reply has the best of its ``metric`` over ``answers``; of its first line alone where asked."""
    if not answers:
        raise ValueError("no answer")

    def best(reply: str) -> float:
        said = reply.lstrip("\n").split("\n")[0] if first_line else reply
        return max(metric(said, answer) for answer in answers)

    return Question(prompt, f" {answers[0]}", metric=best, limit=limit)
