"""Vectors in a few bits to try packed attention on, and what they say expanded."""

from __future__ import annotations

from typing import Any

import torch
from kernel_slots import DEVICE, ragged, rectangle
from torch import Tensor

from keepkv.kernels.codes import Codes, pack


def codes_at_random(
    *slots: int,
    bits: int,
    width: int,
    groups: int = 1,
    zero: bool = True,
    levels: bool = False,
    turn: bool = False,
    signed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Codes:
    """Vectors with entries of about size 1, as a codec would write them; scales and zeros in ``dtype``.

    signed: codes of 8 bits as int8.
    """
    code = torch.randint(0, 2**bits, (*slots, width), dtype=torch.uint8, device=DEVICE)
    low = 0.0 if levels or signed else 2**bits / -2
    scale = (0.5 + torch.rand(*slots, groups, device=DEVICE)) / (1.0 if levels else 2**bits / 3.5)
    centre = torch.randn(*slots, groups, device=DEVICE) / 3
    table = torch.linspace(-2, 2, 2**bits, device=DEVICE) + torch.randn(2**bits, device=DEVICE) / 9 if levels else None
    rotation = torch.linalg.qr(torch.randn(width, width)).Q.to(DEVICE) if turn else None
    zeros = (low * scale + centre).to(dtype) if zero else None
    packed = code.view(torch.int8) if signed else pack(code, bits)
    return Codes(packed, scale.to(dtype), zeros, bits, width, table, rotation)


def packed_rectangle(
    b: int, h: int, g: int, s: int, keys: dict[str, Any], values: dict[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """As ``rectangle``, in codes with the given options."""
    slots = rectangle(b, h, g, s, keys["width"], 1, dtype)
    coded = (codes_at_random(b, h, s, **one, dtype=dtype) for one in (keys, values))
    return slots | dict(zip(("keys", "values"), coded, strict=True))


def packed_ragged(
    lengths: list[list[int]], keys: dict[str, Any], values: dict[str, Any], g: int = 2, gap: int = 0
) -> dict[str, Any]:
    """As ``ragged``, in codes with the given options; what belongs to nobody has scales of NaN."""
    slots = ragged(lengths, keys["width"], g, gap)
    nobody = slots["keys"][..., :1].isnan()
    for name, options in (("keys", keys), ("values", values)):
        codes = codes_at_random(len(nobody), **options)
        slots[name] = codes._replace(scale=codes.scale.masked_fill(nobody, float("nan")))
    return slots


def expanded(slots: dict[str, Any]) -> dict[str, Any]:
    """The same slots as floats, all in float64."""
    return {
        name: x.expand(torch.float64) if isinstance(x, Codes)
        else x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in slots.items()
    }  # fmt: skip
