"""Bytes that a model, a cache and a method take together, found with tensors that have no memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import StaticCache

from keepkv.core.budget import Budget
from keepkv.core.calibration import Calibration, check_calibration, of_layer
from keepkv.core.layer_info import LayerInfo
from keepkv.engine import allowance
from keepkv.engine.examine import model_of
from keepkv.engine.fingerprint import facts_of
from keepkv.engine.interface import NAME
from keepkv.engine.layer import Layer
from keepkv.engine.model import prepare_model, set_attention
from keepkv.engine.shrink import shrink
from keepkv.engine.state import CacheState, Settings
from keepkv.engine.stock_layers import free_past
from keepkv.plan.dry import META, DryCache, DryLayer
from keepkv.plan.live import Fused, Live
from keepkv.plan.network import Network
from keepkv.plan.sample import NOTHING, Costs, Sample, Shape, sees_more
from keepkv.store import STORES, Held
from keepkv.store.base import Store, allocated, tensors_in
from keepkv.store.codec import Codec

SEEN = 256  # tokens of a sample after which a score remembers as much as it ever will


@dataclass(frozen=True)
class Choice:
    """What a cache is made with, as ``keepkv.Cache`` takes it: settings, the name and options of its store, what a
    store is made for, and calibrations of whatever kinds."""

    settings: Settings
    layout: str
    options: dict[str, Any]
    held: Held
    known: tuple[Calibration, ...] = ()

    def checked(self, facts: dict[str, Any], layers: Collection[int]) -> Choice:
        """With the calibrations by kind, if any are known. Raises ``CalibrationError`` where one is not of the model of
        ``facts`` and its ``layers``, is not needed, or is missing beside others."""
        if not self.known:
            return self
        method = self.settings.method
        pieces = (method.score, method.allocate, method.reduce, self.held.codec, self.store(self.held))
        found = check_calibration(pieces, self.known, lambda: facts, layers)
        return replace(self, settings=replace(self.settings, calibrations=found))

    def of_layer(self, info: LayerInfo, device: str = "cpu") -> Held:
        """What the store of one layer is made for, what its codec knows of it on ``device``."""
        if not self.known:
            return replace(self.held, layer=info)
        mine = of_layer(self.settings.calibrations, info.index, torch.device("cpu"))
        codec = self.held.codec.for_layer(info, mine)
        return replace(self.held, layer=info, calibration=mine, codec=_on(codec, device))

    def store(self, held: Held) -> Store:
        """An empty store."""
        return STORES.build(self.layout, held, **self.options)


def _on(codec: Codec, device: str) -> Codec:
    """``codec`` with its tensors on ``device``."""
    twin = copy.copy(codec)
    for name, x in vars(codec).items():
        if isinstance(x, torch.Tensor):
            object.__setattr__(twin, name, x.to(device))
        elif isinstance(x, dict):
            moved = {key: y.to(device) if isinstance(y, torch.Tensor) else y for key, y in x.items()}
            object.__setattr__(twin, name, moved)
    return twin


class Full:
    """The model with transformers' own cache."""

    def __init__(self, network: Network) -> None:
        self.network = network

    @lru_cache(maxsize=1024)  # noqa: B019
    def peak(self, context: int, batch: int, chunk: int | None) -> int:
        """Bytes beside the weights at the peak of reading ``context`` tokens, ``chunk`` at a time, into ``batch`` rows.
        The last chunk is the largest but for its own length, so that the last two are looked at."""
        chunk = min(chunk or context, context)
        ends = {context, context - context % chunk} - {0}
        return max(self._peak(end - ((end - 1) % chunk + 1), end, batch) for end in ends)

    def held(self, context: int, batch: int) -> int:
        """Bytes of the cache when all is read."""
        return sum(self.stock_bytes(context, batch))

    def stock_bytes(self, context: int, batch: int) -> list[int]:
        """Bytes that transformers' cache holds, by layer."""
        small = self._settled
        if context <= 2 * small:
            return list(self._stock(context, batch)[1])
        one, two = (self._stock(tokens, batch)[1] for tokens in (small, 2 * small))
        return [a + (b - a) * (context - small) // small for a, b in zip(one, two, strict=True)]

    @cached_property
    def _settled(self) -> int:
        """Tokens from which on windows are full."""
        windows = [getattr(layer, "sliding_window", None) or 0 for layer in self.network.stock_layers()]
        return 16 + max(windows, default=0)

    @lru_cache(maxsize=64)  # noqa: B019
    def _stock(self, context: int, batch: int) -> tuple[list[Any], list[int]]:
        """Layers of transformers' cache that have read ``context`` tokens, those that are like another empty; and the
        bytes of each."""
        cache = self._plain_cache()
        with self._attending(self.network.attention), Live(), Fused(self.network.cpu):
            self.network.read(cache, batch, context)
        for layer in cache.layers:
            free_past(layer)
        return cache.layers, [sum(x.nbytes for x in tensors_in(cache.layers[index])) for index in self.network.stand_in]

    def _plain_cache(self) -> Any:
        return DynamicCache(config=self.network.text)

    @contextmanager
    def _attending(self, implementation: str) -> Iterator[None]:
        before = set_attention(self.network.model, implementation)
        try:
            yield
        finally:
            set_attention(self.network.model, before)

    def _peak(self, past: int, end: int, batch: int) -> int:
        cache = self._plain_cache()
        with self._attending(self.network.attention), Live() as live, Fused(self.network.cpu):
            if past:
                self._read(live, cache, batch, past)
            live.restart()
            self.network.read(cache, batch, end - past)
            peak: int = live.peak
        # A window is a view into all that was read at once, which stays alive with it.
        return peak + sum(
            allocated(tensors_in(cache.layers[like])) for i, like in enumerate(self.network.stand_in) if like != i
        )

    def _read(self, live: Live, cache: Any, batch: int, tokens: int) -> None:
        with live.unwatched():
            self.network.read(cache, batch, tokens)


class Compressed(Full):
    """The model with a cache of keepkv. context: tokens for which costs are measured.

    Raises ``UnsupportedModel`` where the model is refused.
    """

    def __init__(self, network: Network, config: PreTrainedConfig, choice: Choice, context: int) -> None:
        super().__init__(network)
        self.choice, self.method, self.context = choice, choice.settings.method, context
        self.static = choice.store(choice.held).static_length
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            small = model_of(shrink(config))
            self.ours = prepare_model(small, self.method, self.static).ours
            facts = {**facts_of(config.get_text_config(decoder=True)), "adapters": [], "weights": None}
            facts |= {"name": config._name_or_path, "unread": "only the configuration is read here"}
            self.choice = choice.checked(facts, self.ours)
        self.notes = list({str(one.message): None for one in said})
        self._costs: dict[tuple[Shape, int], Costs] = {}

    # --- what is held ------------------------------------------------------------------------------------------------

    def _plain_cache(self) -> Any:
        if self.static is None:
            return super()._plain_cache()
        return StaticCache(config=self.network.text, max_cache_len=self.static)

    def held(self, context: int, batch: int) -> int:
        stock = self.stock_bytes(context, batch)
        return sum(
            self._bytes(i, self.slots(i, context, batch), context, batch) if i in self.ours else size
            for i, size in enumerate(stock)
        )

    @lru_cache(maxsize=4096)  # noqa: B019
    def slots(self, index: int, seen: int, batch: int) -> int:
        """Slots of each head of layer ``index`` that are left of ``seen`` tokens."""
        if self.method.when.prefill is None:
            return seen
        with torch.device("cpu"), warnings.catch_warnings():  # not on "meta", though a forward is there
            warnings.simplefilter("ignore")
            layer, rows = self._sample_layer(index, batch), torch.full((batch,), seen)
            layer.shared.positions.seen = rows
            allowance.check_buffers(layer)
            budget = allowance.layer_budget(layer)
            allowance.check(layer, budget, budget < rows)
            return min(seen, int(budget.max()))

    def _bytes(self, index: int, slots: int, seen: int, batch: int) -> int:
        """Bytes of layer ``index`` with ``slots`` a head of ``seen`` tokens."""
        layer = self._sample_layer(index, batch)
        store, codec, heads = layer.store, layer.store.held.codec, layer.store.lengths.shape[1]
        sizes, state = store.slot_bytes(), 0
        if self.method.when.recurs:
            state = batch * self._state(index)
        if self.static is not None:
            return batch * self.static * (sizes.content + sizes.beside) + 8 + state
        (several, of_group), (exact_slots, more) = store.groups, store.exact_slots
        if slots < seen:
            again = slots if self.method.reduce.merges else 0  # slots that merge are written in groups of their own
            groups = min(slots, -(-seen // several) + -(-again // several)) if several else 0
            rest = store.row_bytes + of_group * groups + more * min(slots, exact_slots)
            return batch * (slots * (sizes.content + sizes.beside) + rest) + state
        beside = heads * replace(store.held, votes=False).beside
        exact = min(seen, codec.exact) if codec.exact is not None else seen
        rest = (store.shared_bytes + more * exact_slots) * (exact < seen)
        rest += of_group * -(-(seen - exact) // several) if several else 0
        return batch * (exact * (sizes.plain + beside) + (seen - exact) * (sizes.content + beside) + rest) + state

    # --- samples -----------------------------------------------------------------------------------------------------

    def _sample_layer(self, index: int, batch: int) -> Layer:
        """A layer like layer ``index``, as a compression of ``batch`` rows sees it."""
        return self._sample_layers(index, batch)

    @lru_cache(maxsize=1024)  # noqa: B019
    def _sample_layers(self, index: int, batch: int) -> Layer:
        layer = self._observed(self._like(index))
        mine = Layer(self.ours[index][0], layer.form, CacheState(self.choice.settings), layer.store)
        mine.shared.others = [x for i, x in enumerate(self._stock(self._settled, batch)[0]) if i not in self.ours]
        mine.progress, mine.attention = layer.progress, layer.attention
        mine.score_state = {
            name: torch.empty(batch, *x.shape[1:], dtype=x.dtype, device=META) for name, x in layer.score_state.items()
        }
        return mine

    @lru_cache(maxsize=64)  # noqa: B019
    def _observed(self, index: int) -> Layer:
        sample, method = self._sample(index), self.method
        settings = sample.deferred(1.0) if method.when.prefill is not None else self.choice.settings
        [layer] = sample.layers(1, 0, SEEN, settings)
        layer.listen()
        return layer

    def _state(self, index: int) -> int:
        return sum(x.nbytes for x in self._observed(self._like(index)).score_state.values())

    def _like(self, index: int) -> int:
        """A layer that takes as much as layer ``index``: where layers are known by calibrations, that one alone."""
        return index if self.choice.known else self.network.stand_in[index]

    def _sample(self, index: int) -> Sample:
        like = self._by_index[self.network.stand_in[index]]
        info = self.ours[self._like(index)][0]
        return replace(like, info=info, held=self.choice.of_layer(info))

    @cached_property
    def _by_index(self) -> dict[int, Sample]:
        """A sample for every layer of ours that is run."""
        cache = self._cache(Live(), 1, dry=False)
        with self._attending(NAME), Live(), Fused(self.network.cpu):
            self.network.read(cache, 1, 4)
        found = {}
        for i, (info, form) in self.ours.items():
            layer = cache.layers[i]
            if not isinstance(layer, DryLayer) or layer.shape is None or layer.attention is None:
                continue
            found[i] = Sample(
                layer.shape, info, form, self.choice.settings, self.choice.store, self.choice.held, layer.attention,
                self.network.dtype,
            )  # fmt: skip
        return found

    def _cost(self, index: int) -> Costs:
        sample, method = self._sample(index), self.method
        shape = sample.shape
        width = sample.held.codec.token_bytes(shape.heads, shape.key, shape.value, self.network.dtype)
        if (shape, width) not in self._costs:
            unknown = sees_more(method)
            share = min(0.5, self.slots(index, self.context, 1) / self.context)
            self._costs[shape, width] = NOTHING if unknown else sample.costs(share)
        return self._costs[shape, width]

    def at(self, budget: Budget) -> Compressed:
        """The same with another budget; what a compression costs is taken to be the same."""
        twin = copy.copy(self)
        settings = replace(self.choice.settings, budget=budget)
        twin.choice = replace(self.choice, settings=settings, held=replace(self.choice.held, room=settings.room))
        return twin

    # --- reading -----------------------------------------------------------------------------------------------------

    def _cache(self, live: Live, batch: int, dry: bool = True) -> DryCache:
        layers = list(self._plain_cache().layers)
        shared = CacheState(self.choice.settings)
        for i, (info, form) in self.ours.items():
            made = DryLayer(info, form, shared, self.choice.store(self.choice.of_layer(info, "meta")))
            made.live, made.slots = live, partial(self._left, i, batch) if dry else _all
            made.costs = self._cost(i) if dry else NOTHING
            made.state = self._state(i) if dry else 0
            layers[i] = made
        return DryCache(layers, shared)

    def _left(self, index: int, batch: int, seen: int) -> int:
        return self.slots(index, seen, batch)

    def _peak(self, past: int, end: int, batch: int) -> int:
        with self._attending(NAME), Live(answer=self.method.reduce.merges) as live, Fused(self.network.cpu):
            cache = self._cache(live, batch)
            if past:
                self._read(live, cache, batch, past)
                with live.unwatched():
                    cache.end_forward(last=False)
            live.restart()
            out = self.network.read(cache, batch, end - past)
            cache.end_forward(last=True)
            peak: int = live.peak
            del out
        return peak + self._not_run(past, end, batch)

    def _not_run(self, past: int, end: int, batch: int) -> int:
        """Bytes of the layers that stand in for nobody, while the others are run."""
        method, rest = self.method, self.stock_bytes(end, batch)
        late = method.allocate.joint or method.when.prefill == "deferred"
        total = 0
        for i, size in enumerate(rest):
            if self.network.stand_in[i] == i:
                continue
            if i not in self.ours:
                total += size
                continue
            kept = self._bytes(i, self.slots(i, end, batch), end, batch)
            if late or self.ours[i][0].is_shared:
                held = past if method.when.prefill == "deferred" else self.slots(i, past, batch) if past else 0
                slots = held + end - past
                kept = max(kept, self._bytes(i, slots, slots, batch))
            total += kept + batch * (self._state(i) if not method.when.recurs else 0)
        return total


def _all(seen: int) -> int:
    return seen
