"""The solvers that reductions fit with meet the conditions of their problems."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv.reduce.fit import ridge
from keepkv.reduce.matching import nonnegative

torch.set_num_threads(1)
F64 = torch.float64
FEW = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("shape", [(20, 6), (5, 6)])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_bounded_least_squares_meets_its_conditions(shape: tuple[int, int], seed: int) -> None:
    """Karush, Kuhn, Tucker: gradient 0 inside the bounds, pointing outwards on them; the objective never rises."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.rand(2, 3, *shape, generator=rng, dtype=F64) ** 3
    target = torch.rand(2, 3, shape[0], generator=rng, dtype=F64) * 4
    tried = [nonnegative(a, target, 0.2, 2.0, n) for n in range(8)]
    errors = [((a @ w[..., None])[..., 0] - target).square().sum(-1) for w in tried]
    assert all((y <= x + 1e-12).all() for x, y in pairwise(errors))
    w = nonnegative(a, target, 0.2, 2.0, 20_000)
    gradient = (a.mT @ ((a @ w[..., None])[..., 0] - target)[..., None])[..., 0]
    low, high = w <= 0.2 + 1e-9, w >= 2.0 - 1e-9
    assert (gradient[~low & ~high].abs() <= 1e-5).all()
    assert (gradient[low] >= -1e-5).all() and (gradient[high] <= 1e-5).all()


def test_bounded_least_squares_where_there_is_nothing_to_fit() -> None:
    a = torch.zeros(1, 4, 3)
    a[..., 1] = torch.tensor([1.0, 0.5, 0.0, 1e-42])
    w = nonnegative(a, 2 * a[..., 1], 0.05, 20.0, 50)
    torch.testing.assert_close(w, torch.tensor([[1.0, 2.0, 1.0]]))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_ridge_equals_its_normal_equations(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(3)
    a = torch.randn(2, 3, *shape, generator=rng, dtype=F64)
    missing = torch.randn(2, 3, shape[0], 5, generator=rng, dtype=F64)
    for penalty in (0.3, torch.rand(2, 3, dtype=F64, generator=rng) + 0.1):
        got = ridge(a, missing, penalty)
        for i, j in [(0, 0), (1, 2)]:
            p = penalty if isinstance(penalty, float) else penalty[i, j]
            normal = a[i, j].T @ a[i, j] + p * torch.eye(shape[1], dtype=F64)
            torch.testing.assert_close(got[i, j], normal.inverse() @ a[i, j].T @ missing[i, j], rtol=0, atol=1e-10)
