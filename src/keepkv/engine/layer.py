"""One layer of a cache: keeps slots in a store, attends to them, and compresses them when due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from keepkv.attention.attend import attend
from keepkv.attention.part import Part
from keepkv.core.rope import Rope
from keepkv.engine import latent
from keepkv.engine.compression import Tally, compress
from keepkv.engine.handle import KVHandle
from keepkv.engine.mask_rule import MaskRule
from keepkv.engine.stock import plain_attention
from keepkv.engine.view import look
from keepkv.errors import CacheStateError, UnsupportedInput, UnsupportedModel
from keepkv.store.base import Store

if TYPE_CHECKING:
    from keepkv.engine.state import Plan


@dataclass(frozen=True)
class Place:
    """Where a layer stands in the model. index: among all layers; rank of ranks: among the compressible ones."""

    index: int
    rank: int
    ranks: int
    rope: Rope | None = None
    is_latent: bool = False
    is_shared: bool = False  # other layers attend to this layer's slots


class Layer(CacheLayerMixin):
    """The cache layer that transformers sees. ``get_seq_length`` is logical: what is stored is private."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, place: Place, plan: Plan, store: Store) -> None:
        super().__init__()
        self.place = place
        self.plan = plan
        self.store = store
        self.state: dict[str, Tensor] = {}  # per-row statistics of the score
        self.tally = Tally()
        self.seen = 0  # columns fed to this layer
        self.pending = False  # a prefill waits for its deferred compression
        self.decoded = 0  # one-token forwards since the last compression
        self.compressed = False  # the store holds something else than every token in order
        self.record_past = False  # the newest tokens may be rolled back
        self.prefilling = False  # the forward that runs reads a prompt
        self.attention: dict[str, Any] | None = None  # scaling, softcap and sinks, as the model calls attention
        self.query_heads = 0

    # --- what transformers calls -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.store.compileable

    @property
    def batch_size(self) -> int:
        seen = self.plan.clock.seen
        return -1 if seen is None else seen.shape[0]

    def get_seq_length(self) -> int:
        if torch.compiler.is_compiling():
            return self.plan.clock.columns_tensor  # type: ignore[return-value]
        return self.plan.clock.columns if self._is_traced(1) else self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store T new tokens; returns handles that only the "keepkv" attention function can use, or for latent
        attention the latents that the model expands itself."""
        clock, length = self.plan.clock, key_states.shape[2]
        if self._is_traced(length):  # nothing that changes from step to step may be read as a Python number
            assert clock.positions is not None
            self.store.append(key_states, value_states, clock.positions)
            if self.place.is_latent:
                return key_states, value_states
            return KVHandle(self, key_states, 1), KVHandle(self, value_states, 1)
        if clock.positions is None or clock.columns != self.seen + length:
            raise UnsupportedModel(
                f"layer {self.place.index} was given {length} tokens that no attention mask announced: the model does "
                "not build its mask through transformers' mask interface, or its attention implementation is not "
                "'keepkv'. Make the cache with keepkv.Cache(model, …) and leave the implementation as it is."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states.detach(), value_states.detach(), clock.positions)
        self.seen += length
        if self.place.is_latent:
            if not self._is_plain():
                return key_states, value_states
            part = next(iter(self.store.parts()))
            return part.keys, part.values
        return KVHandle(self, key_states, self.seen), KVHandle(self, value_states, self.seen)

    def _is_traced(self, length: int) -> bool:
        return length == 1 and self.store.compileable and not self.store.is_plain

    def _is_plain(self) -> bool:
        return not self.compressed and self.store.is_plain

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
        self.store.index(rows)
        self.state = {name: x.index_select(0, rows) for name, x in self.state.items()}
        for name in ("merged", "dropped", "votes_dropped", "mass_dropped"):
            count = getattr(self.tally, name)
            if count is not None:
                setattr(self.tally, name, count.index_select(0, rows))

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        tokens = abs(tokens_to_remove)
        if tokens == 0 or not self.is_initialized:
            return
        if tokens > self.store.tail:
            raise CacheStateError(
                f"crop({tokens_to_remove}): only the {self.store.tail} tokens since the last compression can be taken "
                "back. Copy the cache before (cache.copy()), or compress less often."
            )
        self.store.crop(tokens)
        self.seen -= tokens
        self.decoded = max(0, self.decoded - tokens)

    def reset(self) -> None:
        self.store = self.store.empty()
        self.state, self.tally = {}, Tally()
        self.seen, self.decoded = 0, 0
        self.pending = self.compressed = self.record_past = self.prefilling = self.is_initialized = False

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
        is_own = getattr(module, "layer_idx", self.place.index) == self.place.index  # not a layer sharing our slots
        absorbed = latent.absorb_query(module, query) if self.place.is_latent else query
        weights = None
        if self._is_plain():
            part = next(iter(self.store.parts()))
            keys, values = dense or (part.keys, part.values)
            out = plain_attention(
                module, query, keys, values, rule.dense(), scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs
            )
        else:
            parts = map(latent.absorbed_part, self.store.parts()) if self.place.is_latent else self.store.parts()
            block = None if query.shape[2] == 1 else rule.new_block()
            out, weights = attend(
                absorbed, parts, scaling, block=block, softcap=softcap, sinks=s_aux, weights=is_own and self._counts()
            )
            out = latent.expand_output(module, out) if self.place.is_latent else out
            out = out.transpose(1, 2).contiguous()
        if is_own:
            self._after_attention(absorbed, weights, scaling, softcap, s_aux)
        return out

    def _counts(self) -> bool:
        """Whether the score follows the attention of every token decoded."""
        method = self.plan.method
        return self.plan.compressing and method.when.every is not None and method.score.follows_decode

    def _after_attention(
        self, query: Tensor, weights: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> None:
        when, length = self.plan.method.when, query.shape[2]
        if self.attention is None:
            self.query_heads = query.shape[1]
            self.attention = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        if not self.plan.compressing:
            return
        if self.plan.method.score.observes and (when.every is not None or (self.prefilling and when.prefill)):
            self._observe(query, weights)
        if length == 1:
            return
        if self.prefilling and when.prefill is not None:
            self.pending = True
            if when.prefill == "immediate" and not self.place.is_shared and not self.record_past:
                self.compress(query)
                if self.place.rank == self.place.ranks - 1:
                    flush(self.plan)
        if not self.place.is_shared:  # or other layers still have to attend to what this forward appended
            self.store.settle()

    def _observe(self, query: Tensor, weights: Tensor | None) -> None:
        view = look(self, query, live=True)
        if weights is not None:
            view.weights = weights * (view.query_positions >= 0)[:, None, None]
        self.plan.method.score.observe(view)
        if view.spans is not None:
            self.plan.method.score.observe_spans(view)
        if not self.store.views_share_memory:
            self.store.put(view.slots.stats)

    # --- compression -------------------------------------------------------------------------------------------

    def settle_due(self, length: int) -> None:
        """Before a forward of ``length`` tokens: run, or announce to ``flush``, the compression that was deferred."""
        when, plan = self.plan.method.when, self.plan
        if self._is_traced(1):
            self.seen = plan.clock.columns  # one-token steps are not counted where they are traced
        # With rollback on, several tokens at once are a verification, unless they are the first.
        self.prefilling = length > 1 and not (self.record_past and self.seen)
        if plan.compressing and self.is_initialized:
            late = length == 1 or self.record_past or (self.place.is_shared and when.prefill == "immediate")
            if (self.pending and late) or (when.every is not None and self.decoded >= when.every):
                self.compress()

    def begin_step(self, length: int) -> None:
        """Before a forward of ``length`` tokens, after all that was due: count, and let go what is not needed."""
        when, plan = self.plan.method.when, self.plan
        if plan.compressing and self.is_initialized and not self.prefilling and when.every is None:
            self.forget()
        self.decoded += 0 if self.prefilling else length
        if self.place.is_shared and self.is_initialized:
            self.store.settle()
        if length == 1:
            self.store.begin_decode()

    def compress(self, query: Tensor | None = None) -> None:
        """Compress now, if any row holds more than its budget; where layers share one, when ``flush`` is called."""
        if not self.plan.method.allocate.joint:
            run([self], query)
        elif self not in self.plan.due:
            self.plan.due.append(self)

    def forget(self) -> None:
        """Let go what no compression can need before the next prompt: all but what spans remember."""
        self.state = {name: x for name, x in self.state.items() if name.startswith("span_")}

    def copy(self, plan: Plan) -> Layer:
        """An independent copy that belongs to ``plan``."""
        twin = Layer(self.place, plan, self.store.clone())
        twin.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("plan", "store", "state", "tally")})
        twin.state = {name: x.clone() for name, x in self.state.items()}
        twin.tally = Tally(**self.tally.__dict__)
        return twin

    def part(self) -> Part:
        """The first rectangle of slots, for what asks for sizes."""
        return next(next(iter(self.store.parts())).rectangles())

    def check_input(self, kwargs: dict[str, Any]) -> None:
        """Refuse what attention over compressed slots would silently ignore."""
        for name in ("position_bias", "indices", "block_indices"):
            if kwargs.get(name) is not None:
                raise UnsupportedModel(
                    f"layer {self.place.index} passes {name!r} to attention, which is defined over every past token; "
                    "a compressed cache cannot honour it. Use transformers' DynamicCache with this model."
                )
        if kwargs.get("output_attentions"):
            raise UnsupportedInput(
                "output_attentions=True: a compressed cache has no weight per past token; leave it out"
            )


def run(layers: list[Layer], query: Tensor | None = None) -> None:
    """Compress ``layers`` together. Where that raises they are still due."""
    done = compress(layers, query)
    for layer in layers:
        layer.compressed |= done
        layer.pending, layer.decoded = False, 0


def flush(plan: Plan) -> None:
    """Compress the layers that wait for each other, because they share one budget."""
    layers, plan.due = plan.due, []
    if layers:
        run(layers)
