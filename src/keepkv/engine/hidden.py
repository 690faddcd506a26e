"""Hidden states that an attention module is fed, for scores that look at them.

No cache sees them: a layer of a cache is given keys and values, and the attention function queries. A hook before the
attention modules of a model hands them to the layer of the cache that the forward is given, whose attention function
takes them from there a moment later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from keepkv.engine.layer import Layer
from keepkv.engine.versions import cache_in

_HOOK = "keepkv_hidden"
_ELSEWHERE = "layer_past"  # what some attention modules call their cache


def follow_hidden(modules: Iterable[nn.Module]) -> None:
    """Let attention ``modules`` hand over what they are fed; does nothing the second time."""
    for module in modules:
        if _HOOK not in module.__dict__:
            setattr(module, _HOOK, module.register_forward_pre_hook(_before, with_kwargs=True))


def unfollow_hidden(model: nn.Module) -> None:
    """Undo ``follow_hidden``."""
    for module in model.modules():
        if (hook := module.__dict__.pop(_HOOK, None)) is not None:
            hook.remove()


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = cache_in(kwargs)
    layers = getattr(kwargs.get(_ELSEWHERE) if cache is None else cache, "layers", ())
    index: Any = module.layer_idx
    layer = layers[index] if index < len(layers) else None
    side_by_side = getattr(layer, "rows", None)  # layers of as many caches, one for each row
    for row, one in enumerate([layer] if side_by_side is None else side_by_side):
        if isinstance(one, Layer) and one.shared.settings.method.score.needs_hidden:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            one.hidden = hidden if side_by_side is None else hidden[row : row + 1]
