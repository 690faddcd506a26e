"""Replay: one forward over a text, with gradients, in which each query sees what it saw while a cache compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keepkv.engine.attached import attach
from keepkv.engine.mask_rule import REPLAY, MaskRule
from keepkv.engine.model import attention_modules, inner_model
from keepkv.engine.stock import plain_attention
from keepkv.errors import UnsupportedInput
from keepkv.training import masks
from keepkv.training.record import Record


def replay(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, record: Record, **inputs: Any) -> Tensor:
    """Logits (B,T,V) of ``input_ids`` (B,T), each as it was when the cache of ``record`` decoded it; with gradients.

    model: of transformers, or wrapped by PEFT; on training or evaluation, with or without gradient checkpointing.
    attention_mask (B,T): 0 for padding on either side; None: none. record: of the same rows, in the same order.
    inputs: what else the model's forward takes.

    Raises ``UnsupportedInput`` where the record is of another batch, of another model or of a shorter text. One token
    more than were recorded may be given: ``generate`` does not feed the last one that it draws.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with replaying(model, record):
        out = model(input_ids=input_ids, attention_mask=mask, position_ids=places, use_cache=False, **inputs)
    logits: Tensor = out.logits
    return logits


@contextmanager
def replaying(model: nn.Module, record: Record, flex: bool | None = None) -> Iterator[None]:
    """Inside, every forward of a whole batch by ``model`` without a cache replays ``record``: for loops that call the
    model themselves, such as a trainer's. Forwards with a keepkv cache are what they always are.

    flex: whether attention is FlexAttention, which needs a GPU for gradients; None: where there is one and attention
        has no dropout. Elsewhere a layer's mask (B,Hq,T,T) exists while that layer computes, forward or backward.

    What a backward recomputes, with gradient checkpointing, may happen after the block: the graph holds what it needs.
    """
    token = REPLAY.set(Replay(model, record, flex))
    try:
        yield
    finally:
        REPLAY.reset(token)


class Replay:
    """What the attention function calls in a forward that is a replay. It belongs to the call: the masks hold it."""

    def __init__(self, model: nn.Module, record: Record, flex: bool | None = None) -> None:
        inner = inner_model(model)
        self.attachment = attach(inner)  # the model stays on "keepkv" for as long as a backward may recompute
        self.record, self.flex = record, flex
        self.recomputed = any(getattr(one, "gradient_checkpointing", False) for one in inner.modules())
        if missing := record.heads.keys() - attention_modules(inner).keys():
            raise UnsupportedInput(
                f"the record is of layers {sorted(record.heads)}, and {type(inner).__name__} has no attention in "
                f"{sorted(missing)}: replay it with the model that it was made with"
            )

    def begin(self, rule: MaskRule) -> None:
        """Raise where the forward is not one over the whole text of the record."""
        rows, _, length, columns = rule.shape
        kept, known = self.record.evict_at.shape[0], self.record.evict_at.shape[-1]
        if rows != kept:
            raise UnsupportedInput(f"a batch of {rows} rows was given to a replay of {kept}: give it record.rows(…)")
        if length != columns:
            raise UnsupportedInput(
                f"a forward of {length} tokens behind {columns - length} others was called within a replay, which "
                "reads the whole text at once: give all of it, and use_cache=False"
            )
        if length > known + 1:
            raise UnsupportedInput(
                f"a text of {length} columns was given to the replay of a record of {known}: what its other tokens "
                "would have seen is not known. Record all of it (keepkv.training.feed)."
            )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: MaskRule, **kwargs: Any
    ) -> Tensor:
        """Attention output (B,T,Hq,Dv); see ``keepkv.engine.mask_rule.Replays``."""
        layer = self._layer(module)
        if layer is None:
            return plain_attention(module, query, key, value, rule.dense(), **kwargs)
        positions = masks.positions_of(rule.padding, query.shape[0], query.shape[2], query.device)
        evict_at = masks.by_column(self.record.of(layer).to(query.device), positions)
        by_flex = query.is_cuda and not kwargs.get("dropout") if self.flex is None else self.flex
        if by_flex:
            return masks.flex(module, query, key, value, evict_at, positions, rule.arguments["mask_function"], **kwargs)

        def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            block = rule.new_block()
            shown = masks.visible(evict_at, positions, evict_at.new_ones(1, 1, 1, 1) > 0 if block is None else block)
            return masks.attend(module, query, key, value, shown, **kwargs)

        if torch.is_grad_enabled() and not (self.recomputed and module.training):
            out: Tensor = checkpoint(masked, query, key, value, use_reentrant=False)  # or the graph keeps every mask
            return out
        return masked(query, key, value)

    def _layer(self, module: Any) -> int | None:
        """The compressed layer whose slots ``module`` attends to; None: it is not compressed."""
        index = int(module.layer_idx)
        if index in self.record.heads:
            return index
        types = getattr(module.config, "layer_types", None)
        shares = getattr(module, "is_kv_shared_layer", False) and types and types[index] == "full_attention"
        return max(self.record.heads) if shares else None  # Gemma 3n and 4: the last layer that has slots of its own
