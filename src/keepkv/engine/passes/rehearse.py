"""Questions that may come, read behind the text before it is compressed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.core.slots import EMPTY
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import check_whole, feed, watching
from keepkv.engine.places import text_of
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.observe.rehearsal import NAMES
from keepkv.score.passes.rehearsed import Listen


@torch.no_grad()
def rehearse(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    questions: Sequence[Tensor | Sequence[int]] = (),
    pieces: int = 8,
    piece: int = 64,
    begun: Sequence[Tensor | Sequence[int]] = (),
    new: int = 32,
) -> None:
    """Let the method of ``cache`` see what queries may come: for ``"keepkv2"`` and ``"attention-matching"`` with
    ``rehearsed=True``.

    cache: has read ``input_ids`` and was not compressed since, so its method has ``when=keepkv.When("deferred")``. It
        remembers the queries until it is compressed; what was rehearsed before is forgotten.
    input_ids (B,T), attention_mask (B,T): all that was fed, as it was fed; padding on the left.
    questions: token ids of what may be asked, as it would be fed behind the text, with the template of the chat and, if
        it can be guessed, the beginning of a reply. Not the very questions, if these are not known yet: any of their
        kind. A dozen will do.
    pieces: of the text itself, ``piece`` tokens each, evenly spread, that are read again.
    begun: token ids of beginnings of questions that the model asks itself: each row goes on with ``new`` tokens, or up
        to its end of text, the likeliest ones, with the template of the chat as above.

        cache = keepkv.Cache(model, "keepkv2", budget=0.1, rehearsed=True, when=keepkv.When("deferred"))
        model(input_ids=context, cache=cache)
        keepkv.rehearse(model, cache, context, questions=[tokenizer.encode(text) for text in likely])
        cache.compress()

    Each is read by itself on a copy of the cache: the time of as many short forwards, and the memory of the copy.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    method = cache.settings.method
    if not method.score.needs_questions:
        raise KeepKVError(
            f"method {method.name!r} does not look at questions before they are asked; 'keepkv2' with rehearsed=True "
            "does"
        )
    if pieces < 0 or piece < 2:
        raise KeepKVError(f"rehearse(pieces={pieces}, piece={piece}): at least 0 pieces of at least 2 tokens")
    if new < 1:
        raise KeepKVError(f"rehearse(new={new}): the model goes on with at least 1 token")
    check_whole(cache, input_ids, mask, "rehearse")
    rows = text_of(cache, input_ids, mask)
    asked = [_checked(ids, input_ids) for ids in questions]
    starts = [_checked(ids, input_ids) for ids in begun]
    texts = [[ids] * len(rows) for ids in asked]
    texts += [_continued(model, cache, ids, mask, new) for ids in starts]
    texts += [[_piece(row, i, pieces, piece) for row in rows] for i in range(pieces)]
    if not texts:
        raise KeepKVError("rehearse(questions=(), pieces=0): give questions, pieces of the text to read again, or both")
    heard = [_hear(model, cache, text, mask) for text in texts]
    for layer, *found in zip(cache.compressible, *heard, strict=True):
        # Queries of one text behind those of another: along the dimension that follows rows and heads.
        layer.score_state |= {name: torch.cat([x[name] for x in found], dim=1 + (name != NAMES[1])) for name in NAMES}


def _hear(model: PreTrainedModel, cache: Cache, texts: list[Tensor], mask: Tensor) -> list[dict[str, Tensor]]:
    """What ``Listen`` remembers in each layer while each row reads its own of ``texts``, each (T,). Shorter ones have
    queries at position ``EMPTY`` in front."""
    # Rows whose texts are of one length are read together: padding would take up the window of sliding layers.
    together, longest = defaultdict(list), max(map(len, texts))
    for i, ids in enumerate(texts):
        together[len(ids)].append(i)
    found: list[dict[str, Tensor]] = [{} for _ in cache.compressible]
    for length, members in together.items():
        rows = torch.tensor(members, device=mask.device)
        twin = watching(cache, rows, Listen())
        feed(model, twin, torch.stack([texts[i] for i in members]), mask[rows])
        for layer, mine in zip(twin.compressible, found, strict=True):
            for name in NAMES:
                x, dim = layer.score_state[name], 1 + (name != NAMES[1])
                if name not in mine:
                    shape = (len(texts), *x.shape[1:dim], longest, *x.shape[dim + 1 :])
                    mine[name] = x.new_full(shape, EMPTY if name == NAMES[1] else 0)
                mine[name].narrow(dim, longest - length, length)[rows] = x
    return found


def _continued(model: PreTrainedModel, cache: Cache, start: Tensor, mask: Tensor, new: int) -> list[Tensor]:
    """What each row makes of ``start`` (T,), that included, each (≤ T + new,)."""
    twin, ids = watching(cache), start.expand(len(mask), -1)
    said = [ids]
    for _ in range(new):
        likeliest = feed(model, twin, ids, mask).argmax(-1, keepdim=True)
        mask = torch.cat((mask, mask.new_ones(ids.shape)), dim=1)
        ids = likeliest.to(start.dtype)
        said.append(ids)
    stops = model.generation_config.eos_token_id if model.generation_config else None
    ends = torch.tensor([] if stops is None else stops, device=start.device).view(-1)
    rows = torch.cat(said, dim=1)
    over = torch.isin(rows[:, len(start) :], ends).cumsum(-1) > 0
    return [row[: len(row) - int(late.sum())] for row, late in zip(rows, over, strict=True)]


def _checked(ids: Tensor | Sequence[int], like: Tensor) -> Tensor:
    row = torch.as_tensor(ids, device=like.device)
    if row.dim() != 1 or not row.numel() or row.is_floating_point():
        raise UnsupportedInput(
            f"a question of shape {tuple(row.shape)}, {row.dtype}: give token ids (T,), one at least"
        )
    return row.to(like.dtype)


def _piece(row: Tensor, number: int, count: int, size: int) -> Tensor:
    """One of ``count`` pieces of a text (T,): the first begins with it, the last ends with it."""
    start = max(0, len(row) - size) * number // max(1, count - 1)
    return row[start : start + size]
