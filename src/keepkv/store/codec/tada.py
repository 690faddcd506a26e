"""TaDA: codes of what tells a head from the mean over all heads of its token (arXiv 2506.04642)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from keepkv.core.layer_info import LayerInfo
from keepkv.core.options import Checked, Rule, one_of
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.kernels.codes import BITS, Codes, unpack
from keepkv.store.codec.base import Codec, Fields, register_codec
from keepkv.store.codec.per_token import checked_width, quantise

KIND = "tada"  # of calibration
Bits: TypeAlias = Annotated[int, Rule("2, 4 or 8", lambda x: x in BITS)]
Calibrated: TypeAlias = Annotated[str, one_of("calibrated")]
Auto: TypeAlias = Annotated[str, one_of("auto")]


def break_even(heads: int, mean_bits: float) -> float:
    """The correlation of H ``heads`` from which on their mean, of ``mean_bits`` a number, saves what it takes.

    Where heads correlate by ρ, deviations have (1 − 1/H)(1 − ρ) of the energy, which saves −½·log₂ of that in bits for
    each number of each head; the mean takes mean_bits/H. Infinite for one head, which is its own mean.
    """
    return 1 - 4.0 ** (-mean_bits / heads) / (1 - 1 / heads) if heads > 1 else float("inf")


def mean_bits(mean: str, width: int) -> float:
    """Bits of a mean of ``width`` numbers, for each of them, as the option ``mean`` has it."""
    return 16.0 if mean == "16bit" else 8 + 32 / width


@register_codec("tada")
@dataclass(frozen=True)
class Tada(Checked, Codec):
    """x̂ = mean − (scale·code + zero), with the mean over the KV heads of a token, and codes of mean − x.

    Deviations are taken from the mean as it is held. Each token has a mean, in bfloat16 or, with ``mean="8bit"``, in
    codes of 8 bits; each of its heads a scale and a zero, in float16. Keys are written after RoPE, which turns all
    heads of a token alike, and their mean with them.

    bits: 2, 4 or 8, or "calibrated", as ``keepkv calibrate tada`` found for each layer. centre: True, as in the paper;
    False, codes of x itself, without any mean; "auto", whichever takes less, by the correlation of heads that the
    calibration found. key_bits, value_bits, key_centre, value_centre: where keys and values differ.
    """

    together: ClassVar[bool] = True  # all heads of a token

    bits: Bits | Calibrated = 4
    key_bits: Bits | None = None
    value_bits: Bits | None = None
    mean: Annotated[str, one_of("16bit", "8bit")] = "16bit"
    centre: bool | Auto = "auto"
    key_centre: bool | None = None
    value_centre: bool | None = None

    @property
    def needs_calibration(self) -> str | None:  # type: ignore[override]
        bits, centre = {*self._both("bits").values()}, {*self._both("centre").values()}
        return KIND if "calibrated" in bits or "auto" in centre else None

    def for_layer(self, layer: LayerInfo, calibration: Mapping[str, Tensor] | None) -> Tada:
        """With the bits of the layer, and without means that do not pay; warns where none does in the whole model."""
        if self.needs_calibration is None:
            return self
        if calibration is None or "tada_rho" not in calibration:
            raise CalibrationError(f"layer {layer.index}: bits and centring need a calibration {KIND!r}")
        heads, *widths = calibration["tada_shape"].tolist()
        least = [break_even(heads, mean_bits(self.mean, width)) for width in widths]
        asked, rho, most = self._both("centre"), calibration["tada_rho"].tolist(), calibration["tada_most"].tolist()
        if layer.rank == 0 and "auto" in asked.values() and all(x < y for x, y in zip(most, least, strict=True)):
            warnings.warn(
                f"codec 'tada' centres nothing in this model: its {heads} heads correlate by at most {most[0]:.2f} "
                f"(keys) and {most[1]:.2f} (values), and means pay from {least[0]:.2f} on. Codes are written without "
                "them; centre=True takes them all the same.",
                stacklevel=2,
            )
        own = [rho[i] >= least[i] if x == "auto" else x for i, x in enumerate(asked.values())]
        bits = int(calibration["tada_bits"]) if self.bits == "calibrated" else self.bits
        return replace(self, bits=bits, centre=False, key_centre=own[0], value_centre=own[1])

    # --- what a layout calls -------------------------------------------------------------------------------------

    def encode(self, keys: Tensor, values: Tensor) -> Fields:
        """Fields of all KV heads of the same tokens, keys (B,H,S,D) and values (B,H,S,Dv): "…_mean" (B,1,S,·)."""
        fields: Fields = {"like": values[..., :1, :, :0]}
        for name, x in (("keys", keys), ("values", values)):
            bits = self._bits(name)
            checked_width(x.shape[-1], bits, None)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.centred(name):
                mean = x.mean(-3, keepdim=True)
                if self.mean == "16bit":
                    fields[f"{name}_mean"] = mean.to(torch.bfloat16)
                else:
                    fields |= _named(f"{name}_mean", quantise(mean, 8))
                x = self._mean(name, fields, x.dtype) - x
            fields |= _named(name, quantise(x, bits))
        return fields

    def decode(self, fields: Fields) -> tuple[Tensor, Tensor]:
        dtype = fields["like"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        found = []
        for name in ("keys", "values"):
            x = self._codes(name, fields).expand(wide)
            found.append((self._mean(name, fields, wide) - x if self.centred(name) else x).to(dtype))
        return found[0], found[1]

    def packed(self, fields: Fields) -> tuple[Codes, Codes] | None:
        """None where there is a mean beside the codes: ``logits`` and ``mix`` read these."""
        keys, values = (self._codes(name, fields) for name in ("keys", "values"))
        return None if any(self._both("centre").values()) else (keys, values)

    # --- attention without decoding ------------------------------------------------------------------------------

    def logits(self, query: Tensor, fields: Fields) -> Tensor:
        """q·k̂ = q·mean − (scale·(q·code) + zero·Σq): query (B,H·G,T,D) to (B,H·G,T,S), not scaled."""
        code, scale, zero = self._parts("keys", fields, query.dtype)
        grouped = query.unflatten(1, (code.shape[1], -1))  # (B,H,G,T,D)
        scale, zero = (x.mT[:, :, None] for x in (scale, zero))  # (B,H,1,1,S)
        away = scale * (grouped @ code[:, :, None].mT) + zero * grouped.sum(-1, keepdim=True)
        found: Tensor = away.flatten(1, 2)
        return query @ self._mean("keys", fields, query.dtype).mT - found if self.centred("keys") else found

    def mix(self, weights: Tensor, fields: Fields) -> Tensor:
        """Σ p·v̂ = Σ p·mean − (Σ (p·scale)·code + Σ p·zero): weights (B,H·G,T,S) to (B,H·G,T,Dv)."""
        code, scale, zero = self._parts("values", fields, weights.dtype)
        grouped = weights.unflatten(1, (code.shape[1], -1))
        away = (grouped * scale.mT[:, :, None]) @ code[:, :, None] + grouped @ zero[:, :, None]
        found: Tensor = away.flatten(1, 2)
        return weights @ self._mean("values", fields, weights.dtype) - found if self.centred("values") else found

    # --- fields --------------------------------------------------------------------------------------------------

    def _both(self, option: str) -> dict[str, Any]:
        """An option for keys and for values."""
        own = {"keys": getattr(self, f"key_{option}"), "values": getattr(self, f"value_{option}")}
        return {name: getattr(self, option) if x is None else x for name, x in own.items()}

    def _bits(self, name: str) -> int:
        bits = self._both("bits")[name]
        if not isinstance(bits, int):
            raise KeepKVError(f"tada: bits of {name} are {bits!r}: a calibration {KIND!r} says how many each layer has")
        return bits

    def centred(self, name: str) -> bool:
        """Whether "keys" or "values" have a mean; while that is not known, they have, which takes more."""
        return bool(self._both("centre")[name])

    def _codes(self, name: str, fields: Fields) -> Codes:
        """(B,H,S,D): what lies in codes, be it x or a deviation."""
        bits, packed = self._bits(name), fields[name]
        return Codes(packed, fields[f"{name}_scale"], fields[f"{name}_zero"], bits, packed.shape[-1] * 8 // bits)

    def _parts(self, name: str, fields: Fields, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (B,H,S,D), scale and zero (B,H,S,1), in ``dtype``."""
        held = self._codes(name, fields)
        code = unpack(held.codes, held.bits, held.width)
        return code.to(dtype), fields[f"{name}_scale"].to(dtype), fields[f"{name}_zero"].to(dtype)

    def _mean(self, name: str, fields: Fields, dtype: torch.dtype) -> Tensor:
        """(B,1,S,D), as it is held."""
        mean = fields[f"{name}_mean"].to(dtype)
        if self.mean == "16bit":
            return mean
        return mean * fields[f"{name}_mean_scale"].to(dtype) + fields[f"{name}_mean_zero"].to(dtype)


def _named(name: str, parts: Any) -> Fields:
    return dict(zip((name, f"{name}_scale", f"{name}_zero"), parts, strict=True))
