"""Teacher-forced text through a compressing cache, without gradients: what leaves when, for a replay with gradients.

The paper simulates its selection inside the masked forward (arXiv 2512.00504, §10.3 of our specification), once for
every method, and near ties in float32 fall otherwise than in a real cache. Here the text goes through a real one: any
method works, the selection is exactly what generation would choose, and a recomputation by gradient checkpointing
cannot choose anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from keepkv.engine.cache import Cache
from keepkv.engine.layer import HELD
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedInput
from keepkv.training.record import Record
from keepkv.training.recorder import record


@torch.no_grad()
def feed(model: nn.Module, cache: Cache, input_ids: Tensor, attention_mask: Tensor, read: int) -> Record:
    """The record of ``input_ids`` (B,T), of which the first ``read`` columns are read at once and the others decoded,
    as if the model had written them. For ``replay`` of the same text.

    cache: a fresh one, which is used up. attention_mask (B,T): 0 for padding: on the left of what is read, on the left
    of what is decoded, and behind the end of a row, where the row goes on as one that ended does in ``generate``.
    The model is in evaluation mode meanwhile.

    Tokens between two compressions are fed together where the score does not follow each of them.
    Raises ``UnsupportedInput`` where nothing would be read, and what ``record`` raises.
    """
    columns = input_ids.shape[1]
    if not 0 < read <= columns:
        raise UnsupportedInput(f"feed(read={read}) of {columns} columns: give at least one, and no more than there are")
    recorder, mask = record(cache), _going_on(attention_mask)
    with evaluating(model):
        with cache.reading():
            _forward(model, cache, input_ids, mask, 0, read)
        start, size = read, _block(cache, mask[:, read:])
        if size > 1:
            cache.activate_past_recording()  # or several tokens are taken for a prompt
        while start < columns - 1:  # nothing comes behind the last token
            end = min(start + size, columns - 1)
            _forward(model, cache, input_ids, mask, start, end)
            start = end
            if not cache.settings.method.when.recurs:
                break
    return recorder.take().wide(columns)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every part of ``model`` is in evaluation mode; afterwards each is as it was."""
    training = [one for one in model.modules() if one.training]
    model.eval()
    try:
        yield
    finally:
        for one in training:
            one.training = True


def _going_on(mask: Tensor) -> Tensor:
    """``mask`` (B,T) with ones behind the end of each row."""
    behind = mask.flip(-1).cumsum(-1).flip(-1) == 0
    return mask.masked_fill(behind, 1)


def _block(cache: Cache, decoded: Tensor) -> int:
    """How many tokens can be fed at a time, of ``decoded`` (B,n) bool, so that compressions come when they are due."""
    method = cache.settings.method
    every, alone = method.when.every, method.score.follows_decode or method.when.cap is not None
    if every is None or alone or not bool(decoded.all()):
        return 1
    return max(n for n in range(1, min(every, HELD) + 1) if every % n == 0)


def _forward(model: nn.Module, cache: Cache, ids: Tensor, mask: Tensor, start: int, end: int) -> None:
    seen = mask[:, :end]
    places = (seen.cumsum(-1) - 1)[:, start:].clamp(min=0)
    model(
        input_ids=ids[:, start:end], attention_mask=seen, position_ids=places, **{CACHE: cache}, use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
