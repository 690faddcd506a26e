"""The output projection of an attention layer, found by giving it a made-up attention output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keepkv.core.rope import AXES, axes_of
from keepkv.engine.attention_probe import (
    is_plain,
    kind_of_layer,
    own_rotaries,
    rotary_modules,
    run_attention,
    text_part,
)
from keepkv.engine.devices import in_memory
from keepkv.engine.handle import KVHandle
from keepkv.engine.kv_form import is_latent
from keepkv.engine.mask_rule import MaskRule
from keepkv.errors import CacheStateError


@dataclass(frozen=True)
class UnknownOutput:
    """A layer whose output projection is no matrix that can be read, and why: ``needs_output`` is refused there."""

    reason: str


@dataclass(frozen=True, eq=False)
class Projection:
    """The module that projects the attention output of ``heads`` query heads. layer: the attention module in which it
    is found by ``name``. transposed: its weight is (in, out)."""

    module: nn.Module | None
    layer: nn.Module | None
    name: str
    heads: int
    transposed: bool

    def __call__(self, device: torch.device) -> Tensor:
        """Its weight (heads,Dv,E), a view of it where it lies on ``device``. Raises ``CacheStateError`` where another
        module has taken its place."""
        weight = None if self.module is None else in_memory(self.module, "weight")
        if weight is None or self.layer is None:
            raise CacheStateError("the weight of the output projection is gone: its cache was read from a pickle.")
        try:
            now = self.layer.get_submodule(self.name)
        except AttributeError:
            now = None
        if now is not self.module:
            raise CacheStateError(
                f"{self.name!r} of {type(self.layer).__name__}, the output projection that this cache looks at, is now "
                f"{'gone' if now is None else 'another module, ' + type(now).__name__}. Make caches after the model "
                "has its adapters or quantised weights; merge an adapter, or take it off, to go on with this one."
            )
        weight = (weight if self.transposed else weight.T).detach().to(device)
        return weight.view(self.heads, -1, weight.shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Weights of a model stay out of pickles of its caches."""
        return {**self.__dict__, "module": None, "layer": None}


class _Given:
    """Stands in for a cache, and for the layer that attends over it: the attention output is ``size`` times a made-up
    one."""

    def __init__(self, size: float) -> None:
        self.size, self.width = size, 0
        self.out = torch.zeros(0)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        self.width = values.shape[-1]
        return KVHandle(self, keys, keys.shape[2]), KVHandle(self, values, values.shape[2])

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def check_input(self, kwargs: dict[str, Any]) -> None:
        """Whatever a layer passes beside does not matter here."""

    def attend(self, module: nn.Module, query: Tensor, rule: Any, **kwargs: Any) -> Tensor:
        b, heads, t, _ = query.shape
        count = torch.arange(b * t * heads * self.width, device=query.device)
        self.out = (count.float().mul(1.3).cos() * self.size).view(b, t, heads, -1).to(query.dtype)
        return self.out


def projection_of(model: nn.Module, layer: nn.Module, index: int) -> Projection | UnknownOutput:
    """The output projection of the attention module ``layer``, which is on the "keepkv" attention.

    Nothing is assumed about the model class: the layer reads three made-up tokens twice, and its attention is replaced
    by an output o and by nothing. What differs must be o·W for the weight W of one of its modules. A bias cancels; a
    gate, a norm or an adapter between the two does not, and then no W is returned.
    """
    if is_latent(layer):
        return UnknownOutput("its values are latents, which another projection expands first")
    config, decoder = text_part(model)
    rotaries = own_rotaries(layer, rotary_modules(decoder))
    rotary = rotaries[0] if rotaries else None
    kind, typed = kind_of_layer(config, index, rotary) if rotary is not None else (None, False)
    places = torch.arange(3) if axes_of(config) == 1 else torch.arange(3)[:, None].expand(3, AXES)
    outputs, given = [], [_Given(1.0), _Given(0.0)]
    for one in given:
        try:
            made = run_attention(model, layer, one, places, rotary, kind if typed else None, MaskRule({}, None))
        except Exception as error:  # whatever a model's own code raises: the layer is then simply not understood
            return UnknownOutput(f"it could not be probed ({type(error).__name__}: {error})")
        outputs.append((made[0] if isinstance(made, tuple) else made).double())
    out, change = given[0].out, outputs[0] - outputs[1]
    tolerance = (1e-3 if out.dtype == torch.float32 else 0.05) * float(change.abs().max())
    wanted = out.shape[2] * out.shape[3], change.shape[-1]
    for name, module in layer.named_modules():
        weight = in_memory(module, "weight")
        if weight is None or weight.dim() != 2 or not is_plain(weight.dtype):
            continue
        for transposed, shape in ((False, weight.shape[::-1]), (True, weight.shape)):
            if tuple(shape) != wanted:
                continue
            found = Projection(module, layer, name, out.shape[2], transposed)
            product = out.flatten(2).to(weight.dtype) @ found(out.device).flatten(0, 1)
            if bool(((product.double() - change).abs() <= tolerance).all()):
                return found
    return UnknownOutput("what it returns is no product of the attention output and a weight that can be read")
