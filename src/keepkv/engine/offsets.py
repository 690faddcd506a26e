"""Position offsets that a model with images keeps to itself, though they belong to what a cache has read.

Behind an image, models with M-RoPE count on from a smaller position than the token's index. They remember the
difference, ``rope_deltas`` (B,1), of the text read last. Here it goes with the cache: a context that was copied, saved,
or read before another one goes on at its own positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from keepkv.engine.layer import is_ours
from keepkv.engine.versions import cache_in

NAME = "rope_deltas"
_HOOKS = "keepkv_hooks"


def follow_offsets(model: nn.Module) -> None:
    """Let the offsets of ``model`` follow the cache of each forward; does nothing the second time."""
    for module in _holders(model):
        if _HOOKS not in module.__dict__:
            before = module.register_forward_pre_hook(_before, with_kwargs=True)
            after = module.register_forward_hook(_after, with_kwargs=True)
            setattr(module, _HOOKS, (before, after))


def unfollow_offsets(model: nn.Module) -> None:
    """Undo ``follow_offsets``."""
    for module in _holders(model):
        for hook in module.__dict__.pop(_HOOKS, ()):
            hook.remove()


def set_offsets(model: nn.Module, cache: Any) -> None:
    """Before anything is read behind ``cache``: the model remembers the offsets of what ``cache`` has read."""
    if cache.get_seq_length():
        for module in _holders(model):
            setattr(module, NAME, cache.shared.positions.offsets)


def _holders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if NAME in module.__dict__]


def _cache(kwargs: dict[str, Any]) -> Any:
    """The cache of a forward, if it is one that carries offsets."""
    cache = cache_in(kwargs)
    return cache if is_ours(cache) else None


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or (cache := _cache(kwargs)) is None:
        return
    if cache.get_seq_length() or kwargs.get("position_ids") is None:  # else they were made for what is read now
        setattr(module, NAME, cache.shared.positions.offsets)


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_compiling() or (cache := _cache(kwargs)) is None:
        return
    offsets: Tensor | None = getattr(module, NAME)
    rows = max(0, cache.batch_size)
    if offsets is not None and rows % len(offsets) == 0:  # a row of the prompt may have become several
        offsets = offsets.repeat_interleave(rows // len(offsets), dim=0)
    cache.shared.positions.offsets = offsets
