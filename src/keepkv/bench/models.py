"""The models of a sweep, made or found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from keepkv.bench.plan import Point, Sweep
from keepkv.bench.shapes import Shape, hardly_anything
from keepkv.errors import KeepKVError


@dataclass(frozen=True)
class Model:
    """A model that processes can load: a directory or Hub name."""

    path: str
    config: Any
    dtype: torch.dtype

    @property
    def text(self) -> Any:
        """Configuration of the language model."""
        return self.config.get_text_config(decoder=True)


class Models:
    """The models of a sweep. A model given by its shape is written to ``scratch`` once, so that every library reads the
    same weights."""

    def __init__(self, scratch: Path, sweep: Sweep) -> None:
        self.scratch, self.sweep = scratch, sweep
        self.made: dict[str, Model] = {}

    def get(self, point: Point) -> Model:
        """The model of ``point``; raises ``KeepKVError`` where it cannot be read."""
        model = point.model if isinstance(point.model, Shape) else Model(point.model, *self._read(point.model))
        if point.overhead:
            depth = model.layers if isinstance(model, Shape) else model.text.num_hidden_layers
            model = hardly_anything(depth)
        if isinstance(model, Model):
            return model
        if str(model) not in self.made:
            dtype = torch.float32 if self.sweep.dtype == "auto" else getattr(torch, self.sweep.dtype)
            path = self.scratch / f"model-{len(self.made)}"
            model.save(path, dtype, self.sweep.seed)
            self.made[str(model)] = Model(str(path), model.config(), dtype)
        return self.made[str(model)]

    def _read(self, name: str) -> tuple[Any, torch.dtype]:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise KeepKVError(f"cannot load model {name!r}: {str(error).partition(chr(10))[0]}") from error
        own = getattr(config, "dtype", None) or torch.float32
        return config, own if self.sweep.dtype == "auto" else getattr(torch, self.sweep.dtype)
