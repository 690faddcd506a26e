"""The process that measures one row of kvpress: started by path in the environment of kvpress, imports no keepkv.

kvpress stops at transformers 5.2, which keepkv does not serve: what both need is loaded from its file.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

PACKAGE = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    """The file ``name`` of keepkv as a module that knows nothing of the rest."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, PACKAGE / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kvpress = importlib.import_module("kvpress")  # untyped, and not installed beside keepkv
protocol, meters = load("bench/protocol.py"), load("measure/meters.py")
if TYPE_CHECKING:
    from keepkv.bench.protocol import Runner
else:
    Runner = protocol.Runner


class Press(Runner):
    """A press while the prompt is read. press: {"press": class, "inner": class that it wraps, or absent}; removed: the
    share of the slots that it takes away."""

    def __init__(self, model: Any, press: dict[str, str], removed: float) -> None:
        super().__init__(model)
        made = getattr(kvpress, press.get("inner", press["press"]))(compression_ratio=removed)
        self.press = getattr(kvpress, press["press"])(press=made) if "inner" in press else made
        self.prefilling = True

    def start(self) -> Any:
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None  # outlives the press otherwise
        return DynamicCache(config=self.model.config)

    def read(self, cache: Any, ids: torch.Tensor) -> torch.Tensor:
        with self.press(self.model):
            return super().read(cache, ids)

    def step(self, cache: Any, token: torch.Tensor, position: int) -> torch.Tensor:
        where = torch.full_like(token, position)  # its cache counts what is left, not what was seen
        out = self.model(token, past_key_values=cache, position_ids=where, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def content(self, cache: Any) -> tuple[int, int]:
        return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)), 0

    def facts(self, cache: Any) -> dict[str, Any]:
        slots = [layer.keys.shape[2] for layer in cache.layers]
        return {"bytes": self.content(cache)[0], "full_bytes": None, "slots": sum(slots) / len(slots)}

    def rewind(self, cache: Any, tokens: int) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-tokens], layer.values[:, :, :-tokens]


def build(spec: dict[str, Any]) -> Any:
    """The measurement that ``spec`` asks for."""
    versions = {name: version(name) for name in ("torch", "transformers", "kvpress")}

    def press(model: Any) -> Press:
        model.set_attn_implementation("sdpa")
        return Press(model, spec["press"], spec["removed"])

    return protocol.prepare(spec, press, meters, versions)


if __name__ == "__main__":
    protocol.serve(build)
