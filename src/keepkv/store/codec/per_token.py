"""Keys and values of each token in a few bits, by themselves: nothing is shared between tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.options import shown
from keepkv.errors import KeepKVError
from keepkv.kernels.codes import BITS, Codes, pack
from keepkv.store.codec.base import Codec, Fields, register_codec
from keepkv.store.codec.centre import learn_mean

LEAST = 2.0**-24  # the least scale: of float16


def quantise(x: Tensor, bits: int, groups: int = 1, range_: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform codes of x (…,W): x ≈ scale·code + zero for each W/groups numbers side by side.

    zero = min x, scale = (max x − min x) / (2^bits − 1); codes are taken with scale and zero as they are held. range_:
    share of what lies between the least and the greatest number that has codes, about its middle. Returns codes packed
    (…,W·bits/8) uint8, scale and zero (…,groups) float16: numbers beyond ±65,504 become NaN.
    """
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))
    low, high = grouped.aminmax(dim=-1)
    if range_ != 1.0:
        outside = (high - low) * ((1 - range_) / 2)
        low, high = low + outside, high - outside
    zero = low.half()
    scale = ((high - zero) / (2**bits - 1)).clamp_min(LEAST).half()
    code = grouped.sub(zero[..., None].to(grouped.dtype)).div_(scale[..., None].to(grouped.dtype)).round_()
    return pack(code.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2), bits), scale, zero


def checked_bits(bits: int) -> int:
    """``bits`` of a code, if there is such a one."""
    if bits not in BITS:
        raise KeepKVError(f"bits={shown(bits)}: expected one of {', '.join(map(str, BITS))}")
    return bits


def checked_width(width: int, bits: int, group: int | None) -> int:
    """How many groups a vector of ``width`` numbers has, if its codes fill whole bytes and groups; one at least."""
    group = None if group is None else min(group, width)
    if width * bits % 8 or width % (group or width):
        whole = f"whole bytes of {bits}-bit codes" + (f" and whole groups of {group}" if group else "")
        raise KeepKVError(f"vectors of {width} numbers do not make {whole}. Give more bits, or another codec.")
    return width // (group or width)


class PerToken(Codec):
    """Uniform codes between the least and the greatest number of each vector, or of each ``group`` of its numbers.

    bits: 2, 4 or 8; key_bits, value_bits: where keys and values have different ones. group: numbers that share a scale
    and a zero, a power of two; None: all of a vector. centre: take the mean key of each head out; by default where keys
    have fewer than 8 bits. The content of a slot takes D·key_bits/8 + Dv·value_bits/8 bytes, and 4 for each group; a
    head's mean takes 4·D once for each row.
    """

    def __init__(
        self, bits: int = 4, key_bits: int | None = None, value_bits: int | None = None, group: int | None = None,
        centre: bool | None = None,
    ) -> None:  # fmt: skip
        self.bits = {"keys": checked_bits(key_bits or bits), "values": checked_bits(value_bits or bits)}
        self.group, self.centre = group, self.bits["keys"] < 8 if centre is None else centre
        if group is not None and not (type(group) is int and group > 0 and group & (group - 1) == 0):
            raise KeepKVError(
                f"group={shown(group)}: expected how many numbers share a scale, a power of two such as 32"
            )

    def turn(self, name: str, width: int, device: torch.device) -> Tensor | None:
        """The orthogonal matrix (W,W) float32 that vectors are multiplied with when they are read; None: none.

        name: "keys" or "values". It may be (H,W,W), one for each KV head.
        """
        return None

    def range_(self, name: str) -> float:
        """The share of the range of a vector that has codes, see ``quantise``."""
        return 1.0

    def learn(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> Fields:
        return learn_mean(keys, valid, shared) if self.centre else shared

    def write(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> tuple[Fields, Fields]:
        wide = torch.promote_types(keys.dtype, torch.float32)
        return self.encode(keys.to(wide) - shared["mean"].to(wide) if shared else keys, values), shared

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        fields: Fields = {"like": values[..., :0]}
        for name, x in (("keys", keys), ("values", values)):
            bits, width = self.bits[name], x.shape[-1]
            groups, turn = checked_width(width, bits, self.group), self.turn(name, width, x.device)
            if turn is not None:
                wide = torch.promote_types(x.dtype, torch.float32)
                x = x.to(wide) @ turn.mT.to(wide)
            fields[name], fields[f"{name}_scale"], fields[f"{name}_zero"] = quantise(x, bits, groups, self.range_(name))
        return fields

    def token_bytes(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        widths = (("keys", key_dim), ("values", value_dim))
        return heads * sum(
            width * self.bits[name] // 8 + 4 * checked_width(width, self.bits[name], self.group)
            for name, width in widths
        )

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        keys, values = self.packed(fields)
        return keys.expand(fields["like"].dtype), values.expand(fields["like"].dtype)

    def read(self, fields: Fields, shared: Fields) -> tuple[Tensor, Tensor]:
        if not shared:
            return self.decode(fields)
        dtype, (keys, values) = fields["like"].dtype, self.packed(fields)
        return keys.expand(dtype, shared["mean"]), values.expand(dtype)

    def shift(self, shared: Fields) -> Tensor | None:
        return shared["mean"][:, :, 0] if shared else None

    def packed(self, fields: Fields) -> tuple[Codes, Codes]:
        return self._codes(fields, "keys"), self._codes(fields, "values")

    def _codes(self, fields: Fields, name: str) -> Codes:
        codes, bits = fields[name], self.bits[name]
        width = codes.shape[-1] * 8 // bits
        turn = self.turn(name, width, codes.device)
        return Codes(codes, fields[f"{name}_scale"], fields[f"{name}_zero"], bits, width, turn=turn)


@register_codec("int4")
class Int4(PerToken):
    """4-bit codes for each token: as ``PerToken``."""


@register_codec("int2")
class Int2(PerToken):
    """2-bit codes for each token: as ``PerToken`` with 2 bits and a scale for each 32 numbers."""

    def __init__(
        self, bits: int = 2, key_bits: int | None = None, value_bits: int | None = None, group: int | None = None
    ) -> None:
        super().__init__(bits, key_bits, value_bits, group)
