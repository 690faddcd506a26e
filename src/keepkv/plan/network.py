"""A model made of its configuration alone, without memory: what it weighs, and one layer of each kind to run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from keepkv.engine.examine import model_of
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedModel
from keepkv.plan.live import Fused, Live

_SIMPLE = (int, float, str, bool, type(None))


class Network:
    """A model of ``config`` on the device "meta", in ``dtype``; cpu: it is to run on one.

    Layers that are alike are run once or twice, the first and the last of them; ``stand_in`` says for each layer which
    one of these is like it. Raises ``UnsupportedModel`` where the model cannot be run without numbers.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, cpu: bool = False) -> None:
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                self.model: PreTrainedModel = model_of(config)
        finally:
            torch.set_default_dtype(before)
        held = [*self.model.parameters(), *self.model.buffers()]
        self.weights = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held}.values())
        self.text = self.model.config.get_text_config(decoder=True)
        self.attention: str = self.text._attn_implementation
        self.dtype, self.cpu = dtype, cpu
        self.stand_in = self._thin()

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for, where its configuration says."""
        found = getattr(self.text, "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def stock_layers(self) -> list[Any]:
        """transformers' own cache layers of this model, empty."""
        return DynamicCache(config=self.text).layers

    @torch.no_grad()
    def read(self, cache: Any, batch: int, tokens: int) -> Any:
        """Run ``tokens`` columns of ``batch`` rows through the model."""
        with torch.device("meta"):
            ids = torch.ones(batch, tokens, dtype=torch.long)
            last = {"logits_to_keep": 1} if _keeps_logits(self.model) else {}
            return self.model(input_ids=ids, use_cache=True, **last, **{CACHE: cache})

    def _thin(self) -> list[int]:
        """Replace layers that are like another by ones that hand on what they are given."""
        layers = self.stock_layers()
        alike: dict[Any, list[int]] = {}
        blocks = _blocks(self.model, len(layers))
        if blocks is None:
            return list(range(len(layers)))
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            alike.setdefault((_form(block), type(layer), getattr(layer, "sliding_window", None)), []).append(i)
        with _outputs(blocks) as made, Live(), Fused(self.cpu):
            try:
                self.read(DynamicCache(config=self.text), 1, 4)
            except Exception as error:  # whatever a model's own code raises without numbers
                name, reason = type(self.model).__name__, str(error).partition("\n")[0]
                raise UnsupportedModel(
                    f"{name} cannot be run without its weights ({type(error).__name__}: {reason}), so what it needs is "
                    "not known beforehand. Load it and look at the memory that a short prompt takes."
                ) from error
        stand_in = list(range(len(layers)))
        for indices in alike.values():
            for i in indices[1:-1]:
                blocks[i] = _HandsOn(blocks[i], made.get(i, 0))
                stand_in[i] = indices[0]
        return stand_in


class _HandsOn(nn.Module):
    """Takes the place of a layer. entries: of the tuple that the layer returns, 0 where it is no tuple."""

    def __init__(self, layer: nn.Module, entries: int) -> None:
        super().__init__()
        self.entries = entries
        for name, value in vars(layer).items():  # models read what kind of layer it is
            if isinstance(value, _SIMPLE) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, *[None] * (self.entries - 1)) if self.entries else hidden_states


def _keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model computes the logits of the last token alone where it is asked, as ``generate`` does."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _blocks(model: PreTrainedModel, count: int) -> nn.ModuleList | None:
    """The list of the layers that have a cache, in order; None where the model keeps them in another way."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(_index, module, range(count))):
            return module
    return None


def _index(block: nn.Module, index: int) -> bool:
    """Whether ``block`` has something in it that knows itself to be of layer ``index``."""
    return any(getattr(module, "layer_idx", None) == index for module in block.modules())


def _form(block: nn.Module) -> tuple[Any, ...]:
    """What makes two layers alike: modules, their settings, and shapes of weights."""
    settings = tuple(
        (type(module).__name__, *sorted((k, repr(v)) for k, v in vars(module).items() if _counts(k, v)))
        for module in block.modules()
    )
    return settings, tuple((name, tuple(x.shape), x.dtype) for name, x in block.named_parameters())


def _counts(name: str, value: Any) -> bool:
    return isinstance(value, _SIMPLE) and not name.startswith("_") and name not in ("layer_idx", "training")


@contextmanager
def _outputs(blocks: nn.ModuleList) -> Iterator[dict[int, int]]:
    """Inside, forwards note by layer how many entries the tuple has that it returns."""
    made: dict[int, int] = {}

    def note(index: int, found: Any) -> None:
        made[index] = len(found) if isinstance(found, tuple) else 0

    hooks = [block.register_forward_hook(lambda *given, i=i: note(i, given[2])) for i, block in enumerate(blocks)]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()
