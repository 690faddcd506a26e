"""Streams of random frames on small random models, and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import vision_zoo as zoo
from keepkv.video import VideoStream

SIZES = {"qwen2-vl": (16, 24), "qwen2.5-vl": (16, 24)} | dict.fromkeys(
    ("llava", "internvl", "smolvlm", "idefics3"), (16, 16)
)
# The quick suite has one family with M-RoPE and one without.
NAMES = [pytest.param(name, marks=[] if name in ("qwen2-vl", "llava") else pytest.mark.slow) for name in SIZES]
CELLS = {"qwen2-vl": 6, "qwen2.5-vl": 6, "llava": 16, "internvl": 4, "smolvlm": 4, "idefics3": 4}


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(5, 280, (1, count), generator=torch.Generator().manual_seed(seed))


def frames(name: str, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *SIZES[name], generator=torch.Generator().manual_seed(seed))


def stream(name: str, **options: Any) -> VideoStream:
    steps = options.pop("steps", 8)
    cap = 5 + 24 + steps * CELLS[name]
    made = VideoStream(zoo.model(name), cap, **{"text_reserve": 24, **options})
    made.prefix(ids(5, 1))
    return made


def watch(made: VideoStream) -> list[int]:
    """The most slots of a KV head in any layer, inside each append."""
    seen: list[int] = []
    for layer in made.cache.compressible:

        def updated(*args: Any, layer: Any = layer, update: Any = layer.update, **kwargs: Any) -> Any:
            out = update(*args, **kwargs)
            seen.append(int(layer.store.lengths.max()))
            return out

        layer.update = updated  # type: ignore[method-assign]
    return seen


def held(made: VideoStream) -> list[Tensor]:
    return [x for layer in made.cache.compressible for x in (layer.store.view().keys, layer.store.view().positions)]


def same(one: VideoStream, two: VideoStream, tolerance: float = 0.0) -> None:
    for a, b in zip(held(one), held(two), strict=True):
        assert torch.equal(a, b) if not tolerance else torch.allclose(a.float(), b.float(), atol=tolerance)
