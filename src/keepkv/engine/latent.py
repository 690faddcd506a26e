"""Multi-head latent attention (MLA): the cache holds latents, from which a layer expands keys and values.

In the absorbed view (arXiv 2405.04434, §2.1) MLA is attention with a single KV head: the key of a slot is
(rotated part, latent), its value is the latent, and the expanding projection moves into the query and the output.
No expanded key or value of the past ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keepkv.attention.part import Part
from keepkv.core.slots import Slots


def is_latent(module: Any) -> bool:
    """Whether an attention module caches latents and expands them with ``kv_b_proj``."""
    names = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    return all(hasattr(module, name) for name in names)


def _projections(module: Any) -> tuple[Tensor, Tensor]:
    """Weights that expand a latent to the unrotated keys (heads, nope, r) and the values (heads, v, r)."""
    weight = module.kv_b_proj.weight
    weight = weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
    return weight[:, : module.qk_nope_head_dim], weight[:, module.qk_nope_head_dim :]


def absorb_query(module: Any, query: Tensor) -> Tensor:
    """(B,heads,T,nope+rot) → (B,heads,T,rot+r): the query against (rotated key, latent)."""
    to_key, _ = _projections(module)
    unrotated, rotated = query.split((module.qk_nope_head_dim, query.shape[-1] - module.qk_nope_head_dim), dim=-1)
    return torch.cat((rotated, torch.einsum("bhtn,hnr->bhtr", unrotated, to_key)), dim=-1)


def expand_output(module: Any, out: Tensor) -> Tensor:
    """(B,heads,T,r) weighted latents → (B,heads,T,v)."""
    _, to_value = _projections(module)
    return torch.einsum("bhtr,hvr->bhtv", out, to_value)


def absorbed_part(part: Part) -> Part:
    """Stored (latent, rotated key) → attention's (keys, values)."""
    return part._replace(keys=torch.cat((part.values, part.keys), dim=-1), values=part.keys)


def absorbed_slots(slots: Slots) -> Slots:
    """The same for the view that scores see; the rotated dims come first, as ``Rope`` expects."""
    return slots.with_(keys=torch.cat((slots.values, slots.keys), dim=-1), values=slots.keys)


def stored_slots(slots: Slots) -> Slots:
    """Inverse of ``absorbed_slots``."""
    rank = slots.values.shape[-1]
    return slots.with_(keys=slots.values, values=slots.keys[..., : slots.keys.shape[-1] - rank])
