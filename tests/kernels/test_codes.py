"""Codes in bytes: every width and bit width comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepkv.kernels.codes import BITS, Codes, pack, unpack


@given(bits=st.sampled_from(BITS), width=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_unpack_undoes_pack(bits: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 2, width), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, -(-width * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, width), codes)


def test_the_first_code_lies_lowest() -> None:
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [1 + (2 << 2) + (3 << 4)]
    assert pack(torch.tensor([5, 12, 9], dtype=torch.uint8), 4).tolist() == [5 + (12 << 4), 9]


def test_signed_codes_stand_for_themselves() -> None:
    code = torch.arange(-128, 128).view(4, 64).to(torch.int8)
    scale, zero = torch.rand(4, 1), torch.randn(4, 1)
    found = Codes(code, scale, zero, 8, 64).expand(torch.float64)
    assert torch.equal(found, code.double() * scale.double() + zero.double())


@pytest.mark.parametrize("bits", BITS)
def test_expansion_is_the_formula(bits: int) -> None:
    """Groups, levels, zeros and a turn, against a loop in float64."""
    width, groups = 8, 2
    code = torch.randint(0, 2**bits, (5, width), dtype=torch.uint8)
    scale, zero, levels = torch.rand(5, groups), torch.randn(5, groups), torch.randn(2**bits)
    turn = torch.linalg.qr(torch.randn(width, width)).Q
    found = Codes(pack(code, bits), scale, zero, bits, width, levels, turn).expand(torch.float64)
    for row in range(5):
        x = torch.zeros(width, dtype=torch.float64)
        for i in range(width):
            group = i // (width // groups)
            x[i] = scale[row, group].double() * levels[int(code[row, i])].double() + zero[row, group].double()
        assert torch.allclose(found[row], x @ turn.double(), atol=1e-12)
