"""Rotary position embedding as data: enough to undo it, redo it elsewhere, and average it over positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

AXES = 3  # positions of a token under M-RoPE: time, height, width


def axes_of(config: Any) -> int:
    """Positions of a token, for the configuration of a text model: three with M-RoPE."""
    return AXES if "mrope_section" in str(getattr(config, "rope_parameters", None) or "") else 1


def _exact(x: Tensor) -> Tensor:
    """In float64 where the device has it: angles grow with the position, and only their fraction matters."""
    return x.float() if x.device.type == "mps" else x.double()


def mean_phase(step: Tensor, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of cos and of sin of ``p * step`` over the ``count`` positions p = start, start+1, …

    step (…) radians per position, start (B,); both results (B,…), float64 where the device has it. Closed form of the
    averaged rotation of arXiv 2510.00636: the mean of e^{ip·step} is m·e^{iφ}, φ = (start + (count−1)/2)·step,
    m = sin(count·step/2) / (count·sin(step/2)), which may be negative.
    """
    step, start = _exact(step), _exact(start)
    half = step / 2
    below = half.sin()
    flat = below.abs() < 1e-9
    # L'Hôpital where the step is a multiple of a full turn, zero above all.
    m = torch.where(
        flat,
        (count * half).cos() / half.cos(),
        (count * half).sin() / (count * below.masked_fill(flat, 1.0)),
    )
    angle = (start + (count - 1) / 2).view(-1, *([1] * step.dim())) * step
    return m * angle.cos(), m * angle.sin()


@dataclass(frozen=True)
class Rope:
    """The rotation of one layer: the first ``2 * len(inv_freq)`` dims of a head are rotated, the rest pass through.

    inv_freq (R/2,) float32: angle per position of each pair. scaling: factor the model applies to cos and sin.
    interleaved: pairs are (0,1),(2,3),… instead of (i, i + R/2). axis (R/2,) int64: where a token has three positions,
    its time, height and width (M-RoPE), the one that turns each pair, in whatever order the model mixes them; None:
    one position turns all. Positions are (…,T), and (…,T,3) with ``axis``.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    axis: Tensor | None = None

    @property
    def dims(self) -> int:
        """R: rotated dims of a head."""
        return 2 * self.inv_freq.shape[0]

    @property
    def axes(self) -> int:
        """A: positions of a token."""
        return 1 if self.axis is None else AXES

    @property
    def of_text(self) -> Rope:
        """The same, for tokens all of whose positions are the same: (…,T)."""
        return replace(self, axis=None)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """First and second of the dims of ``x`` (…,D) that turn together, (…,R/2) each."""
        rotated = x[..., : self.dims]
        if self.interleaved:
            return rotated[..., 0::2], rotated[..., 1::2]
        first, second = rotated.chunk(2, dim=-1)
        return first, second

    def _join(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        pairs = (
            torch.stack((first, second), dim=-1).flatten(-2) if self.interleaved else torch.cat((first, second), dim=-1)
        ).to(x.dtype)
        return pairs if self.dims == x.shape[-1] else torch.cat((pairs, x[..., self.dims :]), dim=-1)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self.pairs(x)
        return self._join(first * cos - second * sin, second * cos + first * sin, x)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply RoPE to ``x`` (…,T,D) at integer ``positions`` (…,T[,A]), broadcast over leading dims."""
        return self._turn(x, *self.phases(positions, self.scaling))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo ``rotate``: ``unrotate(rotate(x, p), p) == x``."""
        cos, sin = self.phases(positions, 1 / self.scaling)
        return self._turn(x, cos, -sin)

    def phases(self, positions: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        """cos and sin (…,T,R/2), float32, of the angles at ``positions`` (…,T[,A]), times ``scaling``."""
        places = positions[..., None] if self.axis is None else positions[..., self.axis]
        angle = places.to(torch.float32) * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if scaling == 1.0 else (cos * scaling, sin * scaling)

    def back(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """Write ``x`` (…,T,D), at positions of these ``phases`` with 1/``scaling``, to ``out`` as it was before
        ``rotate``: no temporary, no gradient."""
        (first, second), (a, b) = self.pairs(x), self.pairs(out)
        torch.mul(second, sin, out=a).addcmul_(first, cos)
        torch.mul(second, cos, out=b).addcmul_(first, sin, value=-1)
        out[..., self.dims :] = x[..., self.dims :]

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """``x`` (…,T,D) from where it is to ``by`` (…,T[,A]) positions on, as ``unrotate`` and ``rotate`` would."""
        return self._turn(x, *self.phases(by))

    def magnitudes(self, x: Tensor) -> Tensor:
        """Lengths (…,R/2) of the pairs of ``x`` (…,D), which no rotation changes but for ``scaling``."""
        return torch.hypot(*self.pairs(x))

    def average(self, x: Tensor, start: Tensor, count: int, transpose: bool = False) -> Tensor:
        """Apply R̄, the mean of the rotations at positions start … start+count−1, to ``x`` (B,…,D); start (B,). The
        positions are of text, so all axes have the same.

        ``transpose`` applies R̄ᵀ: (R̄μ)·k = μ·(R̄ᵀk). R̄ is no rotation: it damps the fast pairs.
        """
        shape = (x.shape[0], *([1] * (x.dim() - 2)), -1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = ((t.view(shape) * self.scaling).to(dtype) for t in mean_phase(self.inv_freq, start, count))
        return self._turn(x, cos, -sin if transpose else sin)

    def average_moment(self, moment: Tensor, start: Tensor, count: int) -> Tensor:
        """Mean of R_p M R_pᵀ over positions p = start … start+count−1, for ``moment`` M (B,H,D,D) symmetric.

        Closed form: with every pair a complex number z, E[z_a z̄_b] turns by θ_a − θ_b per position and E[z_a z_b]
        by θ_a + θ_b. Dims that are not rotated are pairs of frequency zero.
        """
        d, half = moment.shape[-1], self.dims // 2
        dims = torch.arange(d, device=moment.device)
        rotated, rest = dims[: self.dims], dims[self.dims :]
        pairs = rotated.view(-1, 2) if self.interleaved else rotated.view(2, half).T
        pairs = torch.cat((pairs, rest.view(-1, 2)))
        order = pairs.T.reshape(-1)  # all first dims, then all second dims
        x, y = pairs.T
        theta = _exact(torch.cat((self.inv_freq, self.inv_freq.new_zeros(rest.shape[0] // 2))))
        scale = torch.ones_like(theta)
        scale[:half] = self.scaling

        def block(a: Tensor, b: Tensor) -> Tensor:
            return moment[..., a[:, None], b]

        def phase(step: Tensor) -> tuple[Tensor, ...]:
            return tuple(t[:, None].to(moment.dtype) for t in mean_phase(step, start, count))

        xx, yy, xy, yx = block(x, x), block(y, y), block(x, y), block(y, x)
        cos, sin = phase(theta[:, None] - theta)
        near_re, near_im = xx + yy, yx - xy  # E[z_a z̄_b]
        near_re, near_im = near_re * cos - near_im * sin, near_re * sin + near_im * cos
        cos, sin = phase(theta[:, None] + theta)
        far_re, far_im = xx - yy, xy + yx  # E[z_a z_b]
        far_re, far_im = far_re * cos - far_im * sin, far_re * sin + far_im * cos
        top = torch.cat((near_re + far_re, far_im - near_im), dim=-1)
        bottom = torch.cat((far_im + near_im, near_re - far_re), dim=-1)
        both = torch.cat((scale, scale))
        turned = torch.cat((top, bottom), dim=-2) / 2 * (both * both[:, None]).to(moment.dtype)
        back = order.argsort()
        return turned[..., back[:, None], back]
