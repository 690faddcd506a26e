"""A prompt that is read piece by piece, and compressed where it is to be."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keepkv.engine.cache import Cache
from keepkv.engine.passes.again import look_again
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.serve.batch.sampling import Drawn, scored

Pieces = Generator[None, None, Tensor]  # pauses between forwards; returns the logits (V,) behind the last token


def late(cache: Cache) -> Cache:
    """An empty ``cache`` whose prompt is compressed at its end, however it is read."""
    when = cache.settings.method.when
    return cache if when.prefill is None else cache.copy(when=replace(when, prefill="deferred"))


class Reader:
    """Reads prompts, ``chunk`` tokens at a time. scores: of the tokens read, where ``listed`` is how many alternatives
    each is told with; the first of all has none."""

    def __init__(self, model: Any, chunk: int, listed: int | None = None) -> None:
        self.model, self.chunk, self.listed = model, chunk, listed
        self.scores: list[Drawn | None] = []
        self._behind: Tensor | None = None

    def document(self, cache: Cache, tokens: Sequence[int], more: bool) -> Pieces:
        """Read ``tokens`` into the empty ``cache`` and compress them. more: what comes behind is kept whole."""
        method = cache.settings.method
        if more and method.when.prefill is None and method.name != "full":
            raise KeepKVError(
                f"method {method.name!r} compresses while a reply is written, and not a document that is kept for "
                "questions: ask for another method, or leave out split and context"
            )
        logits = yield from self.question(cache, tokens)
        if method.score.looks_again:
            look_again(self.model, cache, self._ids(tokens), chunk=min(max(2, self.chunk), 2048))
        if method.when.prefill is not None:
            cache.compress()
        if more:
            cache.compressing = False
        return logits

    def question(self, cache: Cache, tokens: Sequence[int]) -> Pieces:
        """Read ``tokens`` behind what ``cache`` holds."""
        logits = torch.empty(0)
        for start in range(0, len(tokens), self.chunk):
            if start:
                yield
            logits = self._read(cache, tokens[start : start + self.chunk])
        return logits

    def _read(self, cache: Cache, part: Sequence[int]) -> Tensor:
        ids, seen = self._ids(part), cache.get_seq_length()
        keep = 1 if self.listed is None else len(part)
        with cache.reading():
            out = self.model(
                input_ids=ids, position_ids=torch.arange(seen, seen + len(part), device=ids.device)[None],
                use_cache=True, logits_to_keep=keep, **{CACHE: cache},
            )  # fmt: skip
        logits: Tensor = out.logits[0]
        if self.listed is not None:
            self._score(part, logits)
        return logits[-1]

    def _score(self, part: Sequence[int], logits: Tensor) -> None:
        assert self.listed is not None
        for row, token in enumerate(part):
            before = logits[row - 1] if row else self._behind
            self.scores.append(None if before is None else scored(before, token, self.listed))
        self._behind = logits[-1].clone()

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.model.device)
