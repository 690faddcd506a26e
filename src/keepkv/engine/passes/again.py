"""What the method of a cache does between reading a text and compressing it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from keepkv.engine.cache import Cache
from keepkv.engine.passes.rehearse import rehearse
from keepkv.engine.passes.reread import reread


def look_again(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    questions: Sequence[Tensor | Sequence[int]] = (),
    chunk: int = 2048,
) -> None:
    """Read the text of ``cache`` a second time, rehearse ``questions``, or do nothing, as its score needs.

    cache, input_ids (B,T), attention_mask (B,T): as ``reread`` and ``rehearse`` take them. chunk: tokens reread at
    once.
    """
    score = cache.settings.method.score
    if score.needs_second_reading:
        reread(model, cache, input_ids, attention_mask, chunk=chunk)
    if score.needs_questions:
        rehearse(model, cache, input_ids, attention_mask, questions=questions)
