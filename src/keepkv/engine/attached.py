"""How long a model stays on the "keepkv" attention: as long as it has a cache.

All caches of a model hold one ``Attachment``. When the last of them goes, so does the attachment, and the model gets
back the attention that it had; what runs on it at that moment, as with another cache in another thread, ends first.
"""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, finalize, ref

from transformers import PreTrainedModel

from keepkv.engine import contexts
from keepkv.engine.busy import when_idle
from keepkv.engine.interface import NAME
from keepkv.engine.model import BEFORE, inner_model, set_attention
from keepkv.errors import CacheStateError


class Attachment:
    """Held by every cache of a model, and by copies of these. One that comes out of a pickle holds nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return self


_held: WeakKeyDictionary[PreTrainedModel, ReferenceType[Attachment]] = WeakKeyDictionary()


def attach(model: PreTrainedModel) -> Attachment:
    """What keeps ``model`` on "keepkv" while somebody holds it."""
    with contexts.LOCK:
        set_attention(model, NAME)
        held = _attachment(model)
        if held is None:
            held = Attachment()
            _held[model] = ref(held)
            finalize(held, _gone, ref(model)).atexit = False
        return held


def restore(model: Any) -> None:
    """Give ``model`` the attention that it had before its first keepkv cache, now.

    It is given back by itself when the last cache of the model goes. Caches that are left can be used again once
    another is made for the model; until then a forward with one of them is refused.
    """
    inner = inner_model(model)
    with contexts.LOCK:
        if contexts.is_open(inner):
            raise CacheStateError("the model is inside a keepkv.compressed block, which restores it when it ends.")
        _put_back(inner)


def _attachment(model: PreTrainedModel) -> Attachment | None:
    held = _held.get(model)
    return None if held is None else held()


def _gone(model: ReferenceType[PreTrainedModel]) -> None:
    alive = model()
    if alive is not None:
        when_idle(alive, _put_back_if_free)


def _put_back_if_free(model: PreTrainedModel) -> None:
    if _attachment(model) is None:  # else another cache was made meanwhile
        _put_back(model)


def _put_back(model: PreTrainedModel) -> None:
    before = model.__dict__.get(BEFORE)
    if before is not None and model.config.get_text_config(decoder=True)._attn_implementation == NAME:
        set_attention(model, before)
