"""Weights at random, written as authors publish those of learned scores, for any model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import keepkv
from keepkv.calibrate import published
from keepkv.engine.passes.reread import feed


def shape_of(model: Any) -> tuple[int, int, int, int]:
    """Layers, KV heads, queries of each, and width of the hidden states."""
    cache = keepkv.Cache(model, "full")
    with torch.no_grad():
        feed(model, cache, torch.ones(1, 2, dtype=torch.long), torch.ones(1, 0, dtype=torch.long))
    layer = cache.compressible[0]
    heads = layer.store.like()[0].shape[1]
    config = model.config.get_text_config(decoder=True)
    return len(cache.layers), heads, layer.progress.query_heads // heads, config.hidden_size


def kvzap_files(folder: Path, layers: int, heads: int, width: int, inner: int | None = None, seed: int = 0) -> Path:
    """A KVzap model as kvpress saves one: linear, or with a layer of ``inner`` between."""
    torch.manual_seed(seed)

    def one() -> nn.Module:
        if inner is None:
            return nn.Linear(width, heads)
        return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, heads))

    network = nn.ModuleDict({"layers": nn.ModuleList([one() for _ in range(layers)])})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def gate_file(path: Path, layers: int, heads: int, groups: int, width: int, sinks: int = 3, rank: int = 8) -> Path:
    """Gates as Fast KVzip saves them: a list of them under "module", and numbers of numpy beside it."""
    torch.manual_seed(0)
    gates: list[dict[str, Tensor]] = []
    for _ in range(layers):
        query, key = nn.Linear(width, heads * groups * rank), nn.Linear(width, heads * rank, bias=False)
        gates.append(
            {
                "q_proj.weight": query.weight.data, "q_proj.bias": query.bias.data, "k_proj.weight": key.weight.data,
                "q_norm.weight": torch.rand(rank) + 0.5, "k_norm.weight": torch.rand(rank) + 0.5,
                "k_base": torch.randn(heads, 1, sinks, rank), "b": torch.randn(heads, 1, groups),
            }
        )  # fmt: skip
    torch.save({"module": gates, "loss": torch.rand(1).numpy()}, path)
    return path


def gates_at_random(model: Any) -> keepkv.Calibration:
    """A calibration of Fast KVzip for ``model``, through a file."""
    with tempfile.TemporaryDirectory() as folder:
        layers, heads, groups, width = shape_of(model)
        return published("fast-kvzip", model, gate_file(Path(folder) / "gates.pt", layers, heads, groups, width))
