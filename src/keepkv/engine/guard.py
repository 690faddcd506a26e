"""What a model on "keepkv" does around ``generate``: the cache that a call was given is the one that it uses.

A model may drop the cache that it was given and go on with one of its own: Phi-3 with longrope does so where its input
outgrows the short context. And a call that was given none may stand within ``keepkv.compressed``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from keepkv.engine import contexts
from keepkv.engine.busy import running
from keepkv.engine.layer import is_ours
from keepkv.engine.offsets import set_offsets
from keepkv.engine.versions import CACHE, cache_in
from keepkv.errors import CacheStateError, UnsupportedInput

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def guard(model: PreTrainedModel) -> None:
    """Wrap ``generate`` and ``prepare_inputs_for_generation`` of this one model; does nothing the second time."""
    with contexts.LOCK:
        for name, wrap in _WRAPS.items():
            shadowed = model.__dict__.get(name)
            if hasattr(shadowed, "keepkv_shadows") or not hasattr(model, name):
                continue
            method = wrap(getattr(type(model), name) if shadowed is None else _with_self(shadowed))
            method.keepkv_shadows = shadowed  # type: ignore[attr-defined]
            # Bound to the instance, so that a copy or a pickle of the model gets one of its own.
            setattr(model, name, MethodType(method, model))


def unguard(model: PreTrainedModel) -> None:
    """Put back what ``guard`` found."""
    with contexts.LOCK:
        for name in _WRAPS:
            mine: Any = model.__dict__.get(name)
            if hasattr(mine, "keepkv_shadows"):
                delattr(model, name)
                if mine.keepkv_shadows is not None:
                    setattr(model, name, mine.keepkv_shadows)


def check_used(cache: Any, before: int = 0) -> None:
    """Raise if ``cache``, which had seen ``before`` columns when a generation began, has seen no more at its end."""
    if cache.get_seq_length() == before:
        raise CacheStateError(
            "a generation was given a keepkv cache and did not use it: its text was made with another cache or with "
            "none, uncompressed. Leave use_cache=True; if that is so, this model replaces the cache that it is given: "
            "use transformers' DynamicCache with it."
        )


def _with_self(function: Callable[..., Any]) -> Callable[..., Any]:
    """An attribute of an instance, to be called as a method of its class is."""

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def _wants_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``generate`` is to use a cache."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    wanted = kwargs.get("use_cache")
    return (getattr(config, "use_cache", None) if wanted is None else wanted) is not False


def _generate(shadowed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(shadowed)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        if cache is None and _wants_cache(self, args, kwargs) and (context := contexts.innermost(self)):
            cache = kwargs[CACHE] = context.make()
        if not is_ours(cache):
            with running(self):
                return shadowed(self, *args, **kwargs)
        if not _wants_cache(self, args, kwargs):
            raise UnsupportedInput(
                "a keepkv cache was given together with use_cache=False, with which generate would feed it the whole "
                "text again in every step. Leave one of them out, or set model.generation_config.use_cache = True."
            )
        before = cache.get_seq_length()
        _check_new(before, args, kwargs)
        set_offsets(self, cache)
        with running(self):
            found = shadowed(self, *args, **kwargs)
        check_used(cache, before)
        return found

    return generate


def _check_new(before: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a whole text that is no longer than the ``before`` columns the cache has read: transformers would feed
    some of it again behind itself."""
    ids = next((x for x in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if x is not None), None)
    mask, given = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    given = ids if given is None else given
    if given is None or not 0 < given.shape[1] <= before or (mask is not None and mask.shape[1] != given.shape[1]):
        return  # a mask that is longer says that only what is new was given
    raise CacheStateError(
        f"this cache has read {before} tokens, and generate was given a text of {given.shape[1]}, which leaves nothing "
        "new to read. For another answer to the same text, read it once and give each answer a cache.copy(); for "
        "another text, call cache.reset() or make a new cache; to go on, give the whole text so far with what is new "
        "behind it."
    )


def _prepare(shadowed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(shadowed)
    def prepare_inputs_for_generation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache = cache_in(kwargs)
        inputs: dict[str, Any] = shadowed(self, *args, **kwargs)
        if is_ours(cache) and cache_in(inputs) is not cache:
            _start_over(self, inputs, cache)
            inputs[CACHE] = cache
        return inputs

    return prepare_inputs_for_generation


_WRAPS: dict[str, Wrap] = {"generate": _generate, "prepare_inputs_for_generation": _prepare}


def _start_over(model: PreTrainedModel, inputs: dict[str, Any], cache: Any) -> None:
    """The model dropped ``cache`` to read everything again: empty it, so that it is read into this cache."""
    ids = inputs.get("input_ids")
    tokens, seen = (inputs["inputs_embeds"] if ids is None else ids).shape[1], cache.get_seq_length()
    if not seen:
        return
    score, shared = cache.settings.method.score, cache.shared
    once = score.looks_again or shared.observing or not shared.compressing
    if tokens <= seen or once:
        raise CacheStateError(
            f"{type(model).__name__} dropped its keepkv cache of {seen} tokens to go on with "
            f"{tokens} token{'s' * (tokens > 1)} (with longrope: the input outgrew original_max_position_embeddings). "
            + (
                "This cache cannot be read again: it knows more than the text, or compresses no more."
                if tokens > seen
                else "That is not the whole text: this transformers loses the past here."
            )
            + " Feed the whole text to a new cache."
        )
    rollback = any(getattr(x, "progress", None) and x.progress.record_past for x in cache.layers)
    cache.reset()
    if rollback:
        cache.activate_past_recording()
