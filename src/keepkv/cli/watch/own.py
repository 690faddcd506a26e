"""A user's own video and model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv.cli.watch.run import Question
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.video.family import Family, Sectioned
from keepkv.video.frames import frames_of

BLOCK = 16  # frames that are decoded before they are pushed


def blocks(path: str, every: int) -> Iterator[Tensor]:
    """Frames of a file, one of ``every``, some at a time. Raises ``UnsupportedInput`` where there is no file."""
    if not Path(path).is_file():
        raise UnsupportedInput(f"no video file {path!r}")
    return _some_at_a_time(islice(frames_of(path), 0, None, every))


def _some_at_a_time(frames: Iterator[Tensor]) -> Iterator[Tensor]:
    while block := list(islice(frames, BLOCK)):
        yield torch.stack(block)


def asked(questions: list[str], every: int | None) -> Callable[[int, int], list[Question]]:
    """All ``questions`` after each ``every`` frames, if that is given."""

    def due(before: int, now: int) -> list[Question]:
        return [Question(text) for text in questions] if every and before // every != now // every else []

    return due


def around(processor: Any, family: Family) -> tuple[str, Callable[[str], str]]:
    """What the chat template of a model puts before the frames; and around a question, behind them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not getattr(processor, "chat_template", None) and not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token or "", str
    place = tokenizer.convert_ids_to_tokens(family.token)
    kind = "video" if isinstance(family, Sectioned) else "image"

    def parts(question: str) -> tuple[str, str]:
        turn = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}
        said = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        before, found, behind = said.partition(place)
        if not found:
            raise KeepKVError(
                f"the chat template of this model has no {place!r} where a {kind} stands: use keepkv.VideoStream, "
                "where what stands around frames is yours to write"
            )
        return before, behind

    before, _ = parts("")
    return before, lambda question: parts(question)[1]
