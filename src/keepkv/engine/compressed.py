"""``with keepkv.compressed(model, …):`` every ``generate`` or pipeline call inside gets a fresh cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from keepkv.core.budget import Budget
from keepkv.engine import contexts
from keepkv.engine.attached import attach
from keepkv.engine.cache import Cache
from keepkv.engine.model import inner_model
from keepkv.methods import DEFAULT, Method


@contextmanager
def compressed(
    model: PreTrainedModel,
    method: str | Method = DEFAULT,
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
        made = Cache(model, method, budget, **options)
        made.attached = None  # the model is this block's
        caches.append(made)
        return made

    inner, context = inner_model(model), contexts.Context(make)
    attached = attach(inner)
    contexts.enter(inner, context)
    try:
        Cache(model, method, budget, **options)  # refuses bad arguments here rather than inside generate
        yield caches
    finally:
        contexts.leave(inner, context)
        del attached
