"""How much what a model makes of a text hangs on the attention of each token of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from keepkv.engine.cache import Cache
from keepkv.engine.fingerprint import decoder_of
from keepkv.engine.layer import Layer
from keepkv.engine.model import attention_modules
from keepkv.engine.places import text_places
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel


def sensitivities(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """‖∂Φ/∂o_t‖ (B,T) float32 of each compressible layer, where o_t is what its attention module returns for token t of
    ``ids`` (B,T), read behind what ``cache`` holds, and Φ = Σ_t ‖h_t‖² over the outputs h of the last layer.

    cache: a copy that was not compressed, and is used up. mask (B, columns): that it was read with. One forward and one
    backward, with plain attention and the activations of every layer in memory.
    """
    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModel(
            f"{type(model).__name__}: its last layer was not found (no list of layers in its decoder), and gradients "
            "are taken of what that returns. Choose a method that takes none, such as 'kvzip' with plus=True."
        )
    modules, indices = attention_modules(model), [layer.info.index for layer in cache.compressible]
    outs: dict[int, Tensor] = {}
    last: list[Tensor] = []
    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        ids, mask = ids.clone(), mask.clone()  # none that was made in inference mode can take part in a backward
        for index in indices:
            hooks.enter_context(_watched(modules[index], lambda x, index=index: outs.update({index: x})))
        hooks.enter_context(_watched(layers[-1], last.append))
        start = model.get_input_embeddings().register_forward_hook(lambda *given: given[2].detach().requires_grad_())
        hooks.callback(start.remove)
        seen = torch.cat((mask, mask.new_ones(ids.shape)), dim=1)
        model(
            input_ids=ids, attention_mask=seen, position_ids=text_places(cache, seen, ids.shape[1]),
            **{CACHE: _plain(model, cache)}, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        grads = torch.autograd.grad(last[0].float().square().sum(), [outs[i] for i in indices])
    return [grad.float().norm(dim=-1) for grad in grads]


def _plain(model: PreTrainedModel, cache: Cache) -> DynamicCache:
    """A cache of transformers that holds what ``cache`` does, and takes over the layers that are transformers' own."""
    made = DynamicCache(config=model.config.get_text_config(decoder=True))
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, Layer):
            slots = layer.store.view()
            made.update(slots.keys.clone(), slots.values.clone(), index)
        else:
            made.layers[index] = layer
    return made


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    some = [x for x in model.parameters() if x.requires_grad]
    for x in some:
        x.requires_grad_(False)
    try:
        yield
    finally:
        for x in some:
            x.requires_grad_(True)


@contextmanager
def _watched(module: nn.Module, see: Any) -> Iterator[None]:
    """Inside, ``see`` is given what ``module`` returns, the first of it if that is several things."""
    hook = module.register_forward_hook(lambda *given: see(given[2][0] if isinstance(given[2], tuple) else given[2]))
    try:
        yield
    finally:
        hook.remove()
