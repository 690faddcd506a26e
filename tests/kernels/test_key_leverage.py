"""The kernel of keepkv2's score against its reference in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_slots import DEVICE, both, every_dtype, needs_triton, normal, rectangle
from torch.testing import assert_close

from keepkv import kernels
from keepkv.core.rope import Rope
from keepkv.errors import UnsupportedInput


def rope(dims: int, scaling: float = 1.0, interleaved: bool = False) -> Rope:
    return Rope(1e4 ** (-torch.arange(dims // 2, device=DEVICE) / (dims / 2)), scaling, interleaved)


# leverage

ROPES = [None, rope(16), rope(16, 1.3, True), rope(8)]


@needs_triton
@every_dtype
@pytest.mark.parametrize("b, h, s, d", [(2, 2, 90, 16), (1, 1, 300, 80), (1, 2, 70, 160)])
def test_key_leverage(dtype: torch.dtype, b: int, h: int, s: int, d: int) -> None:
    slots = rectangle(b, h, 1, s, d, d, dtype)
    away = slots["keys"] + 3 * normal(b, h, 1, d).to(dtype)  # a mean that is large beside the spread
    given = {"keys": away, "positions": slots["positions"], "log_votes": slots["log_votes"].clamp(max=3.0)}
    for turned in ROPES if dtype == torch.float32 and d == 16 else ROPES[2:3]:
        got, expected = both(kernels.key_leverage, given, ridge=0.5, rope=turned)
        assert_close(got.double(), expected, rtol=2e-3, atol=1e-4)
        assert (got[slots["positions"] < 0] == 0).all()
    got, expected = both(kernels.key_leverage, given, ridge=0.5, rope=ROPES[1], sample=40)
    assert_close(got.double(), expected, rtol=2e-3, atol=1e-4)
    got, expected = both(kernels.key_leverage, given | {"log_votes": None}, ridge=1.0, rope=None)
    assert_close(got.double(), expected, rtol=2e-3, atol=1e-4)


@needs_triton
def test_key_leverage_where_nothing_is_said() -> None:
    positions = torch.arange(20, device=DEVICE).expand(1, 1, 20)
    for keys in (torch.zeros(1, 1, 20, 16), torch.ones(1, 1, 20, 16), 1e17 * normal(1, 1, 20, 16)):
        for backend in ("triton", "reference"):
            got = kernels.key_leverage(keys.to(DEVICE), positions, ridge=1.0, backend=backend)
            assert torch.isfinite(got).all()
    empty = kernels.key_leverage(normal(1, 1, 20, 16), positions * 0 - 1, ridge=1.0, backend="triton")
    assert (empty == 0).all()
    assert kernels.key_leverage(normal(1, 2, 0, 16), positions[:, :, :0].expand(1, 2, 0), ridge=1.0).shape == (1, 2, 0)


@needs_triton
def test_angles_far_into_a_text() -> None:
    """A text of a hundred thousand tokens: angles in float32 are as coarse as the model's own."""
    positions = torch.arange(99_900, 100_000, device=DEVICE).expand(1, 1, 100)
    given = {"keys": normal(1, 1, 100, 32), "positions": positions}
    got = kernels.key_leverage(**given, ridge=1.0, rope=rope(32), backend="triton")
    expected = kernels.key_leverage(**given, ridge=1.0, rope=rope(32), backend="reference")
    assert_close(got, expected, rtol=2e-2, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="positions"):
        kernels.key_leverage(normal(1, 2, 4, 8), torch.zeros(1, 2, 3, dtype=torch.long, device=DEVICE), ridge=1.0)
    with pytest.raises(UnsupportedInput, match="sample"):
        kernels.key_leverage(normal(1, 1, 4, 8), torch.arange(4, device=DEVICE).view(1, 1, 4), ridge=1.0, sample=0)
