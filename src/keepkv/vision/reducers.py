"""Reducers: fewer vision features, before the language model sees any.

Each takes the features of one picture (n,E), how much attention each received in the vision tower (n,), the keys by
which the tower compares them (n,D), and how many to leave; it returns features (count,E), and the indices (count,) of
the features that they stand for, ascending.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

Reducer = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]

DOMINANT = 5.4 / 6.4  # of VisionZip's tokens
NEAREST = 32  # that enter each of PruMerge's


def visionzip(features: Tensor, attention: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """VisionZip (arXiv 2412.04467): dominant tokens as they are, and contextual ones that take in the others.

    round(``count`` · 5.4/6.4) of the largest attention are dominant. Of the others every so many-th is contextual, and
    gets the mean of those that are nearest to it by the cosine of keys added: f_c ← f_c + mean f_e.
    """
    n = len(features)
    if count >= n:
        return features, torch.arange(n, device=features.device)
    order = attention.argsort(descending=True, stable=True)
    dominant = order[: max(1, round(DOMINANT * count))][:count]
    rest = order[len(dominant) :].sort().values
    left = count - len(dominant)
    made = features.clone()
    contextual = rest[_even(len(rest), left).to(rest.device)]
    others = rest[~torch.isin(rest, contextual)]
    if left and len(others):
        unit = normalize(keys.double(), dim=-1)
        into = (unit[others] @ unit[contextual].T).argmax(-1)
        added = torch.zeros(left, features.shape[1], dtype=torch.float64, device=features.device)
        added.index_add_(0, into, features[others].double())
        arrivals = torch.bincount(into, minlength=left).clamp(min=1)
        made[contextual] = (features[contextual].double() + added / arrivals[:, None]).to(features.dtype)
    index = torch.cat((dominant, contextual)).sort().values
    return made[index], index


def prumerge_plus(features: Tensor, attention: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """PruMerge+ (arXiv 2403.15388): outliers of attention, filled up evenly, each with its neighbours added.

    Outliers are above the third quartile by 1.5 interquartile ranges; of more than ``count`` the largest stay. Every so
    many-th of the others fills up. f_i ← f_i + Σ_j a_j·f_j over the 32 others of the largest key cosine.
    """
    n = len(features)
    if count >= n:
        return features, torch.arange(n, device=features.device)
    low, high = torch.quantile(attention.double(), attention.new_tensor([0.25, 0.75]).double())
    order = attention.argsort(descending=True, stable=True)
    outliers = order[: min(count, int((attention > high + 1.5 * (high - low)).sum()))]
    rest = order[len(outliers) :].sort().values
    index = torch.cat((outliers, rest[_even(len(rest), count - len(outliers)).to(rest.device)])).sort().values
    unit = normalize(keys.double(), dim=-1)
    near = unit[index] @ unit.T
    near[torch.arange(count, device=near.device), index] = float("-inf")
    chosen = near.topk(min(NEAREST, n - 1), dim=-1).indices
    weighed = features.double() * attention.double()[:, None]
    return (features[index].double() + weighed[chosen].sum(1)).to(features.dtype), index


REDUCERS: dict[str, Reducer] = {"visionzip": visionzip, "prumerge-plus": prumerge_plus}
PAPERS = {"visionzip": "arXiv 2412.04467", "prumerge-plus": "arXiv 2403.15388"}


def _even(n: int, count: int) -> Tensor:
    """``count`` indices below ``n``, spread evenly: (count,) int64."""
    return torch.arange(count) * n // max(1, count)
