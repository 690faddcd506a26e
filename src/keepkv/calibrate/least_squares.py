"""Linear maps that foretell what slots are worth, fitted in closed form and judged on texts that are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HELD_OUT = 5  # every fifth text is for judging alone


@dataclass
class Sums:
    """Second moments (K,F+Y+1,F+Y+1) of [x, y, 1], float64: all that K fits of Y numbers to F features need."""

    targets: int = 1
    moment: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (K,N,F), y (K,N,Y): features of the tokens of a text, and what they are to foretell."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        row = torch.cat((x.to(wide), y.to(wide), torch.ones_like(y[..., :1], dtype=wide)), dim=-1)
        new = (row.mT @ row).cpu().double()
        self.moment = new if self.moment is None else self.moment + new
        self.tokens += x.shape[1]
        self.targets = y.shape[-1]

    def centred(self) -> tuple[Tensor, Tensor]:
        """Mean (K,F+Y) and covariance (K,F+Y,F+Y) of [x, y]."""
        assert self.moment is not None
        mean = self.moment[:, :-1, -1] / self.tokens
        return mean, self.moment[:, :-1, :-1] / self.tokens - mean[..., None] * mean[:, None]


@dataclass
class Fit:
    """What is summed of one layer: over the texts that are fitted, and over those that judge the fit. parts: how many
    of the features are of each kind."""

    parts: list[int] = field(default_factory=list)
    fitted: Sums = field(default_factory=Sums)
    judged: Sums = field(default_factory=Sums)

    def add(self, x: Tensor, y: Tensor, count: int) -> None:
        """As ``Sums.add``, of the ``count``-th text, from 1 on."""
        (self.fitted if count % HELD_OUT else self.judged).add(x, y)


def solved(sums: Sums, noise: float, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weights (K,Y,F) and biases (K,Y), float64: argmin E(w·(x + e) + b − y)², e noise of ``noise`` times the mean
    square of each kind of features, ``parts`` of them; stretched about the mean to the variance of y."""
    mean, moment = sums.centred()
    at = -sums.targets
    squares = moment.diagonal(dim1=-2, dim2=-1)[:, :at] + mean[:, :at].square()
    error = torch.cat([x.mean(-1, keepdim=True).expand_as(x) for x in squares.split(list(parts), dim=-1)], dim=-1)
    x, xy = moment[:, :at, :at], moment[:, :at, at:]
    w = torch.linalg.solve(x + torch.diag_embed(noise * error + 1e-12), xy).mT
    told = (w * (w @ x)).sum(-1).clamp(min=1e-24).sqrt()  # the spread of predictions
    weight = w * (_spread(moment, at).clamp(min=0.0).sqrt() / told)[..., None]
    return weight, mean[:, at:] - (weight @ mean[:, :at, None])[..., 0]


def foretold(sums: Sums, weight: Tensor) -> Tensor:
    """Squared correlation (K,Y) of what ``weight`` (K,Y,F) foretells with what came."""
    _, moment = sums.centred()
    at = -sums.targets
    told = (weight * (weight @ moment[:, :at, :at])).sum(-1)
    both = (weight * moment[:, :at, at:].mT).sum(-1)
    share: Tensor = both.square() / (told * _spread(moment, at)).clamp(min=1e-24)
    return share


def _spread(moment: Tensor, at: int) -> Tensor:
    """Variances (K,Y) of y."""
    return moment.diagonal(dim1=-2, dim2=-1)[:, at:]


def said(shares: Mapping[int, Sequence[float]], who: str, what: str = "ln(attention that tokens get)") -> list[str]:
    """Lines for a reader: how much of ``what`` is to be foretold ``who`` foretell, by layer and head."""
    every = sorted(share for heads in shares.values() for share in heads)
    if not every:
        return []
    worst = min(shares, key=lambda index: min(shares[index]))
    return [
        f"share of the variance of {what} which {who} foretell, on texts left out of the fit",
        f"median of {len(every)} heads {every[len(every) // 2]:.2f}, from {every[0]:.2f} (a head of layer {worst}) to "
        f"{every[-1]:.2f}",
    ]
