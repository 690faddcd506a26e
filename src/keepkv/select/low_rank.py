"""Selection by a few coordinates of keys: SALS's rule on latents, Loki's on rotated keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.options import Share
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.kernels.codes import Codes
from keepkv.kernels.logits import cap_logits
from keepkv.select.base import Asked, Select, register_select
from keepkv.store.codec.base import Codec
from keepkv.store.codec.sals import Sals


@register_select("latent")
@dataclass(frozen=True)
class Latent(Select):
    """The rule of SALS (arXiv 2510.24273): q̃[:r*]·c[:r*] of the query before RoPE, averaged over a group and taken
    into the latent space, and of latent keys c; one set for all heads. It does not know how far away a token is."""

    def scores(self, asked: Asked) -> Tensor:
        codec, (b, h), query = asked.slots.content.codec, asked.slots.positions.shape[:2], asked.query
        assert isinstance(codec, Sals)
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        if (rope := asked.layer.rope) is not None:
            place = asked.seen - 1 if asked.place is None else asked.place
            query = rope.unrotate(query[:, :, None], place[:, None, None])[:, :, 0]
        mean = query.view(b, h, -1, query.shape[-1]).mean(2).flatten(1)
        latent = (mean @ codec.back.to(mean.dtype))[:, None]  # (B,1,r)
        tiles = (zone.tile(0, zone.length)["keys"].to(mean.dtype) for zone in asked.slots.zones)
        scores = [(latent[..., None, : keys.shape[-1]] @ keys.mT)[:, :, 0] for keys in tiles]
        found, positions = torch.cat(scores, -1), asked.slots.positions[:, :1]
        # A token that comes again has the same key before RoPE: the newest comes first.
        size = found.abs().masked_fill(positions < 0, 0).amax(-1, keepdim=True)
        return (found + 1e-5 * size * positions / asked.seen[:, None, None]).expand(b, h, -1)

    def check_codec(self, codec: Codec) -> None:
        if not isinstance(codec, Sals):
            raise KeepKVError(
                "select='latent' scores the latent keys that codec='sals' writes: give that codec, or a selection that "
                "takes any, such as 'exact'"
            )


@register_select("loki")
@dataclass(frozen=True)
class Loki(Select):
    """The greatest attention by the leading PCA coordinates of rotated keys, head by head (Loki, arXiv 2406.02542).

    coordinates: share of a head's that is looked at. A comparison: the coordinates are made of the stored keys for
    every token, so its choice and its count of bytes are Loki's, and its time is not.
    """

    coordinates: Share = 0.25

    needs_calibration: ClassVar[str | None] = "loki"

    def scores(self, asked: Asked) -> Tensor:
        slots, query = asked.slots, asked.query
        basis = (asked.calibration or {}).get("loki_basis")
        (b, h), width = slots.positions.shape[:2], query.shape[-1]
        if basis is None or basis.shape != (h, width, width):
            raise CalibrationError(f"layer {asked.layer.index}: 'loki_basis' is not {(h, width, width)}")
        wide = torch.promote_types(query.dtype, torch.float32)
        basis = basis[..., : max(1, round(width * self.coordinates))].to(wide)
        few, found = query.to(wide).view(b, h, -1, width) * asked.scaling @ basis, []
        for keys in slots.keys():
            found.append(few @ (keys.expand(wide) if isinstance(keys, Codes) else keys.to(wide)).matmul(basis).mT)
        return asked.masses(cap_logits(torch.cat(found, -1), asked.softcap) + slots.bias[:, :, None])

    def glance_bytes(self, codec: Codec, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> float:
        return heads * max(1, round(key_dim * self.coordinates)) * dtype.itemsize
