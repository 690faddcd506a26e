"""The tiny model that tests of the benchmarks measure."""

from __future__ import annotations

import torch

from keepkv.bench.shapes import Shape
from keepkv.bench.sizes import Geometry

TEXT = "layers=2,hidden=32,heads=4,kv_heads=2,head_dim=8,intermediate=48,vocab=64"
SHAPE = Shape.read(TEXT)
GEOMETRY = Geometry.of(SHAPE.config(), torch.float32)
TOKEN = 2 * 2 * (8 + 8) * 4  # layers, KV heads, key and value, float32
