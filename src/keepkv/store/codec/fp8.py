"""Keys and values in 8-bit floats."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.store.codec.base import Codec, Fields, register_codec
from keepkv.store.codec.per_token import LEAST

FORMAT, LARGEST = torch.float8_e4m3fn, 448.0


@register_codec("fp8")
class FP8(Codec):
    """8-bit floats with 4 bits of exponent and 3 of fraction (e4m3), one scale a vector: x ≈ scale · float,
    scale = max|x| / 448, held in float16. The floats are held as bytes, which every operation can move."""

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        fields: Fields = {"like": values[..., :0]}
        for name, x in (("keys", keys), ("values", values)):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(LEAST).half()
            bounded = (wide / scale.to(wide.dtype)).clamp_(-LARGEST, LARGEST)
            fields[name], fields[f"{name}_scale"] = bounded.to(FORMAT).view(torch.uint8), scale
        return fields

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        dtype = fields["like"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        floats = {name: fields[name].view(FORMAT).to(wide) for name in ("keys", "values")}
        keys, values = (x.mul_(fields[f"{name}_scale"].to(wide)) for name, x in floats.items())
        return keys.to(dtype), values.to(dtype)
