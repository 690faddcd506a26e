"""Keys and values in 8-bit floats."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from keepkv.kernels.codes import Codes
from keepkv.store.codec.base import Codec, Fields, register_codec
from keepkv.store.codec.per_token import LEAST

FORMAT, LARGEST = torch.float8_e4m3fn, 448.0


@lru_cache(maxsize=64)
def levels(device: torch.device) -> Tensor:
    """What each byte stands for, (256,) float32; 0 for the two that are no number and are never written."""
    return torch.arange(256, dtype=torch.uint8).view(FORMAT).float().nan_to_num(0.0).to(device)


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

    def packed(self, fields: Fields) -> tuple[Codes, Codes]:
        keys, values = (
            Codes(codes, fields[f"{name}_scale"], None, 8, codes.shape[-1], levels(codes.device))
            for name, codes in ((name, fields[name]) for name in ("keys", "values"))
        )
        return keys, values
