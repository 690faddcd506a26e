"""Questions that may come, read behind the text before it is compressed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.cache import Cache
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.reread import check_whole, feed, watching
from keepkv.score.rehearsed import NAMES, Listen


@torch.no_grad()
def rehearse(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    questions: Sequence[Tensor | Sequence[int]] = (),
    pieces: int = 8,
    piece: int = 64,
) -> None:
    """Let the method of ``cache`` see what queries may come: for ``"keepkv2"`` with ``rehearsed=True``.

    cache: has read ``input_ids`` and was not compressed since, so its method has ``when=keepkv.When("deferred")``. It
        remembers the queries until it is compressed; what was rehearsed before is forgotten.
    input_ids (B,T), attention_mask (B,T): all that was fed, as it was fed; padding on the left.
    questions: token ids of what may be asked, as it would be fed behind the text, with the template of the chat and, if
        it can be guessed, the beginning of a reply. Not the very questions, if these are not known yet: any of their
        kind. A dozen will do.
    pieces: of the text itself, ``piece`` tokens each, evenly spread, that are read again.

        cache = keepkv.Cache(model, "keepkv2", budget=0.1, rehearsed=True, when=keepkv.When("deferred"))
        model(input_ids=context, past_key_values=cache)
        keepkv.rehearse(model, cache, context, questions=[tokenizer.encode(text) for text in likely])
        cache.compress()

    Each is read by itself on a copy of the cache: the time of as many short forwards, and the memory of the copy.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    method = cache.plan.method
    if not method.score.rehearses:
        raise KeepKVError(
            f"method {method.name!r} does not look at questions before they are asked; 'keepkv2' with rehearsed=True "
            "does"
        )
    check_whole(cache, input_ids, mask, "rehearse")
    texts = [_as_rows(ids, input_ids) for ids in questions] + _pieces(input_ids, mask, pieces, piece)
    if not texts:
        raise KeepKVError("rehearse(questions=(), pieces=0): give questions, pieces of the text to read again, or both")
    heard: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in cache._ours]
    for ids in texts:
        twin = watching(cache, score=Listen())
        feed(model, twin, ids, mask)
        for layer, mine in zip(twin._ours, heard, strict=True):
            for name in NAMES:
                mine[name].append(layer.state[name])
    for layer, mine in zip(cache._ours, heard, strict=True):
        layer.state |= {name: torch.cat(found, dim=1 + (found[0].dim() > 2)) for name, found in mine.items()}


def _as_rows(ids: Tensor | Sequence[int], like: Tensor) -> Tensor:
    """One question for every row: (B,T)."""
    row = torch.as_tensor(ids, device=like.device)
    if row.dim() != 1 or not row.numel() or row.is_floating_point():
        raise UnsupportedInput(
            f"a question of shape {tuple(row.shape)}, {row.dtype}: give token ids (T,), one at least"
        )
    return row.to(like.dtype).expand(len(like), -1)


def _pieces(input_ids: Tensor, mask: Tensor, count: int, size: int) -> list[Tensor]:
    """``count`` pieces (B,``size``) of the text of each row, from its first tokens to its last."""
    if count < 0 or size < 1:
        raise KeepKVError(f"rehearse(pieces={count}, piece={size}): at least 0 pieces of at least 1 token")
    lengths = mask.sum(-1)
    size = min(size, int(lengths.min()))  # the rows of a forward are of one length
    first = mask.shape[1] - lengths
    found = []
    for i in range(count):
        start = first + (lengths - size) * i // max(1, count - 1)
        found.append(input_ids.gather(1, start[:, None] + torch.arange(size, device=start.device)))
    return found
