"""``with keepkv.compressed(model, …):`` every ``generate`` or pipeline call inside gets a fresh cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from keepkv.core.budget import Budget
from keepkv.engine.cache import Cache
from keepkv.engine.interface import NAME
from keepkv.engine.model import set_attention
from keepkv.engine.versions import CACHE
from keepkv.methods import Method


@contextmanager
def compressed(
    model: PreTrainedModel,
    method: str | Method = "keepkv",
    budget: Budget | float | int | str | None = None,
    **options: Any,
) -> Iterator[list[Cache]]:
    """Compress the cache of every generation inside; takes what ``keepkv.Cache`` takes.

    Yields the list of caches made so far, one per ``generate`` call, for their receipts. The model's attention
    implementation is restored on exit. A call that brings its own cache keeps it.

    >>> with keepkv.compressed(model, "snapkv", budget=0.2) as caches:  # doctest: +SKIP
    ...     model.generate(**inputs)
    >>> print(caches[-1].report())  # doctest: +SKIP
    """
    caches: list[Cache] = []
    previous = set_attention(model, NAME)
    try:
        Cache(model, method, budget, **options)  # refuses bad arguments here rather than inside generate
        prepare: Any = model._prepare_cache_for_generation

        def prepare_ours(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
                caches.append(Cache(model, method, budget, **options))
                model_kwargs[CACHE] = caches[-1]
            return prepare(generation_config, model_kwargs, *args, **kwargs)

        # transformers offers no public hook that makes a cache per call; the instance attribute shadows the method.
        model._prepare_cache_for_generation = prepare_ours  # type: ignore[assignment]
        try:
            yield caches
        finally:
            del model._prepare_cache_for_generation
    finally:
        set_attention(model, previous)
