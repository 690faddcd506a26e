"""Codes of rotated vectors at the levels that are best for numbers with a normal distribution."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from keepkv.core.options import shown
from keepkv.errors import KeepKVError
from keepkv.kernels.codes import Codes, pack
from keepkv.store.codec.base import Codec, Fields, register_codec
from keepkv.store.codec.centre import learn_mean
from keepkv.store.codec.hadamard import hadamard
from keepkv.store.codec.per_token import LEAST, checked_bits, checked_width

ROUNDS = 2000  # of Lloyd's iteration: it has converged by then


@lru_cache(maxsize=8)
def levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of least mean squared error for a standard normal number (Lloyd 1982, Max 1960)."""
    count = 2**bits
    at = [2.0 * (i + 0.5 - count / 2) * 2 / count for i in range(count)]
    for _ in range(ROUNDS):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(at)), math.inf]
        at = [_mean(a, b) for a, b in pairwise(edges)]
    return tuple(at)


def _mean(low: float, high: float) -> float:
    """Mean of a standard normal number between two bounds."""
    density = [0.0 if math.isinf(x) else math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    below = [0.5 * math.erfc(-x / math.sqrt(2)) for x in (low, high)]
    return (density[0] - density[1]) / (below[1] - below[0])


@register_codec("lloyd-max")
class LloydMax(Codec):
    """Each vector rotated by a Hadamard matrix, divided by its length over √W, at Lloyd–Max levels: TurboQuant without
    its sketch of the residual (arXiv 2504.19874).

    bits: 2 or 4; key_bits, value_bits: where keys and values have different ones. centre: take the mean key of each
    head out, before the rotary embedding; by default where keys have 2 bits. A slot takes D·bits/8 bytes for the key,
    as much for the value, and 2 for each length; a head's mean takes 4·D once for each row.
    """

    def __init__(
        self, bits: int = 4, key_bits: int | None = None, value_bits: int | None = None, centre: bool | None = None
    ) -> None:
        self.bits = {"keys": _few(key_bits or bits), "values": _few(value_bits or bits)}
        self.unrotated = self.bits["keys"] == 2 if centre is None else centre

    def learn(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> Fields:
        return learn_mean(keys, valid, shared) if self.unrotated else shared

    def write(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> tuple[Fields, Fields]:
        keys = keys - shared["mean"] if self.unrotated else keys
        return self.encode(keys, values), shared

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        fields: Fields = {"like": values[..., :0]}
        for name, x in (("keys", keys), ("values", values)):
            bits, width = self.bits[name], x.shape[-1]
            checked_width(width, bits, None)
            wide = torch.promote_types(x.dtype, torch.float32)
            x = x.to(wide) @ hadamard(width, x.device).mT.to(wide)
            scale = (x.square().mean(-1, keepdim=True).sqrt()).clamp_min(LEAST).half()
            at = torch.tensor(levels(bits), dtype=wide, device=x.device)
            code = torch.bucketize(x / scale.to(wide), (at[1:] + at[:-1]) / 2)
            fields[name], fields[f"{name}_scale"] = pack(code.to(torch.uint8), bits), scale
        return fields

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        keys, values = (self._codes(fields, name).expand(fields["like"].dtype) for name in ("keys", "values"))
        return keys, values

    def read(self, fields: Fields, shared: Fields) -> tuple[Tensor, Tensor]:
        if not self.unrotated:
            return self.decode(fields)
        values = self._codes(fields, "values").expand(fields["like"].dtype)
        return self._codes(fields, "keys").expand(shared["mean"].dtype) + shared["mean"], values

    def packed(self, fields: Fields) -> tuple[Codes, Codes] | None:
        return None if self.unrotated else (self._codes(fields, "keys"), self._codes(fields, "values"))

    def _codes(self, fields: Fields, name: str) -> Codes:
        codes, bits = fields[name], self.bits[name]
        width = codes.shape[-1] * 8 // bits
        at, turn = torch.tensor(levels(bits), device=codes.device), hadamard(width, codes.device)
        return Codes(codes, fields[f"{name}_scale"], None, bits, width, at, turn)


def _few(bits: int) -> int:
    if checked_bits(bits) == 8:
        raise KeepKVError(f"bits={shown(bits)}: Lloyd–Max levels are for 2 or 4 bits; at 8 give codec='hadamard'")
    return bits
