"""Rotations written out, and models whose own rotation can be watched."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from keepkv.core.rope import Rope

F64 = torch.float64
BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def make(dims: int, interleaved: bool, scaling: float) -> Rope:
    """Frequencies from one radian per position down to none at all."""
    inv_freq = torch.cat((torch.logspace(0, -3, dims // 2 - 1), torch.zeros(1)))
    return Rope(inv_freq, scaling, interleaved)


def matrix(rope: Rope, position: int, dim: int = 8) -> Tensor:
    """R_p (D,D) float64, written out."""
    out = torch.eye(dim, dtype=F64)
    half = rope.dims // 2
    for i, angle in enumerate((rope.inv_freq.double() * position).tolist()):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        cos, sin = torch.tensor(angle, dtype=F64).cos(), torch.tensor(angle, dtype=F64).sin()
        out[a, a], out[a, b], out[b, a], out[b, b] = cos, -sin, sin, cos
        out[a] *= rope.scaling
        out[b] *= rope.scaling
    return out


def tiny(name: str, **changes: Any) -> Any:
    config = getattr(t, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**{**BASE, **changes})
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a norm of ones would hide whether it comes before or after the rotation
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rotations(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, ids: Tensor, positions: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys before and after the model's own ``apply_rotary_pos_emb``, layer by layer.

    positions (1,T): where the tokens stand, from 0 on if absent.
    """
    module = sys.modules[type(model).__module__]
    real, seen = module.apply_rotary_pos_emb, []

    def spy(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real(q, k, *args, **kwargs)
        seen.extend([(q, out[0]), (k, out[1])])
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "apply_rotary_pos_emb", spy)
        model(ids, position_ids=positions)
    return seen
