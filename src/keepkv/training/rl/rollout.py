"""Rollouts: replies drawn with a compressing cache, with what left it and how likely each token was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from keepkv.engine.cache import Cache
from keepkv.engine.versions import CACHE
from keepkv.training.record import Record
from keepkv.training.recorder import record


@dataclass(frozen=True)
class Rollout:
    """Replies of a batch, as long as they are up to their end token.

    logps: log-probability of each token when it was drawn, at the temperature. record: what left the cache, of the
    prompts padded on the left and the replies.
    """

    replies: list[list[int]]
    logps: list[list[float]]
    record: Record


class NotANumber(Exception):
    """A model's logits are not numbers. row: of the first reply in which they are not."""

    def __init__(self, row: int) -> None:
        super().__init__(f"logits of row {row} are not numbers")
        self.row = row


class Heard(LogitsProcessor):
    """Notes how likely the tokens are that ``generate`` draws, one step behind it: no logits are kept but the last."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._next: Tensor | None = None
        self._said: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = scores.isnan().any(-1)
        if bool(bad.any()):
            raise NotANumber(int(bad.long().argmax()))
        self._hear(input_ids)
        self._next = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def of(self, ids: Tensor) -> Tensor:
        """(B,T) float32 of the tokens that were drawn; ids (B, columns): what ``generate`` returned."""
        self._hear(ids)
        return torch.stack(self._said, dim=1)

    def _hear(self, ids: Tensor) -> None:
        if self._next is not None:
            self._said.append(self._next.gather(-1, ids[:, -1:])[:, 0])


def roll(model: Any, cache: Cache, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Rollout:
    """One reply to each of ``prompts`` (token ids), drawn as ``config`` says with ``cache``, which is empty.

    model: in evaluation mode meanwhile, as dropout would make tokens likely that the policy does not. Raises
    ``NotANumber`` where no token can be drawn.
    """
    ids, mask = _padded(prompts, int(config.pad_token_id), model.device)
    heard, recorder, training = Heard(config.temperature), record(cache), model.training
    model.eval()
    try:
        given = {"input_ids": ids, "attention_mask": mask, CACHE: cache}
        text = model.generate(**given, generation_config=config, logits_processor=LogitsProcessorList([heard]))
    finally:
        model.train(training)
    said, logps = text[:, ids.shape[1] :], heard.of(text)
    ends = torch.isin(said, torch.tensor(config.eos_token_id, device=said.device))
    before = ends.cumsum(-1) - ends.long() == 0  # up to the first end token, and with it
    return Rollout(
        [row[keep].tolist() for row, keep in zip(said, before, strict=True)],
        [row[keep].tolist() for row, keep in zip(logps, before, strict=True)],
        recorder.take(),
    )


def _padded(rows: Sequence[Sequence[int]], empty: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B,T) int64 each, padded on the left."""
    width = max(map(len, rows))
    ids = [[empty] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
