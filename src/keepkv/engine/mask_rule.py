"""The mask of one forward, not as a tensor but as a rule that each layer applies to the slots it holds."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_note = threading.local()  # which cache the mask that is about to be built is for


class Steps(Protocol):
    """What a mask rule tells that a forward begins: a cache. The way up, on purpose: see ``Cache.begin_step``."""

    layers: list[Any]

    def begin_step(self, rule: MaskRule, layer_idx: int) -> None: ...


class Replays(Protocol):
    """What attends in a forward that is a replay. The way up, on purpose: see ``keepkv.training.replay``."""

    def begin(self, rule: MaskRule) -> None:
        """A mask of the forward is made: raise where it is not one that can be replayed."""

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: MaskRule, **kwargs: Any
    ) -> Tensor:
        """Attention output (B,T,Hq,Dv) of the whole text: query (B,Hq,T,D), key (B,H,T,D), value (B,H,T,Dv)."""


REPLAY: ContextVar[Replays | None] = ContextVar("keepkv_replay", default=None)  # of the forward that runs


def note_cache(cache: Steps, layer: int) -> None:
    """Called by ``Cache.get_mask_sizes``, which transformers calls right before the mask function."""
    _note.value = (cache, layer)


def _noted_cache() -> tuple[Steps | None, int]:
    noted: tuple[Steps | None, int] = getattr(_note, "value", (None, 0))
    _note.value = (None, 0)
    return noted


class MaskRule:
    """What transformers calls the attention mask of a forward, before anybody has materialised it.

    ``arguments`` are those of the mask function: batch_size, q_length, kv_length, offsets, mask_function and the
    2-D padding mask. It mimics as much of a 4-D tensor as model code touches on the way to the attention function.
    """

    ndim = 4

    def __init__(self, arguments: dict[str, Any], cache: Steps | None, replay: Replays | None = None) -> None:
        self.arguments = arguments
        self.cache = cache
        self.replay = replay
        self._dense: Tensor | None = None
        self._rows = slice(None)

    @property
    def plain_causal(self) -> bool:
        """Whether a token sees exactly itself and what came before."""
        return self.arguments["mask_function"] is causal_mask_function

    @property
    def padding(self) -> Tensor | None:
        """(B, tokens seen) bool, false where a column is padding; None: no padding."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        return mask

    def dense(self) -> Tensor | None:
        """The stock ``sdpa`` mask on the same arguments, (B,1,T,kv) bool or None, for plain tensors."""
        if self._dense is None:
            self._dense = sdpa_mask(**self.arguments)
        return self._dense if self._dense is None else self._dense[:, :, self._rows]

    def new_block(self) -> Tensor | None:
        """(B|1,1,T,T) bool: which of this forward's T tokens see which; None for one token, which sees itself."""
        length = self.arguments["q_length"]
        if self.plain_causal:
            if length == 1:
                return None
            block = torch.ones(length, length, dtype=torch.bool, device=self.arguments["device"]).tril()[None, None]
            padding = self.padding
            return block if padding is None else block & padding[:, None, None, -length:]
        mask = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False})
        assert mask is not None  # skipping, the only reason for None, was switched off
        return mask[..., -length:]

    # What model code may do with a mask on its way to the attention function.
    @property
    def shape(self) -> tuple[int, int, int, int]:
        a = self.arguments
        return a["batch_size"], 1, a["q_length"], a["kv_length"]

    def contiguous(self) -> MaskRule:
        return self

    def to(self, *args: Any, **kwargs: Any) -> MaskRule:
        return self

    def __getitem__(self, index: Any) -> MaskRule:
        everything = slice(None)
        if not (isinstance(index, tuple) and len(index) == 4 and index[0] == index[1] == index[3] == everything):
            raise TypeError(f"a keepkv mask rule can only be sliced by rows, [:, :, a:b, :]; got {index!r}")
        part = MaskRule(self.arguments, self.cache, self.replay)
        part._rows = index[2]
        return part


def mask_rule(*args: Any, **arguments: Any) -> MaskRule:
    """The registered mask function: builds no mask, returns the rule and tells the cache that a forward begins."""
    cache, layer = _noted_cache()
    prepared = arguments.get("attention_mask")
    if isinstance(prepared, MaskRule):  # generate builds it ahead of a compiled forward, which hands it back
        return prepared
    rule = MaskRule(arguments, cache, REPLAY.get() if cache is None else None)
    if cache is not None:
        cache.begin_step(rule, layer)
    if rule.replay is not None:
        rule.replay.begin(rule)
    return rule
