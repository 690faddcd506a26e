"""SALS: keys of all heads of a token as one short vector, values in a few bits (arXiv 2510.24273)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from keepkv.core.layer_info import LayerInfo
from keepkv.core.options import Rule, Size
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.kernels.codes import unpack
from keepkv.store.codec.base import Codec, Fields, register_codec
from keepkv.store.codec.none import Plain
from keepkv.store.codec.per_token import checked_width, quantise

KIND = "sals"  # of calibration
ValueBits = Annotated[int, Rule("2, 4, 8 or 16", lambda x: x in (2, 4, 8, 16))]
Rank = Size | Annotated[float, Rule("above 0 and up to 1", lambda x: 0 < x <= 1)]


class DenseLayer(Plain):
    """A layer that is held, and attended to, as without a codec."""

    selectable: ClassVar[bool] = False


@register_codec(KIND)
class Sals(Codec):
    """c = (k − μ)·A, k̂ = μ + c·Bᵀ for the keys k of all KV heads of a token, side by side, before RoPE; values in
    uniform codes. A and B (d,r), of d = H·D numbers, are the leading columns that ``keepkv calibrate sals`` found.

    rank: r, as a number or a share (float) of d. ranked: r*, the leading coordinates that selection reads, in the same
    way; None: half of r. value_bits: 2, 4, 8, or 16 for values as they are. group: numbers of a token's values, all
    heads side by side, that share a scale and a zero. dense: layers that are held as they are, counted among those
    that are compressed, from the end where below 0; their bytes count.

    Latents are held in the model's dtype. A token takes r numbers for its keys, and H·Dv·value_bits/8 bytes and 4 for
    each group. The basis belongs to the model: every cache of it reads the same.
    """

    unrotated = True
    together: ClassVar[bool] = True
    needs_calibration: ClassVar[str | None] = KIND

    def __init__(
        self, rank: Rank = 0.25, ranked: Rank | None = None, value_bits: ValueBits = 4, group: Size = 32,
        dense: tuple[int, ...] | list[int] = (),
    ) -> None:  # fmt: skip
        self.rank, self.ranked, self.value_bits, self.group, self.dense = rank, ranked, value_bits, group, tuple(dense)
        self.into = self.back = torch.zeros(0, 0)  # A, B
        self.mean = torch.zeros(0, 0)  # μ (H,D)

    def for_layer(self, layer: LayerInfo, calibration: Mapping[str, Tensor] | None) -> Codec:
        if layer.among(self.dense):
            return DenseLayer()
        known = calibration or {}
        mean, basis = known.get("sals_mean"), known.get("sals_basis")
        into = known.get("sals_into", basis)
        if mean is None or basis is None or into is None or mean.dim() != 2:
            raise CalibrationError(
                f"layer {layer.index}: a calibration {KIND!r} has 'sals_mean' (H,D) and 'sals_basis'"
            )
        columns = basis.shape[-1]
        if basis.shape != (mean.numel(), columns) or into.shape != basis.shape or not columns:
            raise CalibrationError(
                f"layer {layer.index}: 'sals_basis' {tuple(basis.shape)} is not (d, r) for keys of d = {mean.numel()}"
            )
        rank, ranked = self._ranks(mean.numel())
        if rank > columns:
            most = f"its calibration has {columns}" if columns < mean.numel() else f"a key has {columns} numbers"
            raise KeepKVError(
                f"codec 'sals', rank={self.rank}: layer {layer.index} would need {rank} coordinates, and {most}. Give "
                f"a rank up to {columns}" + (f", or calibrate with rank={rank}" if rank <= mean.numel() else "")
            )
        if ranked > rank:
            raise KeepKVError(f"codec 'sals': ranked={self.ranked} reads {ranked} of {rank} coordinates: give fewer")
        fitted = copy.copy(self)
        fitted.mean, fitted.into, fitted.back = mean, into[:, :rank], basis[:, :rank]
        return fitted

    def for_heads(self, count: int) -> Codec:
        other, heads, width = copy.copy(self), *self.mean.shape
        other.rank, other.ranked = (max(1, x * count // heads) for x in self._ranks(self.mean.numel()))
        other.mean = self.mean.new_zeros(count, width)
        other.into = other.back = self.into.new_zeros(count * width, other.rank)
        return other

    def _ranks(self, d: int) -> tuple[int, int]:
        """r and r* for keys of ``d`` numbers."""
        rank = self.rank if isinstance(self.rank, int) else max(1, round(d * self.rank))
        if self.ranked is None:
            return rank, max(1, rank // 2)
        return rank, self.ranked if isinstance(self.ranked, int) else max(1, round(d * self.ranked))

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        """Fields of all KV heads of the same tokens, each (B,1,S,·); "keys" has r* coordinates, "rest" the others."""
        if self.mean.shape != (keys.shape[1], keys.shape[3]):
            given = f"a basis for {tuple(self.mean.shape)}" if self.mean.numel() else "no basis"
            raise CalibrationError(
                f"codec 'sals' was given keys of {(keys.shape[1], keys.shape[3])} (heads, dimension) and {given}: it "
                "writes in a cache that has the calibration of its model, keepkv.Cache(…, calibration=FILE)"
            )
        wide = torch.promote_types(keys.dtype, torch.float32)
        latent = (_joined(keys.to(wide)) - self.mean.to(wide).flatten()) @ self.into.to(wide)
        latent = latent[:, None].to(values.dtype)
        _, ranked = self._ranks(self.mean.numel())
        fields = {"like": values[:, :1, :, :0], "keys": latent[..., :ranked], "rest": latent[..., ranked:]}
        joined = _joined(values)[:, None]
        return fields | self._values(joined)

    def _values(self, joined: Tensor) -> Fields:
        """Fields of values (B,1,S,H·Dv)."""
        if self.value_bits == 16:
            return {"values": joined}
        groups = checked_width(joined.shape[-1], self.value_bits, self.group)
        codes, scale, zero = quantise(joined, self.value_bits, groups)
        return {"values": codes, "values_scale": scale, "values_zero": zero}

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        keys = self._rebuilt(torch.cat((fields["keys"], fields["rest"]), -1))
        values, dtype = fields["values"], fields["like"].dtype
        if self.value_bits != 16:
            scale, wide = fields["values_scale"], torch.promote_types(dtype, torch.float32)
            code = unpack(values, self.value_bits, values.shape[-1] * 8 // self.value_bits).to(wide)
            x = code.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.to(wide)[..., None])
            values = x.add_(fields["values_zero"].to(wide)[..., None]).flatten(-2).to(dtype)
        return keys, values[:, 0].unflatten(-1, (len(self.mean), -1)).transpose(1, 2)

    def glance(self, fields: Fields, shared: Fields) -> Tensor:
        return self._rebuilt(fields["keys"])

    def _rebuilt(self, latent: Tensor) -> Tensor:
        """Keys (B,H,S,D), float32 or wider, of the leading coordinates (B,1,S,·)."""
        x = latent[:, 0].to(torch.promote_types(latent.dtype, torch.float32))
        keys = x @ self.back[:, : x.shape[-1]].to(x.dtype).mT + self.mean.to(x.dtype).flatten()
        rebuilt: Tensor = keys.unflatten(-1, self.mean.shape).transpose(1, 2)
        return rebuilt

    # --- bytes ---------------------------------------------------------------------------------------------------

    def blank(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Fields, Fields]:
        rank, ranked = self._ranks(self.mean.numel() or heads * key_dim)
        x = torch.zeros(1, 1, 1, rank, dtype=dtype)
        values = torch.zeros(1, 1, 1, (len(self.mean) or heads) * value_dim, dtype=dtype)
        return {"like": x[..., :0], "keys": x[..., :ranked], "rest": x[..., ranked:]} | self._values(values), {}

    def glance_bytes(self, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        return self._ranks(heads * key_dim)[1] * dtype.itemsize


def _joined(x: Tensor) -> Tensor:
    """(B,S,H·D) of (B,H,S,D)."""
    return x.transpose(1, 2).flatten(2)
