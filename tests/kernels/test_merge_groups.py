"""Merged groups: the kernel against its reference, and against the forms that reductions use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_slots import DEVICE, INF, both, every_dtype, needs_triton, normal
from torch.testing import assert_close

from keepkv import kernels
from keepkv.kernels.tolerance import EXACT
from keepkv.reduce.forms import groups


@needs_triton
@every_dtype
@pytest.mark.parametrize("d, dv", [(32, 32), (80, 24)])
def test_merge_groups(dtype: torch.dtype, d: int, dv: int) -> None:
    b, h, s, size = 2, 2, 90, 6
    u, group = 5 * normal(b, h, s), torch.randint(0, size + 1, (b, h, s), device=DEVICE)
    group[0, 0], group[0, 1], group[1, 0, :9] = 2, size, 3  # all in one; none in any
    u[1, 1, ::3], u[1, 1][group[1, 1] == 4] = -INF, -INF  # members without mass, and a group without any
    keys, values = normal(b, h, s, d, dtype=dtype), normal(b, h, s, dv, dtype=dtype)
    given = {"u": u, "keys": keys, "values": values, "group": group, "size": size}
    got, expected = both(kernels.merge_groups, given)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), theirs, **EXACT)  # no half precision on the way, whatever came in
    form = groups(u.double(), torch.zeros_like(u), group, size)
    assert_close(got.log_mass.double(), form.log_mass, **EXACT)
    assert_close(got.values.double(), form.mean(values.double()), **EXACT)
    only = kernels.merge_groups(**(given | {"keys": None}), backend="triton")
    assert only.keys is None and torch.equal(only.values, got.values)


@needs_triton
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50), st.integers(0, 9), st.integers(0, 5))
def test_merge_groups_of_any_size(s: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    group = torch.randint(0, size + 1, (1, 2, s), device=DEVICE)
    given = {"u": normal(1, 2, s), "keys": normal(1, 2, s, 16), "values": normal(1, 2, s, 16), "group": group}
    got, expected = both(kernels.merge_groups, given, size=size)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours.double(), theirs, **EXACT)
