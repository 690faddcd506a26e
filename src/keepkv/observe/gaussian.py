"""Mean and covariance of the queries before RoPE per query head: of each row as it is read, or calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

from keepkv.core.slots import LayerView
from keepkv.errors import CalibrationError

TILE = 4096  # queries that are unrotated and centred at a time
NAMES = ("queries_count", "queries_mean", "queries_spread")
KIND = "query-statistics"  # of calibration
STORED = ("query_count", "query_mean", "query_covariance")  # its tensors: (), (H*G,D) and (H*G,D,D), float32


def zeros(view: LayerView, covariance: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """count (B,), mean (B,H*G,D) and, with ``covariance``, the sum of squared deviations (B,H*G,D,D), in ``dtype``."""
    b, heads, _, d = view.queries.shape
    shapes = [(b,), (b, heads, d), *([(b, heads, d, d)] if covariance else [])]
    return tuple(torch.zeros(shape, dtype=dtype, device=view.queries.device) for shape in shapes)


def accumulate(view: LayerView, into: tuple[Tensor, ...], first: int) -> None:
    """Add the view's queries at positions ≥ ``first`` to the statistics ``into``, in place (Chan et al.'s merge).

    Padding has a negative position and never counts. Deviations are taken from each tile's own mean: no
    cancellation, whatever the size of the mean.
    """
    count, mean, *spread = into
    for start in range(0, view.queries.shape[2], TILE):
        queries = view.queries[:, :, start : start + TILE].to(mean.dtype)
        positions = view.query_positions[:, start : start + TILE]
        if view.rope is not None:
            queries = view.rope.unrotate(queries, view.places(positions[:, None]))
        real = (positions >= max(first, 0))[:, None, :, None].to(mean.dtype)  # (B,1,T,1)
        n = real.sum((1, 2, 3))
        both = (count + n).clamp(min=1.0)
        centre = (queries * real).sum(2) / n.clamp(min=1.0)[:, None, None]
        step = centre - mean
        if spread:
            away = (queries - centre[:, :, None]) * real
            weight = (count * n / both)[:, None, None, None]
            spread[0].add_(away.transpose(-1, -2) @ away + weight * step[..., :, None] * step[..., None, :])
        mean.add_(step * (n / both)[:, None, None])
        count.add_(n)


def remember_queries(view: LayerView, first: int, covariance: bool, dtype: torch.dtype = torch.float32) -> None:
    """Fold the latest queries into ``view.state``; tensors are updated in place once they exist."""
    if NAMES[0] not in view.state:
        view.state.update(zip(NAMES, zeros(view, covariance, dtype), strict=False))
    accumulate(view, tuple(view.state[name] for name in NAMES if name in view.state), first)


def pooled(held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What is remembered of B rows, count (B,), mean (B,H*G,D) and spread (B,H*G,D,D), as if they were one: B = 1."""
    count, mean, spread = held
    total = count.sum(0, keepdim=True)
    centre = ((count / total.clamp(min=1.0))[:, None, None] * mean).sum(0, keepdim=True)
    away = mean - centre
    between = torch.einsum("b,bhd,bhe->hde", count, away, away)
    return total, centre, spread.sum(0, keepdim=True) + between


def query_gaussian(view: LayerView, first: int, covariance: bool, shrink: float | str) -> tuple[Tensor, Tensor | None]:
    """Mean (B,H*G,D) and covariance (B,H*G,D,D), or None without ``covariance``, of the queries before RoPE.

    Taken over everything remembered, or over the latest forward where nothing was. The covariance divides by N and
    is pulled towards its diagonal: (1−λ)Σ + λ·diag(Σ), λ = ``shrink`` or, for "auto", D / (D + N).
    """
    if NAMES[0] in view.state:
        held = tuple(view.state[name] for name in NAMES if name in view.state)
    else:
        held = zeros(view, covariance)
        accumulate(view, held, first)
    count, mean, *spread = held
    if not covariance or not spread:
        return mean, None
    return mean, _shrunk(spread[0] / count.clamp(min=1.0)[:, None, None, None], count, shrink)


def stored_gaussian(view: LayerView, covariance: bool, shrink: float | str) -> tuple[Tensor, Tensor | None]:
    """What ``query_gaussian`` returns, from the calibration of the layer: the same for every row."""
    if view.calibration is None:
        raise CalibrationError(f"a view without calibration: give it {', '.join(STORED)} of the kind {KIND!r}")
    rows = view.slots.shape[0]
    count, mean, sigma = (view.calibration[name].expand(rows, *view.calibration[name].shape) for name in STORED)
    return mean, _shrunk(sigma, count, shrink) if covariance else None


def _shrunk(sigma: Tensor, count: Tensor, shrink: float | str) -> Tensor:
    d = sigma.shape[-1]
    amount = d / (d + count) if shrink == "auto" else torch.full_like(count, float(shrink))
    diagonal = torch.diag_embed(sigma.diagonal(dim1=-2, dim2=-1))
    return torch.lerp(sigma, diagonal, amount[:, None, None, None])
