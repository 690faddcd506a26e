"""Caches of single rows that decode in one forward: the model sees a batch, each row attends over its own cache.

Nothing of one row reaches another: their methods and budgets may differ, a row that fails fails alone, and attention of
a row is computed as if it were alone. What rows share is the matrix products, which read the weights once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils as stock
from transformers.cache_utils import DynamicSlidingWindowLayer

from keepkv.engine.cache import Cache
from keepkv.engine.handle import KVHandle
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule, note_cache
from keepkv.engine.stock import plain_attention
from keepkv.engine.together import Together
from keepkv.engine.versions import holds_nothing
from keepkv.errors import UnsupportedModel


class SideBySide(stock.Cache):
    """One forward of one token per row over ``caches`` of one row each; make a new one for each forward.

    Rows of the batch beyond those of ``caches`` are padding: what the model computes for them means nothing.
    failed: what went wrong in a row, by its number. Its output of this forward means nothing, and its cache is done
    for; the others are as if it had not been there.

    Raises ``UnsupportedModel`` where a layer of the caches cannot be told apart by rows; decode such caches one by one.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches, self.failed = list(caches), dict[int, Exception]()
        kinds = {type(x).__name__ for x in self.caches[0].layers if not _by_rows(x)}
        if kinds:
            raise UnsupportedModel(f"layers of kind {', '.join(sorted(kinds))} cannot be told apart by rows")
        self._rules: dict[int, list[MaskRule]] = {}
        super().__init__(layers=[_Rows(self, index) for index in range(len(self.caches[0].layers))])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        note_cache(self, layer_idx)
        return query_length, 0

    def begin_step(self, rule: MaskRule, layer_idx: int) -> None:
        """A forward begins in every row; each gets a rule of its own."""
        if rule.shape[2] != 1:
            raise UnsupportedModel(f"{rule.shape[2]} tokens a row: side by side, rows decode one token each")
        rules = []
        for row, cache in enumerate(self.caches):
            layer: Any = cache.layers[layer_idx]
            length, offset = layer.get_mask_sizes(1)
            given = {"batch_size": 1, "kv_length": length, "kv_offset": offset, "attention_mask": None}
            given["q_offset"] = layer.get_seq_length()
            rules.append(MaskRule({**rule.arguments, **given}, cache))
            self.run(row, cache.begin_step, rules[-1], layer_idx)
        self._rules[id(rule.arguments)] = rules

    def rules(self, rule: MaskRule) -> list[MaskRule]:
        """Those of the rows, of the rule of the batch."""
        return self._rules[id(rule.arguments)]

    def run(self, row: int, do: Any, *given: Any) -> Any:
        """Of a row that has not failed, what ``do`` returns; None where it fails now or has before."""
        if row not in self.failed:
            try:
                return do(*given)
            except Exception as error:
                self.failed[row] = error
        return None


def _by_rows(layer: Any) -> bool:
    """Whether a layer is known to keep what it holds of each row apart."""
    if isinstance(layer, Layer):
        return not layer.form.model_expands
    return type(layer) in (stock.DynamicLayer, DynamicSlidingWindowLayer) or holds_nothing(layer)


class _Rows(stock.CacheLayerMixin):
    """One layer of all rows."""

    def __init__(self, batch: SideBySide, index: int) -> None:
        super().__init__()
        self.batch, self.index = batch, index
        self.rows: list[Any] = [cache.layers[index] for cache in batch.caches]
        first = self.rows[0]
        self.is_sliding, self.is_initialized = getattr(first, "is_sliding", False), True
        self._stock: list[Any] = []
        self._together: Together | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._together = together = Together(self.rows, key_states, value_states, self.batch.run)
        every = zip(self.rows, key_states.split(1), value_states.split(1), strict=False)  # behind them: padding
        self._stock = [
            None if row in together.at else self.batch.run(row, layer.update, keys, values)
            for row, (layer, keys, values) in enumerate(every)
        ]
        return KVHandle(self, key_states, 1), KVHandle(self, value_states, 1)

    def check_input(self, kwargs: dict[str, Any]) -> None:
        for layer in self.rows[:1]:
            if isinstance(layer, Layer):
                layer.check_input(kwargs)

    def attend(self, module: torch.nn.Module, query: Tensor, rule: MaskRule, **kwargs: Any) -> Tensor:
        """(B,1,Hq,Dv) of ``query`` (B,Hq,1,D)."""
        rules, own = self.batch.rules(rule), getattr(module, "layer_idx", self.index) == self.index
        whole = self._together.attend(query, rules, **kwargs) if own and self._together is not None else None
        served = self._together.at if whole is not None and self._together is not None else ()
        for row, (layer, mine, its) in enumerate(zip(self.rows, query.split(1), rules, strict=False)):
            out = None if row in served else self.batch.run(row, self._attend, layer, row, module, mine, its, kwargs)
            if out is not None:
                whole = out.new_zeros(len(query), *out.shape[1:]) if whole is None else whole
                whole[row] = out[0]
        return query.transpose(1, 2) if whole is None else whole  # every row has failed: any numbers will do

    def _attend(self, layer: Any, row: int, module: Any, query: Tensor, rule: MaskRule, kwargs: Any) -> Tensor:
        if isinstance(layer, Layer):
            return layer.attend(module, query, rule, **kwargs)
        keys, values = self._stock[row]
        return plain_attention(module, query, keys, values, rule.dense(), **kwargs)
