"""Nearest keys: the kernel against its reference in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_slots import DEVICE, every_dtype, masks, needs_triton, normal
from torch.testing import assert_close

from keepkv import kernels
from keepkv.kernels.tolerance import EXACT


@needs_triton
@every_dtype
@pytest.mark.parametrize("b, h, s, d", [(2, 2, 300, 32), (1, 2, 60, 80)])
def test_nearest_key(dtype: torch.dtype, b: int, h: int, s: int, d: int) -> None:
    keys, (leaving, targets) = normal(b, h, s, d, dtype=dtype), masks(b, h, s)
    into, cosine = kernels.nearest_key(keys, leaving, targets, backend="triton")
    expected_into, expected = kernels.nearest_key(keys.double(), leaving, targets, backend="reference")
    assert_close(cosine.double(), expected, **EXACT)
    found = expected_into >= 0
    assert torch.equal(into >= 0, found) and targets.gather(-1, into.clamp(min=0))[found].all()
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    chosen = (unit * unit.gather(2, into.clamp(min=0)[..., None].expand_as(unit))).sum(-1)
    assert_close(chosen[found], expected[found], **EXACT)  # another target only where the two are as near
    assert (into == expected_into).double().mean() > 0.99


@needs_triton
def test_of_equal_cosines_the_oldest_wins() -> None:
    keys, targets = normal(1, 1, 200, 32), torch.ones(1, 1, 200, dtype=torch.bool, device=DEVICE)
    keys[:, :, [30, 40, 190]] = keys[:, :, [7]]
    leaving = torch.zeros_like(targets)
    leaving[..., [10, 11]], targets[..., [7, 10, 11]] = True, False
    keys[:, :, 10] = keys[:, :, 7] * 2  # the same direction as three targets, in three tiles
    keys[:, :, 11] = 0  # no direction at all
    into, cosine = kernels.nearest_key(keys, leaving, targets, backend="triton")
    assert into[0, 0, 10] == 30 and into[0, 0, 11] == 0
    assert cosine[0, 0, 11] == 0 and (into[~leaving] == -1).all()
