"""Lengths in float32 are those of a copy in float32, of which there is none."""

from __future__ import annotations

import pytest
import torch
from allocations import peak

from keepkv.observe.lengths import lengths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [0, 1, 5, 3000])
def test_lengths_are_those_of_a_copy(slots: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 2 * slots, 64).to(dtype)[:, :, :slots]
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(lengths(x), torch.linalg.vector_norm(x.to(wide), dim=-1))
    assert lengths(x).dtype == wide


def test_no_copy_of_all_is_made() -> None:
    x = torch.randn(1, 4, 8192, 64).bfloat16()
    assert peak(lambda: lengths(x)) < x.numel()  # a quarter of it in float32
