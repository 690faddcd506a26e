"""The cache a user makes: ``cache = keepkv.Cache(model, method="keepkv", budget=0.1)``."""

from __future__ import annotations

import copy as copying
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import cache_utils as stock

from keepkv.core.budget import Budget
from keepkv.engine import persistence
from keepkv.engine.layer import Layer, flush
from keepkv.engine.mask_rule import MaskRule, note_cache
from keepkv.engine.model import attach
from keepkv.engine.receipt import Receipt, make_receipt
from keepkv.engine.state import Plan
from keepkv.errors import BudgetError, CacheStateError, KeepKVError
from keepkv.methods import Method, make_method
from keepkv.spans import RowSpans, Span, SpanPolicy
from keepkv.store import STORES


class Cache(stock.Cache):
    """A key-value cache that compresses itself; pass it to ``generate`` or a forward as ``past_key_values``.

    model: switched to the attention implementation "keepkv" (its text part); refused with ``UnsupportedModel`` if
        it cannot be served.
    method: a name from ``keepkv.methods()`` with its options as keywords, or a ``keepkv.Method``.
    budget: share of the tokens (float), slots per KV head (int), or bytes for the whole cache ("256MiB").
    store: layout of the slots: "auto", "dense", "flat", "static" (compiled decode), "int8".
    seed: of methods that draw at random.
    spans: parts of the prompt that share the budget fairly or are protected: a list of ``keepkv.Span`` for every row, a
        list of such lists, or a ``keepkv.SpanPolicy``.

    A cache belongs to one conversation (or one batch of them): reuse needs ``reset``, ``copy`` or a new cache. It is
    for inference: gradients do not flow through it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "keepkv",
        budget: Budget | float | int | str | None = None,
        *,
        store: str | None = None,
        store_options: dict[str, Any] | None = None,
        seed: int = 0,
        spans: SpanPolicy | Sequence[Span] | Sequence[Sequence[Span]] | None = None,
        **options: Any,
    ) -> None:
        chosen = make_method(method, options)
        if budget is None and chosen.name != "full":
            raise BudgetError(
                f"method {chosen.name!r} needs a budget, e.g. budget=0.1 or budget=1024 or budget='256MiB'"
            )
        parts = None if spans is None else RowSpans(SpanPolicy.of(spans))
        self.plan = Plan(chosen, Budget.of(1.0 if budget is None else budget), seed, spans=parts)
        layout = store or chosen.store
        layout = ("flat" if chosen.allocate.ragged else "dense") if layout == "auto" else layout
        make_store = STORES.factory(layout)
        stats = self.plan.stats
        first = make_store(stats, **(store_options or {}))
        model_length = int(getattr(first, "capacity", 0)) if first.compileable else None
        attached = attach(model, chosen, model_length)
        self.attached_config = persistence.fingerprint(model)
        layers = list(attached.stock)
        for index, place in attached.places.items():
            layers[index] = Layer(place, self.plan, make_store(stats, **(store_options or {})))
        self.plan.window_tokens = sum(getattr(layer, "sliding_window", 0) for layer in layers)
        super().__init__(layers=layers)
        self._ours = [layers[i] for i in attached.places]

    # --- for users ---------------------------------------------------------------------------------------------

    def report(self) -> Receipt:
        """The receipt: what was asked, kept, merged, dropped, and what it weighs now."""
        return make_receipt(self)

    @property
    def compressing(self) -> bool:
        """Whether compressions run when they fall due. Set to False to ask questions about a compressed context
        without compressing the questions and answers; what was remembered for the next compression is then freed."""
        return self.plan.compressing

    @compressing.setter
    def compressing(self, value: bool) -> None:
        self.plan.compressing = value
        if not value:
            for layer in self._ours:
                layer.state.clear()

    def compress(self) -> None:
        """Run now, in every layer, the compression that is due or pending; to be used when the prefill schedule is
        "deferred" and no token is decoded yet."""
        for layer in self._ours:
            if layer.is_initialized and layer.seen:
                layer.compress()
        flush(self.plan)
        for layer in self._ours:
            if self.plan.method.when.every is None:
                layer.forget()

    def kept_positions(self, layer: int) -> Tensor:
        """(B,H,S) int32: the token each slot of ``layer`` came from, counted in its row without padding; −1 empty."""
        mine = self.layers[layer]
        if not isinstance(mine, Layer):
            raise KeepKVError(f"layer {layer} is {type(mine).__name__}, which transformers keeps as it is")
        return mine.store.view().positions.clone()

    def copy(self) -> Cache:
        """An independent copy: compress a context once, ask many questions."""
        twin = copying.copy(self)
        twin.plan = copying.copy(self.plan)
        twin.plan.due = []
        twin.plan.clock = self.plan.clock.copy()
        twin.plan.spans = None if self.plan.spans is None else self.plan.spans.copy()
        twin.layers = [x.copy(twin.plan) if isinstance(x, Layer) else copying.deepcopy(x) for x in self.layers]
        twin._ours = [x for x in twin.layers if isinstance(x, Layer)]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self.copy()

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file."""
        persistence.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, method: Method | None = None) -> Cache:
        """Read what ``save`` wrote. ``method`` is needed only if the cache was made with a ``Method`` without a name.

        Raises ``CacheFileError`` where the file is truncated, altered, foreign or of another model.
        """
        return persistence.load(cls, Path(path), model, method)

    # --- for transformers --------------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not isinstance(self.layers[layer_idx], stock.CacheLayerMixin):
            # As transformers does: a mask asked for at a recurrent layer is that of the first attention layer.
            layer_idx = next((i for i, x in enumerate(self.layers) if isinstance(x, stock.CacheLayerMixin)), layer_idx)
        note_cache(self, layer_idx)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def begin_step(self, rule: MaskRule, layer_idx: int) -> None:
        """A forward begins: called when its mask rule is made; a second mask of the same forward changes nothing."""
        if not isinstance(self.layers[layer_idx], Layer):
            return
        batch, _, length, _ = rule.shape
        clock, progress = self.plan.clock, {layer.get_seq_length() for layer in self._ours}
        if len(progress) > 1:
            raise CacheStateError(
                "an earlier forward failed midway and left this cache inconsistent; call cache.reset()"
            )
        unfinished = clock.columns - progress.pop()
        if unfinished:  # announced before, but no layer has seen it
            clock.crop(unfinished)
        spans, device = self.plan.spans, torch.device(rule.arguments["device"])
        if spans is not None:
            spans.check(batch)
            if length == 1 and clock.seen is not None:
                spans.end_prompt(clock.seen)
        if unfinished != length:
            for layer in self._ours:
                layer.settle_due(length)
            flush(self.plan)
            for layer in self._ours:
                layer.begin_step(length)
        clock.begin(batch, length, rule.padding, device)
        if spans is not None:
            spans.begin(batch, device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.plan.index(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(max(0, self.batch_size)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self.plan.index(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(max(0, self.batch_size))[indices.cpu()]
        super().batch_select_indices(indices)
        self.plan.index(rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise CacheStateError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        short = [x for x in self._ours if x.is_initialized and x.store.tail < -tokens_to_remove]
        if short:
            short[0].crop(tokens_to_remove)  # raises before any layer has changed
        super().crop(tokens_to_remove)
        self.plan.clock.crop(-tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        fresh = type(self.plan.clock)()
        self.plan.clock.__dict__.update(fresh.__dict__)
        self.plan.due.clear()
        if self.plan.spans is not None:
            self.plan.spans.reset()
