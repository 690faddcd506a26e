"""``with keepkv.compressed(model, …):`` every ``generate`` or pipeline call inside gets a fresh cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from keepkv.core.budget import Budget
from keepkv.engine import contexts
from keepkv.engine.cache import Cache
from keepkv.engine.interface import NAME
from keepkv.engine.model import inner_model, set_attention
from keepkv.methods import Method

_previous: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # what the last to leave puts back


@contextmanager
def compressed(
    model: PreTrainedModel,
    method: str | Method = "keepkv",
    budget: Budget | float | int | str | None = None,
    **options: Any,
) -> Iterator[list[Cache]]:
    """Compress the cache of every generation inside; takes what ``keepkv.Cache`` takes.

    model: may be wrapped by PEFT or ``torch.compile``.

    Yields the list of caches made so far, one per ``generate`` call, for their receipts. The model's attention
    implementation is restored on exit, by the last of several that are open on one model. A call that brings its own
    cache keeps it. Inside another ``compressed`` this one counts until it ends. Every thread and task has its own; one
    that has none falls under that of the thread that has.

    >>> with keepkv.compressed(model, "snapkv", budget=0.2) as caches:  # doctest: +SKIP
    ...     model.generate(**inputs)
    >>> print(caches[-1].report())  # doctest: +SKIP
    """
    caches: list[Cache] = []

    def make() -> Cache:
        caches.append(Cache(model, method, budget, **options))
        return caches[-1]

    inner, context = inner_model(model), contexts.Context(make)
    with contexts.LOCK:
        previous = set_attention(inner, NAME)
        if contexts.enter(inner, context):
            _previous[inner] = previous
    try:
        Cache(model, method, budget, **options)  # refuses bad arguments here rather than inside generate
        yield caches
    finally:
        with contexts.LOCK:
            if contexts.leave(inner, context):
                set_attention(inner, _previous.pop(inner))
