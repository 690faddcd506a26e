"""One layer of a cache: keeps slots in a store, attends to them, and is compressed when that is due."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from keepkv.attention.attend import attend
from keepkv.attention.part import plain
from keepkv.core.calibration import of_layer
from keepkv.core.layer_info import LayerInfo
from keepkv.engine.compression import compress, compress_waiting
from keepkv.engine.handle import KVHandle
from keepkv.engine.kv_form import KVForm
from keepkv.engine.latest import Latest
from keepkv.engine.mask_rule import MaskRule
from keepkv.engine.selecting import selected_parts
from keepkv.engine.state import CacheState, Progress
from keepkv.engine.stock import plain_attention
from keepkv.engine.tally import Tally
from keepkv.engine.view import SlotsOnDemand, view_of
from keepkv.errors import CacheStateError, UnsupportedInput, UnsupportedModel
from keepkv.methods.returned import checked_token_stats
from keepkv.store.base import Store

HELD = 64  # tokens of the latest forward that may be taken back after the score was to see them


class Layer(CacheLayerMixin):
    """The cache layer that transformers sees. ``get_seq_length`` is logical: what is stored is private.

    latest: what the score has still to see. It does when the next forward begins, so that tokens that are taken back
    before leave no trace. heard: columns that it has seen. hidden (B,T,E): what the attention module that runs was fed,
    where the score asks for it.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, info: LayerInfo, form: KVForm, shared: CacheState, store: Store) -> None:
        super().__init__()
        self.info = info
        self.form = form
        self.shared = shared
        self.store = store
        self.score_state: dict[str, Tensor] = {}
        self.latest: Latest | None = None
        self.heard = 0
        self.hidden: Tensor | None = None
        self.attention: dict[str, Any] | None = None
        self.tally = Tally()
        self.progress = Progress()

    # --- what transformers calls -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.store.compileable

    @property
    def batch_size(self) -> int:
        seen = self.shared.positions.seen
        return -1 if seen is None else seen.shape[0]

    def get_seq_length(self) -> int:
        positions = self.shared.positions
        if torch.compiler.is_compiling():
            return positions.columns_tensor  # type: ignore[return-value]
        return positions.columns if self._is_traced(1) else self.progress.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store T new tokens; returns handles that only the "keepkv" attention function can use, or where the model
        expands what is cached, that."""
        positions, length = self.shared.positions, key_states.shape[2]
        if self._is_traced(length):  # nothing that changes from step to step may be read as a Python number
            assert positions.positions is not None
            self.store.append(key_states, value_states, positions.positions, **self._known(key_states))
            return self._handed_out(key_states, value_states, 1)
        if positions.positions is None or positions.columns != self.progress.seen + length:
            raise UnsupportedModel(
                f"layer {self.info.index} was given {length} tokens that no attention mask announced: a 4-D mask was "
                "given (Pass a 2-D attention mask, or none), or the attention implementation of the model is no longer "
                "'keepkv' (make the cache with keepkv.Cache(model, …) and leave it as it is)."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states.detach(), value_states.detach(), positions.positions, **self._known(key_states))
        self.progress.seen += length
        if self.form.model_expands and self._holds_all():
            return plain(next(iter(self.store.parts())))
        return self._handed_out(key_states, value_states, self.progress.seen)

    def _known(self, keys: Tensor) -> dict[str, Any]:
        """``stats`` of the tokens with ``keys`` (B,H,T,D) that are appended, where the score takes them from hidden
        states."""
        score = self.shared.settings.method.score
        if not score.needs_hidden:
            return {}
        if self.hidden is None:
            raise UnsupportedModel(
                f"method {self.shared.settings.method.name!r} looks at hidden states, and nothing shows what the "
                f"attention module of layer {self.info.index} is fed: it is called past its hooks (a model that was "
                "compiled before the cache was made, or code of its own). Compile the model after the cache is made, "
                "or choose a method that does without, such as 'snapkv'."
            )
        self.hidden = self.hidden.detach()
        known = of_layer(self.shared.settings.calibrations, self.info.index, self.hidden.device)
        stats = checked_token_stats(score, score.token_stats(self.hidden, known), keys)
        return {"stats": stats} if stats else {}

    def _handed_out(self, keys: Tensor, values: Tensor, length: int) -> Any:
        if self.form.model_expands:
            return keys, values
        return KVHandle(self, keys, length), KVHandle(self, values, length)

    def _is_traced(self, length: int) -> bool:
        return length == 1 and self.store.compileable and not self.store.holds_all

    def _holds_all(self) -> bool:
        return not self.progress.compressed and self.store.holds_all

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._index(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._index(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._index(torch.arange(self.batch_size, device=self.device)[indices.to(self.device)])

    def _index(self, rows: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows.to(self.device)
        if self.latest is not None and self.latest.weights is not None:
            self.listen()  # weights are of the columns that there are now, and a ragged store may become narrower
        self.store.index(rows)
        self.score_state = {name: x.index_select(0, rows) for name, x in self.score_state.items()}
        if self.latest is not None:
            self.latest = self.latest.of_rows(rows)
        self.tally.index(rows)

    def activate_past_recording(self) -> None:
        self.progress.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        tokens = abs(tokens_to_remove)
        if tokens == 0 or not self.is_initialized:
            return
        self.check_crop(tokens)
        self.store.crop(tokens)
        self.progress.seen -= tokens
        self.progress.settled = min(self.progress.settled, self.progress.seen)
        if self.latest is not None:
            left = self.latest.part(slice(-tokens))
            self.latest = left if left.query.shape[2] else None

    def check_crop(self, tokens: int) -> None:
        """Raise where the newest ``tokens`` columns cannot be taken back."""
        if not self.is_initialized:
            return
        possible = min(self.store.appended, self.get_seq_length())
        if tokens > possible:
            raise CacheStateError(
                f"crop(-{tokens}): only the {possible} tokens since the last compression can be taken back. "
                "Copy the cache before (cache.copy()), or compress less often."
            )
        method = self.shared.settings.method
        compiled = self._is_traced(1) and self.latest is None and self._observes()  # compiled code does not wait
        heard = self.get_seq_length() if compiled else self.heard
        if heard > self.get_seq_length() - tokens and (self.score_state or self.shared.settings.stats):
            raise CacheStateError(
                f"crop(-{tokens}): the score of method {method.name!r} has taken some of these tokens into account; of "
                f"the latest forward, {HELD} tokens at most can be taken back. Copy the cache before (cache.copy())."
            )

    def reset(self) -> None:
        self.store = self.store.empty()
        self.score_state, self.latest, self.heard, self.attention, self.hidden = {}, None, 0, None, None
        self.tally, self.progress = Tally(), Progress(record_past=self.progress.record_past)
        self.is_initialized = False

    # --- what the attention function calls ---------------------------------------------------------------------

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        rule: MaskRule,
        *,
        dense: tuple[Tensor, Tensor] | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention output (B,T,Hq,Dv) of ``query`` (B,Hq,T,D) after RoPE; then observes and, if due, compresses.

        ``dense``: the expanded keys and values of latent attention, used while nothing is compressed.
        """
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        is_own = getattr(module, "layer_idx", self.info.index) == self.info.index  # not a layer sharing our slots
        inner, weights = self.form.query(module, query), None
        chosen = selected_parts(self, query, scaling, softcap)
        if chosen is None and self._holds_all():
            keys, values = dense or plain(next(iter(self.store.parts())))
            out = plain_attention(
                module, query, keys, values, rule.dense(), scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs
            )
        else:
            parts = self.form.parts(self.store.parts()) if chosen is None else iter(chosen)
            block = None if query.shape[2] == 1 else rule.new_block()
            out, weights = attend(
                inner,
                parts,
                scaling,
                block=block,
                softcap=softcap,
                sinks=s_aux,
                weights=is_own and chosen is None and self._follows(),
            )
            out = self.form.output(module, out).transpose(1, 2).contiguous()
        if is_own:
            self._after_attention(inner, weights, {"scaling": scaling, "softcap": softcap, "sink_logits": s_aux})
        return out

    def _follows(self) -> bool:
        """Whether the score follows the attention of every token decoded."""
        method = self.shared.settings.method
        return method.score.follows_decode and (
            self.shared.observing or (self.shared.compressing and method.when.recurs)
        )

    def _observes(self) -> bool:
        """Whether the score remembers something of this forward: only where a compression may follow."""
        shared, method = self.shared, self.shared.settings.method
        may_follow = method.when.recurs or (self.progress.prefilling and method.when.prefill is not None)
        return method.score.observes and (shared.observing or (shared.compressing and may_follow))

    @property
    def unwatched(self) -> bool:
        """Whether a token decoded now is seen by attention alone, over all slots: it may be written from outside."""
        settings, positions = self.shared.settings, self.shared.positions
        begun = (
            self.attention is not None and positions.columns == self.progress.seen + 1 and not self.progress.prefilling
        )
        plain = settings.select is None and not self.form.model_expands and not settings.method.score.needs_hidden
        return begun and plain and not (self._follows() or self._observes())

    def wrote(self) -> None:
        """A token was written into the store from outside."""
        self.store.wrote()
        self.progress.seen += 1

    def _after_attention(self, query: Tensor, weights: Tensor | None, attention: dict[str, Any]) -> None:
        when, length, shared = self.shared.settings.method.when, query.shape[2], self.shared
        if self.attention is None:
            self.progress.query_heads, self.attention = query.shape[1], attention
        hidden, self.hidden = self.hidden, None
        if self._observes():
            self._hear(Latest(query, weights, hidden, self.progress.prefilling))
        if length > 1 and self.store.held.codec.meets_queries and shared.positions.positions is not None:
            self.store.meet(query.detach(), shared.positions.positions[:, -length:])
        if (length == 1 and not self.progress.prefilling) or not shared.compressing:
            return
        if self.progress.prefilling and when.prefill is not None:
            self.progress.pending = True
            if when.prefill == "immediate" and not self.info.is_shared and not self.progress.record_past:
                compress(self, query)
                if self.info.rank == self.info.ranks - 1:
                    compress_waiting(shared)
                    shared.restart()
        if not self.info.is_shared:  # or other layers still have to attend to what this forward appended
            self.store.after_prefill()

    def _hear(self, latest: Latest) -> None:
        """Let the score see the latest forward: later, if it is short enough to be kept until the next one begins."""
        length = latest.query.shape[2]
        self.latest = latest
        if self.shared.observing or torch.compiler.is_compiling() or (length > HELD and not self.progress.record_past):
            self.listen()
        elif length > HELD:  # a prompt with drafts behind it: only these may be taken back
            self._observe(latest, length - HELD)
            self.latest = latest.part(slice(-HELD, None), copy=True)

    def listen(self) -> None:
        """Let the score see what is left of the latest forward."""
        if self.latest is not None:
            latest, self.latest = self.latest, None
            self._observe(latest, latest.query.shape[2])

    def _observe(self, latest: Latest, count: int) -> None:
        """Let the score see the first ``count`` tokens of ``latest``, as if no more had come."""
        rest = latest.query.shape[2] - count
        view, score = (
            view_of(self, latest.query[:, :, :count], live=True, later=rest),
            self.shared.settings.method.score,
        )
        view.prompt = latest.prompt
        view.hidden = None if latest.hidden is None else latest.hidden[:, :count]
        if latest.weights is not None:
            view.weights = latest.weights * (view.query_positions >= 0)[:, None, None]
        score.observe(view)
        if view.spans is not None:
            score.observe_spans(view)
        looked_at = not isinstance(view.slots, SlotsOnDemand) or view.slots.gathered
        if looked_at and not self.store.views_share_memory:
            self.store.write_stats(view.slots.stats)
        if not torch.compiler.is_compiling():
            self.heard = self.get_seq_length() - rest

    # --- the schedule ------------------------------------------------------------------------------------------

    def compress_if_due(self, prefilling: bool, due: Tensor | None) -> None:
        """Before a forward: run the compression that waited for it, or that of the rows ``due``, (B,) bool. prefilling:
        the forward reads a prompt."""
        when, shared, progress = self.shared.settings.method.when, self.shared, self.progress
        if self._is_traced(1):
            progress.seen = shared.positions.columns  # one-token steps are not counted where they are traced
        progress.prefilling = prefilling
        if not shared.compressing or not self.is_initialized:
            return
        late = not prefilling or progress.record_past or (self.info.is_shared and when.prefill == "immediate")
        if progress.pending and late:
            compress(self)
        elif due is not None:
            compress(self, rows=due)

    def begin_step(self, reading: bool) -> None:
        """Runs after due compressions, before a forward: drops score state that the next compression cannot use, and
        readies the store. reading: the forward reads a prompt."""
        shared = self.shared
        no_more = not shared.settings.method.when.recurs and not shared.observing
        if shared.compressing and self.is_initialized and not self.progress.prefilling and no_more:
            self.drop_score_state()
        if self.info.is_shared and self.is_initialized:
            self.store.after_prefill()
        if not reading:
            self.store.begin_decode()

    def drop_score_state(self) -> None:
        """Forget what no compression can need before the next prompt: all but what spans remember."""
        self.score_state = {name: x for name, x in self.score_state.items() if name.startswith("span_")}
        self.latest = None

    # --- copies ------------------------------------------------------------------------------------------------

    def copy(self, shared: CacheState, rows: Tensor | None = None) -> Layer:
        """An independent copy that belongs to ``shared``, of the ``rows`` (R,) int64 if they are given."""
        held = shared.knowing(replace(self.store.held, room=shared.settings.room))
        twin = Layer(self.info, self.form, shared, self.store.clone(held) if rows is None else self.store.empty(held))
        twin.attention, twin.latest, twin.heard = self.attention, self.latest, self.heard
        twin.tally, twin.progress = replace(self.tally), replace(self.progress)
        twin.score_state = (
            {name: x.clone() for name, x in self.score_state.items()} if rows is None else self.score_state
        )
        if self.is_initialized:
            twin.is_initialized, twin.dtype, twin.device = True, self.dtype, self.device
        if self.is_initialized and rows is not None:
            shares = not self.store.compileable  # until the rows are picked; those of fixed buffers are picked in place
            twin.store.restore({name: x if shares else x.clone() for name, x in self.store.tensors().items()})
            twin._index(rows)
        return twin

    def check_input(self, kwargs: dict[str, Any]) -> None:
        """Refuse what attention over compressed slots would silently ignore."""
        for name in ("position_bias", "indices", "block_indices"):
            if kwargs.get(name) is not None:
                raise UnsupportedModel(
                    f"layer {self.info.index} passes {name!r} to attention, which is defined over every past token; "
                    "a compressed cache cannot honour it. Use transformers' DynamicCache with this model."
                )
        if kwargs.get("output_attentions"):
            raise UnsupportedInput(
                "output_attentions=True: a compressed cache has no weight per past token; leave it out"
            )


def is_ours(cache: Any) -> bool:
    """Whether ``cache`` has a layer that keepkv compresses."""
    return any(isinstance(layer, Layer) for layer in getattr(cache, "layers", ()))
