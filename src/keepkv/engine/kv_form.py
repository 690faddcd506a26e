"""How what a layer caches relates to the queries, keys and values of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from keepkv.attention.part import Part, plain
from keepkv.core.layer_info import LayerInfo
from keepkv.core.slots import Slots
from keepkv.engine.devices import in_memory


class KVForm:
    """The plain form: keys and values are cached as attention takes them."""

    one_content: ClassVar[bool] = False  # keys and values are the same numbers, so they cannot be merged apart
    model_expands: ClassVar[bool] = False  # the model makes keys and values of what the cache returns

    def query(self, module: Any, query: Tensor) -> Tensor:
        """The query (B,Hq,T,·) against the keys of ``part`` and ``view``."""
        return query

    def output(self, module: Any, out: Tensor) -> Tensor:
        """Attention's output (B,Hq,T,Dv) of the weighted values of ``part``."""
        return out

    def of_stored(self, layer: LayerInfo) -> LayerInfo:
        """``layer`` as it is true of stored keys."""
        return layer

    def parts(self, parts: Iterator[Part]) -> Iterator[Part]:
        """Stored slots as attention reads them."""
        return parts

    def view(self, slots: Slots) -> Slots:
        """Stored slots as scores see them."""
        return slots

    def stored(self, slots: Slots) -> Slots:
        """The inverse of ``view``."""
        return slots


class LatentForm(KVForm):
    """Multi-head latent attention: the cache holds (latent, rotated key), from which the model expands keys and values.

    In the absorbed view (arXiv 2405.04434, §2.1) it is attention with a single KV head: the key of a slot is (rotated
    part, latent), its value is the latent, and the expanding projection moves into the query and the output. No
    expanded key or value of the past ever exists.
    """

    one_content: ClassVar[bool] = True
    model_expands: ClassVar[bool] = True

    def query(self, module: Any, query: Tensor) -> Tensor:
        """(B,heads,T,nope+rot) → (B,heads,T,rot+r)."""
        to_key, _ = _projections(module, query)
        unrotated, rotated = query.split((module.qk_nope_head_dim, query.shape[-1] - module.qk_nope_head_dim), dim=-1)
        return torch.cat((rotated, torch.einsum("bhtn,hnr->bhtr", unrotated, to_key)), dim=-1)

    def output(self, module: Any, out: Tensor) -> Tensor:
        """(B,heads,T,r) weighted latents → (B,heads,T,v)."""
        _, to_value = _projections(module, out)
        return torch.einsum("bhtr,hvr->bhtv", out, to_value)

    def of_stored(self, layer: LayerInfo) -> LayerInfo:
        """Stored keys are latents, which are not rotated."""
        return replace(layer, rope=None)

    def parts(self, parts: Iterator[Part]) -> Iterator[Part]:
        for tile in (tile for part in parts for tile in part.tiles()):
            keys, values = plain(tile)
            yield tile._replace(keys=torch.cat((values, keys), dim=-1), values=keys)

    def view(self, slots: Slots) -> Slots:
        """The rotated dims come first, as ``Rope`` expects."""
        return slots.with_(keys=torch.cat((slots.values, slots.keys), dim=-1), values=slots.keys)

    def stored(self, slots: Slots) -> Slots:
        rank = slots.values.shape[-1]
        return slots.with_(keys=slots.values, values=slots.keys[..., : slots.keys.shape[-1] - rank])


def form_of(module: Any) -> KVForm:
    """The form of what an attention module caches."""
    return LatentForm() if is_latent(module) else KVForm()


def is_latent(module: Any) -> bool:
    """Whether an attention module caches latents and expands them with ``kv_b_proj``."""
    names = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    return all(hasattr(module, name) for name in names)


def _projections(module: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weights that expand a latent to the unrotated keys (heads, nope, r) and the values (heads, v, r); on the device
    of ``like``."""
    weight = in_memory(module.kv_b_proj, "weight")
    assert weight is not None
    weight = weight.to(like.device)
    weight = weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank)
    return weight[:, : module.qk_nope_head_dim], weight[:, module.qk_nope_head_dim :]
