"""OSCAR: few-bit codes in a basis that is fitted to what attention does with keys and values (arXiv 2605.17757)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from keepkv.core.layer_info import LayerInfo
from keepkv.errors import CalibrationError
from keepkv.store.codec.base import Codec, register_codec
from keepkv.store.codec.per_token import PerToken

KIND = "oscar"  # of calibration
NAMES = {"keys": "oscar_keys", "values": "oscar_values"}  # its rotations (H,W,W) float32
RANGE = "oscar_range"  # and (2,) float32: shares of the range of keys and of values that have codes


@register_codec("oscar")
class Oscar(PerToken):
    """Uniform codes for each token and head in a rotated basis R = U·H·P: U the eigenvectors of what meets the vectors,
    queries for keys and attention's outputs for values; H a Hadamard matrix; P the order of reversed bits.

    A calibration says R and how much of a vector's range has codes (``keepkv calibrate oscar``), for each layer, and R
    for each KV head. Keys are written after the rotary embedding. bits: 2, 4 or 8; key_bits, value_bits, group as
    ``PerToken``: a slot takes as many bytes as there.
    """

    needs_calibration: ClassVar[str | None] = KIND

    def __init__(
        self, bits: int = 2, key_bits: int | None = None, value_bits: int | None = None, group: int | None = None
    ) -> None:
        super().__init__(bits, key_bits, value_bits, group, centre=False)
        self.turns: dict[str, Tensor] = {}
        self.ranges = {"keys": 1.0, "values": 1.0}

    def for_layer(self, layer: LayerInfo, calibration: Mapping[str, Tensor] | None) -> Codec:
        if calibration is None or not {*NAMES.values(), RANGE} <= calibration.keys():
            raise CalibrationError(f"layer {layer.index}: codec 'oscar' needs the rotations of a calibration {KIND!r}")
        own = copy(self)
        own.turns = {name: calibration[held] for name, held in NAMES.items()}
        own.ranges = dict(zip(NAMES, calibration[RANGE].tolist(), strict=True))
        for name, turn in own.turns.items():
            square = turn.dim() == 3 and turn.shape[-1] == turn.shape[-2]
            if not square or float((turn @ turn.mT - torch.eye(turn.shape[-1])).abs().max()) > 1e-3:
                raise CalibrationError(
                    f"layer {layer.index}: the rotation of {name} in the calibration {KIND!r}, {tuple(turn.shape)}, is "
                    "not one orthogonal matrix for each KV head. Make the calibration again."
                )
        return own

    def for_heads(self, count: int) -> Codec:
        other = copy(self)
        other.turns = {name: turn[:1].expand(count, -1, -1) for name, turn in self.turns.items()}
        return other

    def turn(self, name: str, width: int, device: torch.device) -> Tensor | None:
        found = self.turns.get(name)
        if found is not None and found.shape[-1] != width:
            raise CalibrationError(f"the calibration {KIND!r} is of {name} of {found.shape[-1]} numbers, not {width}")
        return None if found is None else found.to(device)

    def range_(self, name: str) -> float:
        return self.ranges[name]
