"""Rotary position embedding as data: enough to undo it, redo it elsewhere, and average it over positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The rotation of one layer: the first ``2 * len(inv_freq)`` dims of a head are rotated, the rest pass through.

    inv_freq (R/2,) float32: angle per position of each pair. scaling: factor the model applies to cos and sin.
    interleaved: pairs are (0,1),(2,3),… instead of (i, i + R/2).
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False

    @property
    def dims(self) -> int:
        """R: rotated dims of a head."""
        return 2 * self.inv_freq.shape[0]

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rotated = x[..., : self.dims]
        if self.interleaved:
            return rotated[..., 0::2], rotated[..., 1::2]
        first, second = rotated.chunk(2, dim=-1)
        return first, second

    def _join(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        pairs = (
            torch.stack((first, second), dim=-1).flatten(-2)
            if self.interleaved
            else torch.cat((first, second), dim=-1)
        )
        return torch.cat((pairs.to(x.dtype), x[..., self.dims :]), dim=-1)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self._pairs(x)
        return self._join(first * cos - second * sin, second * cos + first * sin, x)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply RoPE to ``x`` (…,T,D) at integer ``positions`` (…,T), broadcast over leading dims."""
        angle = positions[..., None].to(torch.float32) * self.inv_freq
        return self._turn(x, angle.cos() * self.scaling, angle.sin() * self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo ``rotate``: ``unrotate(rotate(x, p), p) == x``."""
        angle = positions[..., None].to(torch.float32) * self.inv_freq
        return self._turn(x, angle.cos() / self.scaling, -angle.sin() / self.scaling)
