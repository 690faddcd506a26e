"""The rotation of a layer of vLLM as keepkv's ``Rope``, read off the table of cosines that the layer itself uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from keepkv.core.rope import Rope

_PROBES = (1, 2, 3, 17, 100)  # positions at which what was found must explain the table
_CONDITIONAL = ("nope", "use_rope", "is_nope_layer", "no_rope")  # attributes that say a layer may leave rotation out


def rope_of(model: nn.Module, layer_name: str) -> tuple[Rope | None, str | None]:
    """The rotation of the attention layer ``layer_name`` and None, or None and why it cannot be undone.

    Frequencies that change with the length, positions of several dimensions and layers that may not rotate at all are
    not known; both are None where a layer says that it has no rotation.
    """
    parent = layer_name.rpartition(".")[0]
    try:
        attention: Any = model.get_submodule(parent)
    except AttributeError:
        return None, f"there is no module {parent!r}"
    if not hasattr(attention, "rotary_emb"):
        return None, f"{type(attention).__name__} has no rotary_emb"
    if any(hasattr(attention, name) for name in _CONDITIONAL):
        return None, f"{type(attention).__name__} rotates some layers only"
    rotary = attention.rotary_emb
    if rotary is None:
        return None, None
    return _read(rotary)


def _read(rotary: Any) -> tuple[Rope | None, str | None]:
    kind = type(rotary).__name__
    if hasattr(rotary, "mrope_section") and rotary.mrope_section:
        return None, f"{kind} has positions of several dimensions"
    build = getattr(rotary, "_compute_cos_sin_cache", None)
    table = build() if build is not None else getattr(rotary, "cos_sin_cache", None)
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or table.shape[1] % 2:
        return None, f"{kind} has no table of cosines and sines"
    cos, sin = table.double().chunk(2, dim=-1)
    scaling = float((cos[0].square() + sin[0].square()).sqrt().mean())
    inv_freq = torch.atan2(sin[1], cos[1])
    exact = _exact(rotary)
    if exact is not None and torch.allclose(exact.double(), inv_freq, atol=1e-4):
        inv_freq = exact.double()
    for position in (p for p in _PROBES if p < len(table)):
        angle = inv_freq * position
        if not torch.allclose(cos[position], angle.cos() * scaling, atol=5e-3) or not torch.allclose(
            sin[position], angle.sin() * scaling, atol=5e-3
        ):
            return None, f"{kind} does not rotate by an angle that grows with the position"
    return Rope(inv_freq.float(), scaling, not rotary.is_neox_style), None


def _exact(rotary: Any) -> torch.Tensor | None:
    """The frequencies as the model computes them, where it does so from its base alone."""
    try:
        found = rotary._compute_inv_freq(rotary.base)
    except (AttributeError, TypeError):
        return None
    return found if isinstance(found, torch.Tensor) else None
