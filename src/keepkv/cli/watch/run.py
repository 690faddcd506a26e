"""Streams that watch the same frames and are asked the same questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from keepkv.errors import UnsupportedInput
from keepkv.video import VideoStream

FULL = "full"


@dataclass(frozen=True)
class Question:
    """expected: the right answer, where it is known."""

    text: str
    expected: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a watcher said. right: where the right answer is known."""

    question: Question
    text: str
    right: bool | None


@dataclass
class Watcher:
    """A stream with its policy. most: frames that it takes at all. frames, bytes: seen and held so far."""

    policy: str
    stream: VideoStream
    most: int | None = None
    frames: int = 0
    bytes: int = 0
    replies: list[Reply] = field(default_factory=list)

    @property
    def open(self) -> bool:
        """Whether it has taken all frames so far."""
        return self.most is None or self.frames <= self.most

    @property
    def right(self) -> int:
        """Questions answered right."""
        return sum(bool(reply.right) for reply in self.replies)

    def push(self, frames: Tensor) -> None:
        """Watch, as long as it can."""
        self.frames += len(frames)
        if self.open:
            self.bytes = self.stream.push(frames).bytes

    def ask(self, question: Question, form: Callable[[str], str], length: int) -> None:
        """Keep the answer, if it has seen all."""
        if self.open:
            said = str(self.stream.ask(form(question.text), max_new_tokens=length)).strip()
            right = None if question.expected is None else said.split()[:1] == [question.expected]
            self.replies.append(Reply(question, said, right))

    def survival(self, steps: int) -> list[float]:
        """Of each time step, the share of its slots that are held, over all layers and heads."""
        layers = self.stream.timeline()
        heads = self.stream.cache.compressible[0].store.view().positions.shape[1]
        whole = len(layers) * heads * self.stream.reader.cells
        return [sum(layer.get(step, 0) for layer in layers) / whole for step in range(steps)]


def watch(
    watchers: list[Watcher],
    blocks: Iterable[Tensor],
    due: Callable[[int, int], list[Question]],
    last: Sequence[Question] = (),
    form: Callable[[str], str] = str,
    length: int = 2,
) -> Iterator[Sequence[Question]]:
    """Push block after block into every watcher, and ask what is due then and last; yields what was asked.

    due: what is asked when so many frames have been seen, and so many before. form: what stands around a question.
    length: tokens of an answer at most.
    """
    seen = 0
    for frames in blocks:
        for one in watchers:
            one.push(frames)
        before, seen = seen, seen + len(frames)
        now = due(before, seen)
        _ask(watchers, now, form, length)
        yield now
    if not seen:
        raise UnsupportedInput("the video has no frames")
    for one in watchers:
        one.stream.flush()
    _ask(watchers, last, form, length)
    yield last


def _ask(watchers: list[Watcher], questions: Sequence[Question], form: Callable[[str], str], length: int) -> None:
    for question in questions:
        for one in watchers:
            one.ask(question, form, length)


def full_bytes(model: Any, tokens: int) -> int:
    """Of a plain cache of so many tokens, by formula: keys and values of every layer and KV head."""
    text = model.config.get_text_config(decoder=True)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = next(model.parameters()).element_size()
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * head * size * tokens)
