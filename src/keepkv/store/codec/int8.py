"""Keys and values in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.kernels.codes import Codes
from keepkv.store.codec.base import Codec, Fields, register_codec


@register_codec("int8")
class Int8(Codec):
    """Symmetric codes, one scale a slot: x ≈ scale · code, scale = max|x| / 127, held in the model's dtype."""

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        fields = {}
        for name, x in (("keys", keys), ("values", values)):
            scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(torch.finfo(torch.float16).tiny)
            fields[name] = (x.float() / scale).round_().to(torch.int8)
            fields[f"{name}_scale"] = scale.to(x.dtype)
        return fields

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        keys, values = (fields[name].to(fields[f"{name}_scale"].dtype) for name in ("keys", "values"))
        return keys.mul_(fields["keys_scale"]), values.mul_(fields["values_scale"])

    def packed(self, fields: Fields) -> tuple[Codes, Codes]:
        keys, values = (
            Codes(fields[name], fields[f"{name}_scale"], None, 8, fields[name].shape[-1]) for name in ("keys", "values")
        )
        return keys, values

    def like(self, fields: Fields) -> Tensor:
        return fields["values_scale"][..., :0]
