"""A layer of random slots, with the widths of a model's: what its method remembers, and what a compression needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from keepkv.core.budget import Budget
from keepkv.core.calibration import needed
from keepkv.core.layer_info import LayerInfo
from keepkv.core.when import When
from keepkv.engine.compression import compress, compress_waiting
from keepkv.engine.kv_form import KVForm
from keepkv.engine.layer import Layer
from keepkv.engine.state import CacheState, Settings
from keepkv.methods import Method
from keepkv.plan.live import Live, Place
from keepkv.store.base import Held, Store

SLOTS = 9216, 12288  # of samples: more than pieces take at once, where they work through slots bit by bit
QUERIES = 256, 512


@dataclass(frozen=True)
class Shape:
    """What a layer of a model stores and is asked with: KV heads, widths of keys and values as they are stored, query
    heads and their width."""

    heads: int
    key: int
    value: int
    query_heads: int
    query: int

    def with_heads(self, heads: int) -> Shape:
        """The same with other KV heads, as many query heads for each."""
        return replace(self, heads=heads, query_heads=self.query_heads // self.heads * heads)


class Growth:
    """Bytes alive at each place of the source, which grow in proportion to some numbers.

    samples: the numbers, and the bytes at each place. There are as many of them as there are numbers.
    """

    def __init__(self, samples: Sequence[tuple[Sequence[float], dict[Place, int]]]) -> None:
        common = set.intersection(*(set(places) for _, places in samples)) if samples else set()
        numbers = torch.tensor([list(x) for x, _ in samples], dtype=torch.float64)
        found = torch.tensor([[places[at] for at in common] for _, places in samples], dtype=torch.float64)
        self.slopes = torch.linalg.solve(numbers, found) if common else None

    def at(self, *numbers: float) -> int:
        """The most bytes at any place for ``numbers``."""
        if self.slopes is None:
            return 0
        return max(0, round(float((torch.tensor(numbers, dtype=torch.float64) @ self.slopes).max())))


class Costs:
    """Bytes for a row that a method needs beside slots and queries, of layers of so many KV heads; joint: they are
    compressed together."""

    def __init__(self, heads: int, joint: bool, observing: Growth, compressing: Growth) -> None:
        self.heads, self.joint, self.observing, self.compressing = heads, joint, observing, compressing

    def observe(self, queries: int, slots: int) -> int:
        """While the score sees a forward of ``queries`` over ``slots`` of a head."""
        return self.observing.at(*_observed(self.heads, queries, slots))

    def compress(self, layers: int, slots: int) -> int:
        """While ``layers`` of ``slots`` are compressed at once, what is kept of them included."""
        return self.compressing.at(*_compressed(self.heads, layers, slots, self.joint))


def _observed(heads: int, queries: int, slots: int) -> tuple[float, ...]:
    """What the memory for observing grows with."""
    return 1, heads, heads * queries, heads * slots


def _compressed(heads: int, layers: int, slots: int, joint: bool) -> tuple[float, ...]:
    """What the memory for compressing grows with; joint: layers wait for each other."""
    return (1, heads, heads * slots) + ((heads * layers, heads * layers * slots) if joint else ())


NOTHING = Costs(1, False, Growth([]), Growth([]))


@dataclass(frozen=True)
class Sample:
    """Layers like one of a model, on the CPU, of one row and random slots.

    held: with the codec of that layer. attention: scaling, softcap and sinks.
    """

    shape: Shape
    info: LayerInfo
    form: KVForm
    settings: Settings
    store: Callable[[Held], Store]
    held: Held
    attention: dict[str, Any]
    dtype: torch.dtype

    def layers(self, count: int, past: int, queries: int, settings: Settings) -> list[Layer]:
        """Layers of one cache that hold ``past`` slots and have then read ``queries`` more, as their score saw them."""
        shared = CacheState(settings)
        infos = [replace(self.info, rank=i, ranks=count, is_shared=False) for i in range(count)]
        made = [Layer(info, self.form, shared, self.store(replace(self.held, layer=info))) for info in infos]
        for tokens in (past, queries) if past else (queries,):
            shared.positions.begin(1, tokens, None, torch.device("cpu"))
            for layer in made:
                self._feed(layer, tokens)
        return made

    def _feed(self, layer: Layer, tokens: int) -> None:
        shape, positions = self.shape, layer.shared.positions.positions
        assert positions is not None
        keys, values = (torch.randn(1, shape.heads, tokens, width).to(self.dtype) for width in (shape.key, shape.value))
        layer.lazy_initialization(keys, values)
        layer.store.append(keys, values, positions)
        layer.progress.seen += tokens
        layer.progress.prefilling = True
        self._attend(layer, min(tokens, QUERIES[-1]))

    def _attend(self, layer: Layer, queries: int) -> None:
        """Let the score of ``layer`` see that many queries."""
        heads, attention = self.shape.query_heads, self.attention
        query = torch.randn(1, heads, queries, self.shape.query).to(self.dtype)
        sinks = None if attention["sink_logits"] is None else torch.zeros(heads)
        layer._after_attention(query, None, {**attention, "sink_logits": sinks})

    def costs(self, share: float) -> Costs:
        """What the method needs where it keeps ``share`` of the slots, measured on samples of one and two KV heads."""
        if self.settings.method.when.prefill is None:
            return NOTHING
        (s, long), (t, more) = SLOTS, QUERIES
        observed = [(1, t, s), (2, t, s), (1, more, s), (1, t, long)]
        joint = self.settings.method.allocate.joint
        compressed = [(1, 2, s), (2, 2, s), (1, 2, long), (1, 3, s), (1, 3, long)] if joint else [
            (1, 1, s), (2, 1, s), (1, 1, long)
        ]  # fmt: skip
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            observing = Growth([(_observed(*x), self._of(x[0])._observing(*x[1:])) for x in observed])
            compressing = Growth(
                [(_compressed(*x, joint), self._of(x[0])._compressing(*x[1:], share)) for x in compressed]
            )
        return Costs(self.shape.heads, joint, observing, compressing)

    def _of(self, heads: int) -> Sample:
        held = replace(self.held, codec=self.held.codec.for_heads(heads))
        return replace(self, shape=self.shape.with_heads(heads), held=held)

    def _observing(self, queries: int, slots: int) -> dict[Place, int]:
        with Live() as live:
            [layer] = self.layers(1, 0, slots, self.deferred(1.0))
            layer.listen()
            return _places(live, lambda: self._attend(layer, queries))

    def _compressing(self, layers: int, slots: int, share: float) -> dict[Place, int]:
        def run() -> None:
            for layer in made:
                compress(layer)
            compress_waiting(made[0].shared)

        with Live() as live:
            made = self.layers(layers, 0, slots, self.deferred(share, slots))
            return _places(live, run)

    def deferred(self, share: float, slots: int = SLOTS[0]) -> Settings:
        """Settings with which nothing is compressed until that is asked for."""
        method = replace(self.settings.method, when=When("deferred"))
        kept = max(method.sinks + method.window + 1, round(share * slots))
        return replace(self.settings, method=method, budget=Budget(slots=kept))


def sees_more(method: Method) -> bool:
    """Whether ``method`` needs more of a text than keys, values and queries: what it takes is not known here."""
    score = method.score
    return bool(needed(score, method.allocate, method.reduce)) or score.needs_questions or score.needs_hidden


def _places(live: Live, run: Callable[[], None]) -> dict[Place, int]:
    """Bytes that ``run`` has alive at each place, beyond what there was before."""
    before, live.places = live.now, {}
    run()
    return {place: size - before for place, size in live.places.items()}
