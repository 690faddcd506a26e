"""Attention of one cache at the queries of another: what compression does to a layer, before errors add up.

The queries and the new tokens' keys and values come from a forward with the full cache. Replaying them on a compressed
cache gives each layer exactly the input that it had in the full run, so what differs in its output is its own doing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from keepkv.engine.cache import Cache
from keepkv.engine.layer import Layer
from keepkv.engine.mask_rule import MaskRule


@dataclass(frozen=True)
class Call:
    """One attention call of a forward. layer: whose slots; new: the keys and values (B,H,T,D) stored right before,
    None where an earlier call of the same forward has them already; output (B,T,Hq,Dv)."""

    layer: int
    module: nn.Module
    query: Tensor
    rule: MaskRule
    arguments: dict[str, Any]
    new: tuple[Tensor, Tensor] | None
    output: Tensor

    @property
    def index(self) -> int:
        """Index of the layer of the model that attends; layers may share slots."""
        return int(getattr(self.module, "layer_idx", self.layer))


def record(cache: Cache) -> list[Call]:
    """From now on every attention call of ``cache`` is entered in the list, until ``cache`` is thrown away."""
    calls: list[Call] = []
    for layer in cache.compressible:
        _listen(layer, calls)
    return calls


def replay(cache: Cache, calls: list[Call]) -> list[Tensor]:
    """The output (B,T,Hq,Dv) of each of the calls of one forward, had the slots before it been those of ``cache``.

    ``cache`` has seen as many tokens as the recorded one had, and stays as it is.
    """
    twin = cache.copy()
    twin.compressing = False
    outputs = []
    if calls:
        twin.begin_step(calls[0].rule, calls[0].layer)
    for call in calls:
        layer: Any = twin.layers[call.layer]
        if call.new is not None:
            layer.update(*call.new)
        outputs.append(layer.attend(call.module, call.query, call.rule, **call.arguments))
    return outputs


def _listen(layer: Layer, calls: list[Call]) -> None:
    update, attend = layer.update, layer.attend
    fresh: list[tuple[Tensor, Tensor]] = []

    def updating(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        fresh.append((key_states, value_states))
        return update(key_states, value_states, *args, **kwargs)

    def attending(module: nn.Module, query: Tensor, rule: MaskRule, **arguments: Any) -> Tensor:
        output = attend(module, query, rule, **arguments)
        calls.append(Call(layer.info.index, module, query, rule, arguments, fresh.pop() if fresh else None, output))
        return output

    # On the objects of this one cache: neither the class nor the model changes.
    layer.update, layer.attend = updating, attending  # type: ignore[method-assign]
