"""Keys in a few bits channel by channel: some channels are large for every token, and get a scale of their own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.pick import pick
from keepkv.kernels.codes import pack, unpack
from keepkv.store.codec.base import Codec, Fields, register_codec
from keepkv.store.codec.per_token import LEAST, checked_bits, checked_width, quantise

GROUP = 32  # tokens that share the scale and the zero of a channel, at most


@register_codec("kivi")
class Kivi(Codec):
    """Keys by channel, values by token, as KIVI (arXiv 2402.02750, §3): for each channel c of 32 tokens in a row,
    key ≈ scale_c · code + zero_c.

    bits: 2, 4 or 8; key_bits, value_bits: where keys and values have different ones. Scales and zeros of a group of
    tokens belong to the row; each slot says which group is its own, so slots move and leave as with any codec, and a
    group that no slot needs any more is forgotten at the next compression. A slot takes D·key_bits/8 bytes and 4 for
    its group, Dv·value_bits/8 and 4; a group takes 4·D. The newest 32 to 64 tokens are exact.
    """

    grouped: ClassVar[int] = GROUP

    def __init__(self, bits: int = 2, key_bits: int | None = None, value_bits: int | None = None) -> None:
        self.key_bits, self.value_bits = checked_bits(key_bits or bits), checked_bits(value_bits or bits)

    def write(self, keys: Tensor, values: Tensor, valid: Tensor, shared: Fields) -> tuple[Fields, Fields]:
        b, h, s, d = keys.shape
        checked_width(d, self.key_bits, None)
        wide, many = torch.promote_types(keys.dtype, torch.float32), -(-s // GROUP)
        x = torch.nn.functional.pad(keys.to(wide), (0, 0, 0, many * GROUP - s)).unflatten(2, (many, GROUP))
        there = torch.nn.functional.pad(valid, (0, many * GROUP - s)).unflatten(2, (many, GROUP))[..., None]
        some = there.any(3)
        low = x.masked_fill(~there, torch.inf).amin(3).where(some, x.new_zeros(()))
        high = x.masked_fill(~there, -torch.inf).amax(3).where(some, x.new_zeros(()))
        zero = low.half()
        scale = ((high - zero) / (2**self.key_bits - 1)).clamp_min(LEAST).half()
        code = ((x - zero[:, :, :, None].to(wide)) / scale[:, :, :, None].to(wide)).round_()
        code = code.clamp_(0, 2**self.key_bits - 1).to(torch.uint8).flatten(2, 3)[:, :, :s]
        first = shared["scale"].shape[2] if shared else 0
        group = first + torch.arange(s, device=keys.device, dtype=torch.int32) // GROUP
        fields = {"like": values[..., :0], "keys": pack(code, self.key_bits)}
        fields["group"] = group[None, None, :, None].expand(b, h, s, 1).contiguous()
        checked_width(values.shape[-1], self.value_bits, None)
        fields["values"], fields["values_scale"], fields["values_zero"] = quantise(values, self.value_bits)
        more = {"scale": scale, "zero": zero}
        return fields, {n: torch.cat((shared[n], x), 2) for n, x in more.items()} if shared else more

    def read(self, fields: Fields, shared: Fields) -> tuple[Tensor, Tensor]:
        dtype, width = fields["like"].dtype, fields["keys"].shape[-1] * 8 // self.key_bits
        wide = torch.promote_types(dtype, torch.float32)
        at = fields["group"].long().expand(*fields["group"].shape[:3], width)
        scale, zero = (shared[name].gather(2, at).to(wide) for name in ("scale", "zero"))
        keys = unpack(fields["keys"], self.key_bits, width).to(wide).mul_(scale).add_(zero)
        value = unpack(fields["values"], self.value_bits, fields["values"].shape[-1] * 8 // self.value_bits).to(wide)
        values = value.mul_(fields["values_scale"].to(wide)).add_(fields["values_zero"].to(wide))
        return (keys if self.unrotated else keys.to(dtype)), values.to(dtype)

    def prune(self, fields: Fields, valid: Tensor, shared: Fields) -> tuple[Fields, Fields]:
        count = shared["scale"].shape[2]
        group = fields["group"][..., 0].long()
        needed = torch.zeros(*group.shape[:2], count + 1, dtype=torch.bool, device=group.device)
        needed = needed.scatter_(2, group.masked_fill(~valid, count), True)[..., :count]
        left = max(1, int(needed.sum(-1).max()) if needed.numel() else 0)  # empty slots point at the first
        order = needed.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :left]
        new = (needed.cumsum(-1) - 1).clamp_min_(0).gather(2, group).masked_fill_(~valid, 0)
        kept = {n: pick(x, order) for n, x in shared.items()}
        return {**fields, "group": new[..., None].to(torch.int32)}, kept

    def check(self, fields: Fields, shared: Fields) -> None:
        count, group = shared["scale"].shape[2] if shared else 0, fields["group"]
        if bool((group < 0).any()) or bool((group >= count).any()):
            raise ValueError(f"'group' points outside of the {count} groups that there are")


@register_codec("kvquant")
class KVQuant(Kivi):
    """Keys by channel before the rotary embedding, where channels keep their size from token to token, as KVQuant
    (arXiv 2401.18079, §3.1–3.2); values by token. Its fitted levels and its sparse outliers are left out.

    Options and bytes as ``Kivi``.
    """

    unrotated = True
