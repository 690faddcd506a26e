"""Profiles of heads that others have published, from their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.allocate.curves import RATIOS
from keepkv.allocate.profile import CURVE, FULL, PREFIX
from keepkv.calibrate.base import Found
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.score.content.knorm import KNorm


def read_pattern(model: PreTrainedModel, path: str) -> Found:
    """The profile in a file, a tensor for each layer that a cache compresses.

    ``full_attention_heads.tsv`` of DuoAttention: a line for each layer, a number for each KV head, clipped to 0 … 1 as
    its authors do: ``heads_full`` (H,). A ``.npy`` of LU-KV: (99, layers, H), what each KV head gives up where .01 …
    .99 are given up on average: ``heads_curve`` (99,H). Raises ``CalibrationError`` where the file cannot be read, or
    is of another number of layers or heads.
    """
    curves = Path(path).suffix == ".npy"
    try:
        table = np.load(path, allow_pickle=False) if curves else np.loadtxt(path, delimiter="\t", ndmin=2)
        numbers = torch.from_numpy(np.asarray(table, dtype=np.float32))
    except (OSError, ValueError, TypeError) as error:
        raise CalibrationError(f"cannot read the pattern of heads in {path!r}: {error}") from error
    sizes, layers = kv_heads(model), int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if not bool(numbers.isfinite().all()):
        raise CalibrationError(f"{path}: it has numbers that are not finite")
    shape = (RATIOS, layers) if curves else (layers,)
    heads = numbers.shape[-1] if numbers.dim() else 0
    if tuple(numbers.shape) != (*shape, heads) or any(size != heads for size in sizes.values()):
        wanted = ("99 × " if curves else "") + f"{layers} layers × {next(iter(sizes.values()), 0)} KV heads"
        raise CalibrationError(f"{path}: numbers of shape {tuple(numbers.shape)}, this model needs {wanted}")
    numbers = numbers.clamp(0, 1)
    name = PREFIX + (CURVE if curves else FULL)
    tensors: dict[int, dict[str, Tensor]] = {i: {name: numbers[..., i, :].contiguous()} for i in sizes}
    return Found(tensors, {"pattern": Path(path).name}, [f"{name.removeprefix(PREFIX)} of {len(tensors)} layers"])


@torch.no_grad()
def kv_heads(model: PreTrainedModel) -> dict[int, int]:
    """KV heads by layer, of those that a cache compresses: those of what it holds of one token."""
    cache = Cache(model, Method(KNorm(), when=When("deferred")), 1.0)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    feed(model, cache, ids, ids.new_ones(1, 0))
    return {layer.info.index: layer.store.lengths.shape[1] for layer in cache.compressible}
