"""The cache a user makes: ``cache = keepkv.Cache(model, budget=0.1)``."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import cache_utils as stock

from keepkv.core.budget import Budget
from keepkv.core.calibration import Given, check_calibration, loaded, of_layer
from keepkv.core.options import keywords
from keepkv.core.rope import axes_of
from keepkv.core.tensorfile import MAX_FILE
from keepkv.core.when import When
from keepkv.engine import forward, persistence, rows
from keepkv.engine.attached import Attachment, attach
from keepkv.engine.busy import running
from keepkv.engine.changes import as_written, changed
from keepkv.engine.compression import compress, compress_waiting, end_prompt
from keepkv.engine.devices import input_device
from keepkv.engine.files.origin import Origin
from keepkv.engine.fingerprint import fingerprint, shape
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule, note_cache
from keepkv.engine.model import inner_model, prepare_model
from keepkv.engine.positions import RowPositions
from keepkv.engine.receipt import Receipt, make_receipt, summary
from keepkv.engine.selecting import check_selection
from keepkv.engine.state import CacheState, Settings
from keepkv.engine.stock_layers import free_past
from keepkv.engine.transient import transient
from keepkv.errors import BudgetError, KeepKVError, UnsupportedModel
from keepkv.kernels.dispatch import prepare
from keepkv.methods import DEFAULT, Method, make_method
from keepkv.select import Select, make_select
from keepkv.spans import RowSpans, Span, SpanPolicy
from keepkv.store import CODECS, STORES, Held, choose, guarded, settled


class Cache(stock.Cache):
    """A key-value cache that compresses itself; pass it to ``generate`` or a forward as ``cache``.

    Before transformers 5.24 that argument is called ``past_key_values``.

    model: switched to the attention implementation "keepkv" (its text part) until its last cache goes; refused with
        ``UnsupportedModel`` if it cannot be served.
    method: a name from ``keepkv.methods()`` or of a preset (``keepkv methods --advise``), with its options as keywords,
        or a ``keepkv.Method``. "auto": what measured best where the question is not known; given gates as
        ``calibration``, that is "keepkv3".
    budget: share of the tokens (float), slots per KV head (int), or bytes for the whole cache ("256MiB").
    store: layout of the slots: "auto", "dense", "ragged", "static" (compiled decode), or one of your own.
    codec: how keys and values are written: "none", "int8", "int4", "hadamard" …, one of your own, or "auto": what the
        budget asks for, so that its bytes are split over slots and bits (``store.codec.settled`` has the rule).
    store_options, codec_options: of the two.
    seed: of methods that draw at random.
    spans: parts of the prompt that share the budget fairly or are protected: a list of ``keepkv.Span`` for every row, a
        list of such lists, or a ``keepkv.SpanPolicy``.
    calibration: a ``keepkv.Calibration``, its file, or several of them, for methods that need to know the model.
    select: which of the older slots a decoded token attends to: "exact", "codes", …, or a ``keepkv.Select``; None: all.
    selected: how many of each KV head, or which share (float). select_options: further options of the selection.

    A cache belongs to one conversation (or one batch of them): reuse needs ``reset``, ``copy`` or a new cache. It is
    for inference: gradients do not flow through it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = DEFAULT,
        budget: Budget | float | int | str | None = None,
        *,
        store: str | None = None,
        codec: str = "none",
        store_options: dict[str, Any] | None = None,
        codec_options: dict[str, Any] | None = None,
        seed: int = 0,
        spans: SpanPolicy | Sequence[Span] | Sequence[Sequence[Span]] | None = None,
        calibration: Given = None,
        select: str | Select | None = None,
        selected: int | float | None = None,
        select_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        known = loaded(calibration)
        model, chosen = inner_model(model), make_method(method, options, [one.kind for one in known])
        if budget is None and chosen.name != "full":
            raise BudgetError(
                f"method {chosen.name!r} needs a budget, e.g. budget=0.1 or budget=1024 or budget='256MiB'"
            )
        policy = None if spans is None else SpanPolicy.of(spans)
        selection = make_select(select, selected, keywords("Cache", "select_options", select_options))
        asked = Budget.of(1.0 if budget is None else budget)
        self.layout, codec = choose(store or chosen.store, codec, chosen.allocate.ragged)
        self.store_options = keywords("Cache", "store_options", store_options)
        given = keywords("Cache", "codec_options", codec_options)
        self.codec, self.codec_options = settled(codec, given, asked)
        writes = CODECS.build(self.codec, **self.codec_options)
        chosen = as_written(chosen, writes)
        settings = Settings(chosen, asked, seed, policy, select=selection)
        held = Held(settings.stats, chosen.reduce.merges, writes, settings.room)
        template = guarded(STORES.build(self.layout, held, **self.store_options))
        unrotated = self.codec if held.codec.unrotated else None
        with running(model):  # or the last of other caches, which may go now, would put its attention back meanwhile
            prepared = prepare_model(model, chosen, template.static_length, unrotated)
            self.attached: Attachment | None = attach(model)
        check_selection(selection, template, writes, prepared.ours.values())
        pieces = (chosen.score, chosen.allocate, chosen.reduce, held.codec, template, selection)
        calibrations = check_calibration(pieces, known, lambda: fingerprint(model), prepared.ours)
        self.attached_config, self.origin = shape(model), Origin(model)
        layers = list(prepared.stock)
        others = [layer for i, layer in enumerate(layers) if i not in prepared.ours]
        settings = replace(settings, calibrations=calibrations)
        spans_of_rows = None if settings.policy is None else RowSpans(settings.policy)
        positions = RowPositions(axes_of(model.config.get_text_config(decoder=True)))
        self.shared = CacheState(settings, spans=spans_of_rows, others=others, positions=positions)
        device = input_device(model)
        if template.ragged or held.codec.exact is not None:  # a rectangle of numbers is read by torch
            prepare(device)
        for index, (info, form) in prepared.ours.items():
            if held.codec.meets_queries and form.one_content:
                raise UnsupportedModel(
                    f"codec {self.codec!r} drops channels of keys that queries do not ask for, and "
                    f"{type(model).__name__} caches one latent for keys and values. Choose another, such as 'int4'."
                )
            mine = of_layer(calibrations, index, device)
            its = held.codec.for_layer(info, mine)
            own = self.shared.knowing(replace(held, layer=form.of_stored(info), calibration=mine, codec=its))
            layers[index] = Layer(info, form, self.shared, template.empty(own))
        self.made = len(layers)
        super().__init__(layers=layers)

    # --- for users ---------------------------------------------------------------------------------------------

    @property
    def compressible(self) -> tuple[Layer, ...]:
        """The layers that are compressed; transformers keeps the others as they are."""
        return tuple(layer for layer in self.layers if isinstance(layer, Layer))

    @property
    def settings(self) -> Settings:
        """What was asked for: method, budget, seed, spans."""
        return self.shared.settings

    @property
    def seen(self) -> Tensor:
        """(B,) int64: tokens of each row so far, padding not counted; (0,) before the first forward."""
        seen = self.shared.positions.seen
        return torch.zeros(0, dtype=torch.int64) if seen is None else seen.clone()

    def report(self) -> Receipt:
        """The receipt: what was asked, kept, merged, dropped, and what it weighs now."""
        return make_receipt(self.layers, self.shared, self.codec, self.codec_options)

    def __repr__(self) -> str:
        return f"keepkv.Cache({summary(self.layers, self.shared) if 'shared' in self.__dict__ else 'not made yet'})"

    @property
    def compressing(self) -> bool:
        """Whether compressions run when they fall due. Set to False to ask questions about a compressed context
        without compressing the questions and answers; what was remembered for the next compression is then freed."""
        return self.shared.compressing

    @compressing.setter
    def compressing(self, value: bool) -> None:
        self.shared.compressing = value
        if not value:
            for layer in self.compressible:
                layer.listen()
                layer.score_state.clear()

    def compress(self, budget: Budget | float | int | str | None = None) -> None:
        """Run now, in every layer, the compression that is due or pending; to be used when the prefill schedule is
        "deferred" and no token is decoded yet. budget: what this one leaves, and those that follow."""
        self.renew()
        if budget is not None:
            self.shared.settings = replace(self.settings, budget=Budget.of(budget))
        read = [layer for layer in self.compressible if layer.progress.seen]
        for layer in read:
            layer.listen()
        end_prompt(read)
        for layer in read:
            compress(layer)
        compress_waiting(self.shared)
        self.shared.restart()
        for layer in self.compressible:
            if not self.settings.method.when.recurs:
                layer.drop_score_state()

    def transient(self) -> AbstractContextManager[None]:
        """Inside, whatever is read and decoded leaves no trace: it is never compressed, no score sees it, and it is
        taken back at the end. A question, say, that later ones shall not depend on."""
        return transient(self)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a forward of one token is the last chunk of a prompt, or all of it, rather than a decoded token.

        For prompts that are fed by hand; ``generate`` is seen to read its prompt.
        """
        before, self.shared.reading = self.shared.reading, True
        try:
            yield
        finally:
            self.shared.reading = before

    def kept_positions(self, layer: int) -> Tensor:
        """(B,H,S) int32: the token each slot of ``layer`` came from, counted in its row without padding; −1 empty."""
        mine = self.layers[layer]
        if not isinstance(mine, Layer):
            raise KeepKVError(f"layer {layer} is {type(mine).__name__}, which transformers keeps as it is")
        return mine.store.view().positions.clone()

    def copy(
        self,
        *,
        budget: Budget | float | int | str | None = None,
        when: When | None = None,
        method: Method | None = None,
        observing: bool = False,
    ) -> Cache:
        """An independent copy: compress a context once, ask many questions.

        budget, when, method: those of the copy, where they are to be others. Nothing is compressed yet: call
        ``compress`` on the copy, or go on. Another method must be able to do with what this one's score remembered.
        observing: the copy never compresses, and its score sees every token that is fed.
        """
        settings = changed(self, budget, when, method, observing)
        asked = replace(self.shared.asked or settings, method=settings.method)
        twin = copying.copy(self)
        twin.shared = self.shared.copy(settings, asked if budget is None else replace(asked, budget=settings.budget))
        if observing:
            twin.shared.observing, twin.shared.compressing = True, False
        twin.layers = [x.copy(twin.shared) if isinstance(x, Layer) else copying.deepcopy(x) for x in self.layers]
        twin.shared.others = [x for x in twin.layers if not isinstance(x, Layer)]
        return twin

    def join(self, other: Cache) -> None:
        """Add the rows of ``other`` behind those of this cache; ``other`` is empty afterwards.

        Both were made alike: model, method and options, budget, store and codec. Their rows then decode as one batch,
        each as if it were alone; ragged stores hold no padding for the shorter ones. Compressions that waited for the
        first decoded token run now. The next forward takes ``attention_mask(1)``.
        """
        rows.join(self, other)

    def split(self, which: Sequence[int]) -> Cache:
        """Take the rows ``which`` out of this cache, as a cache of their own; the others stay.

        The next forward of either takes its own ``attention_mask(1)``.
        """
        self.renew()
        twin: Cache = rows.split(self, which)
        return twin

    def attention_mask(self, new: int = 1) -> Tensor:
        """(B, columns + new) int64: 1 for tokens, 0 for the padding in front of shorter rows. For rows without padding
        between their tokens."""
        return rows.attention_mask(self, new)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self.copy()

    def save(self, path: str | Path, *, key: bytes | None = None) -> None:
        """Write the cache to a safetensors file, whole or not at all. The file is as confidential as the prompt, which
        can be read out of it.

        key: signs the file, so that ``load`` with the same key takes no other. Raises ``CacheFileError`` where the file
        cannot be written, ``CacheStateError`` where the cache cannot be.
        """
        persistence.save(self, Path(path), key)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        method: Method | None = None,
        *,
        calibration: Given = None,
        strict: bool = True,
        key: bytes | None = None,
        max_bytes: int = MAX_FILE,
    ) -> Cache:
        """Read what ``save`` wrote.

        ``method`` is needed only if the cache was made with a ``Method`` without a name; ``calibration`` if it was made
        with one, and it must be the same. strict: refuse a model with other weights, settings or adapters; False warns
        of them instead, and a model of another shape is refused all the same. key: take only what was signed with it.
        max_bytes: the largest file that is read.

        Everything in the file is checked before anything is made of it. Raises ``CacheFileError`` where the file cannot
        be read, is truncated, altered, foreign or of another model, ``CalibrationError`` where the calibration is
        another.
        """
        wanted = persistence.Wanted(method, calibration, strict, key, max_bytes)
        return persistence.load(cls, Path(path), inner_model(model), wanted)

    # --- for transformers --------------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not isinstance(self.layers[layer_idx], stock.CacheLayerMixin):
            # As transformers does: a mask asked for at a recurrent layer is that of the first attention layer.
            layer_idx = next((i for i, x in enumerate(self.layers) if isinstance(x, stock.CacheLayerMixin)), layer_idx)
        note_cache(self, layer_idx)
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx >= len(self.layers):  # transformers would append a layer that nothing compresses
            raise UnsupportedModel(
                f"the model caches layer {layer_idx}, and its configuration has {len(self.layers)}: it goes through "
                "them several times. Use transformers' DynamicCache with it."
            )
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if key_states.shape[2] > 1 and not torch.compiler.is_compiling():
            free_past(self.layers[layer_idx])
        return given

    def begin_step(self, rule: MaskRule, layer_idx: int) -> None:
        """A forward begins: called when its mask rule is made; a second mask of the same forward changes nothing."""
        if not isinstance(self.layers[layer_idx], Layer):
            return
        self.renew()
        forward.begin(self, rule)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is not None:
            self._stamp(layer_idx)
        known: bool = super().has_previous_state(layer_idx, state_idx)
        return known

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._stamp(layer_idx)  # of one token, which is then written in place
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self._stamp(layer_idx)
        out: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return out

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        out: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        self._stamp(layer_idx, ended=True)
        return out

    def _stamp(self, layer: int, ended: bool = False) -> None:
        """A recurrent state has no length: the forward that began to change it, and the one that did, are noted."""
        if not torch.compiler.is_compiling():
            self.shared.begun[layer] = self.shared.forwards
            if ended:
                self.shared.ended[layer] = self.shared.forwards

    def renew(self) -> None:
        """Tensors made in inference mode cannot be written to outside of it: take copies, once."""
        inside = torch.is_inference_mode_enabled()
        if self.shared.inference and not inside:
            rows.copy_all(self)
        self.shared.inference = inside

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.renew()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.shared.index(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows.check_movable(self)
        self.renew()
        which = torch.arange(max(0, self.batch_size)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self.shared.index(which)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows.check_movable(self)
        self.renew()
        which = torch.arange(max(0, self.batch_size))[indices.cpu()]
        super().batch_select_indices(indices)
        self.shared.index(which)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest columns, given as a negative number: at most those since the last compression, and no
        more than the score has not taken into account (``engine.layer.HELD`` of the latest forward)."""
        self.renew()
        rows.crop(self, tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.shared.reset()
