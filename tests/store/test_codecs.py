"""Codecs: what is written is what the formula says, takes the bytes it says, and is written once."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import keepkv
from keepkv.core.layer_info import LayerInfo
from keepkv.core.rope import Rope
from keepkv.core.slots import Slots
from keepkv.kernels.codes import Codes
from keepkv.store import CODECS, STORES, Held
from keepkv.store.codec.hadamard import hadamard
from keepkv.store.codec.lloyd_max import levels
from keepkv.store.codec.per_token import quantise
from keepkv.store.zones import Zones

B, H, S, D = 2, 2, 96, 16
ROPE = Rope(1.0 / 10_000 ** (torch.arange(0, D, 2) / D))
# Those that write each head by itself.
LOSSY = sorted(x for x in CODECS if x != "none" and not CODECS.factory(x).together)  # type: ignore[attr-defined]
per_codec = pytest.mark.parametrize("codec", LOSSY)
per_bits = pytest.mark.parametrize("codec", [x for x in LOSSY if x != "think"])  # which drops channels
per_layout = pytest.mark.parametrize("layout", ["dense", "ragged"])


def slots(length: int = S, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Slots:
    keys, values = (torch.randn(B, H, length, D, dtype=dtype) * scale for _ in range(2))
    positions = torch.arange(length, dtype=torch.int32).expand(B, H, -1).clone()
    return Slots(keys, values, torch.zeros(B, H, length), positions)


def store(layout: str, codec: str, **options: Any) -> Zones:
    held = Held(codec=CODECS.build(codec, **options), layer=LayerInfo(rope=ROPE))
    made = STORES.build(layout, held)
    assert isinstance(made, Zones)
    return made


def read(layout: str, codec: str, given: Slots, **options: Any) -> Slots:
    made = store(layout, codec, **options)
    made.load(given)
    return made.view()


# --- formulas ------------------------------------------------------------------------------------------------------


@given(bits=st.sampled_from([2, 4, 8]), groups=st.sampled_from([1, 2, 4]), power=st.integers(-3, 3))
@settings(max_examples=40, deadline=None)
def test_uniform_codes_are_within_half_a_step(bits: int, groups: int, power: int) -> None:
    x = torch.randn(7, D, dtype=torch.float64) * 10.0**power
    codes, scale, zero = quantise(x, bits, groups)
    found = Codes(codes, scale, zero, bits, D).expand(torch.float64)
    for row in range(7):
        for group in range(groups):
            part = slice(group * D // groups, (group + 1) * D // groups)
            step = (x[row, part].max() - x[row, part].min()) / (2**bits - 1)
            rounding = 2.0**-11 * (zero[row, group].abs() + scale[row, group] * 2**bits) + 2.0**-24 * 2**bits
            assert float((x[row, part] - found[row, part]).abs().max()) <= step / 2 + rounding * 2


@per_bits
def test_constant_vectors_come_back(codec: str) -> None:
    given = slots()
    given.keys[:] = 0.5
    given.values[:] = -0.25
    got = read("dense", codec, given)
    close = 1e-3 if codec not in ("lloyd-max", "hadamard", "kvquant") else 0.2  # rotated, they are no constant
    assert torch.allclose(got.values, given.values, atol=close) and torch.allclose(got.keys, given.keys, atol=close * 2)


@per_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_comes_back_and_more_bits_lose_less(codec: str, dtype: torch.dtype) -> None:
    given = slots(dtype=dtype)
    got = read("dense", codec, given)
    assert got.keys.dtype == got.values.dtype == dtype
    if codec in ("int8", "fp8"):
        return
    errors = [_error(read("dense", codec, given, bits=bits), given) for bits in (2, 4)]
    assert errors[1] < 0.5 * errors[0] < 0.3
    mixed = read("dense", codec, given, key_bits=4, value_bits=2)
    assert torch.equal(mixed.keys, read("dense", codec, given, bits=4).keys) or codec == "lloyd-max"
    assert torch.equal(mixed.values, read("dense", codec, given, bits=2).values)


def _error(got: Slots, given: Slots) -> float:
    return float((got.keys - given.keys).float().norm() / given.keys.float().norm())


def test_the_rotation_is_orthogonal_whatever_the_width() -> None:
    for width in (8, 24, 64, 80, 96, 128):
        turn = hadamard(width, torch.device("cpu"))
        assert torch.allclose(turn @ turn.T, torch.eye(width), atol=1e-5)


def test_lloyd_max_levels_are_those_of_the_tables() -> None:
    """Max 1960, table I: a normal number at 4 levels, error .1175; at 16 levels, error .00950."""
    assert levels(2)[2:] == pytest.approx((0.4528, 1.510), abs=1e-3)
    x = torch.randn(200_000, dtype=torch.float64)
    for bits, error in ((2, 0.1175), (4, 0.00950)):
        at = torch.tensor(levels(bits), dtype=torch.float64)
        assert float((x[:, None] - at).square().amin(1).mean()) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("codec", ["kivi", "kvquant"])
def test_keys_by_channel_against_a_loop(codec: str) -> None:
    """A scale and a zero for each channel of 32 tokens, in float64, before the rotary embedding for kvquant."""
    given, bits = slots(70), 2
    got = read("dense", codec, given, bits=bits)
    unrotated = ROPE.unrotate(given.keys, given.positions) if codec == "kvquant" else given.keys
    expected = torch.empty_like(unrotated)
    for b in range(B):
        for h in range(H):
            for start in range(0, 70, 32):
                for c in range(D):
                    expected[b, h, start : start + 32, c] = _looped(unrotated[b, h, start : start + 32, c], bits)
    back = ROPE.rotate(expected, given.positions) if codec == "kvquant" else expected
    assert torch.allclose(got.keys, back, atol=2e-3)


def _looped(x: Tensor, bits: int) -> Tensor:
    zero = x.min().half().double()
    scale = ((x.max().double() - zero) / (2**bits - 1)).half().double()
    return (((x.double() - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero).float()


def test_keys_with_a_large_channel_are_what_channels_are_for() -> None:
    """One channel a hundred times as large, as keys have: by channel nothing else is lost, nor with the mean out."""
    given = slots()
    given.keys[..., 3] = given.keys[..., 3] * 3 + 100
    rest = [x for x in range(D) if x != 3]
    lost = {}
    for name, codec, centre in (
        ("plain", "int4", False), ("int4", "int4", None), ("hadamard", "hadamard", None), ("kivi", "kivi", None),
        ("lloyd-max", "lloyd-max", True),
    ):  # fmt: skip
        options = {"bits": 4, **({} if centre is None else {"centre": centre})}
        made = Held(codec=CODECS.build(codec, **options))  # without a rotary embedding: the mean stands still
        one = STORES.build("dense", made)
        one.load(given)
        lost[name] = float((one.view().keys - given.keys)[..., rest].abs().mean())
    assert all(lost[name] < 0.3 * lost["plain"] for name in ("int4", "hadamard", "kivi", "lloyd-max")), lost


def test_a_mean_is_taken_out_before_the_rotary_embedding() -> None:
    """Keys that are one vector, turned by their positions: centred, they come back almost whole at 2 bits."""
    given = slots()
    given.keys[:] = ROPE.rotate(torch.randn(D) * 5 + 0.05 * given.keys, given.positions)
    centred, plain = (_error(read("dense", "lloyd-max", given, bits=2, centre=x), given) for x in (True, False))
    assert centred < 0.02 < 0.2 < plain


# --- bytes ---------------------------------------------------------------------------------------------------------

FORMULAS = {  # bits of a slot of one head: key, value, and what is beside them
    "int8": lambda d: (8 * d, 8 * d, 2 * 32), "fp8": lambda d: (8 * d, 8 * d, 2 * 16),
    "int4": lambda d: (4 * d, 4 * d, 4 * 16), "int2": lambda d: (2 * d, 2 * d, 4 * 16),
    "hadamard": lambda d: (4 * d, 4 * d, 4 * 16), "lloyd-max": lambda d: (4 * d, 4 * d, 2 * 16),
    "oscar": lambda d: (2 * d, 2 * d, 4 * 16), "think": lambda d: (32 * (d - d * 4 // 10), 32 * d, 0),
    "kivi": lambda d: (2 * d, 2 * d + 2 * 16, 32), "kvquant": lambda d: (2 * d, 2 * d + 2 * 16, 32),
}  # fmt: skip


@per_layout
@per_codec
def test_bytes_are_those_of_the_formula(layout: str, codec: str) -> None:
    made, given = store(layout, codec), slots(1024)
    made.load(given)
    content, beside, plain = made.slot_bytes()
    assert content == pytest.approx(H * sum(FORMULAS[codec](D)) / 8, rel=0.01)
    held = B * 1024 * (content + beside - H * (4 + 4 * (codec != "none")))  # no votes were allocated
    tokens, of_group = made.groups
    rest = B * made.row_bytes + 64 + (B * of_group * 1024 // tokens if tokens else 0)
    assert of_group == (H * 2 * 2 * D if codec in ("kivi", "kvquant") else 0)  # scale and zero, float16
    positions = B * H * 1024 * 4
    assert B * 1024 * content + positions <= made.nbytes + 1 <= (B * 1024 * content + positions) * 1.01 + rest
    assert held < B * 1024 * plain


# --- codes are written once ----------------------------------------------------------------------------------------


@per_layout
@per_codec
def test_codes_move_and_are_not_written_again(layout: str, codec: str) -> None:
    """Ten compressions, tokens in between: what is left is bit for bit what was read after it was first written."""
    made = store(layout, codec)
    made.load(slots(200))
    first = made.view()
    for round_ in range(10):
        view = made.view()
        keep = torch.rand(B, H, view.shape[2], generator=torch.Generator().manual_seed(round_)) < 0.85
        made = made.successor()
        made.load_kept(view, keep & view.valid)
        got = made.view()
        for b in range(B):
            for h in range(H):
                valid = got.valid[b, h]
                at = got.positions[b, h][valid].long()
                old = at < 200
                assert torch.equal(got.keys[b, h][valid][old], first.keys[b, h][at[old]])
                assert torch.equal(got.values[b, h][valid][old], first.values[b, h][at[old]])
        for step in range(40):
            made.begin_decode()
            new = torch.randn(B, H, 1, D)
            made.append(new, new, torch.full((B, 1), 200 + 40 * round_ + step))


@per_layout
@per_codec
def test_only_what_merged_is_written_again(layout: str, codec: str) -> None:
    made = store(layout, codec)
    made.load(slots())
    view = made.view()
    changed = view.with_(values=view.values.clone())
    changed.values[:, :, 5] += 0.5
    after = made.successor()
    after.load(changed)
    got, same = after.view(), [x for x in range(S) if x != 5]
    assert torch.equal(got.keys[:, :, same], view.keys[:, :, same])
    assert torch.equal(got.values[:, :, same], view.values[:, :, same])
    assert float((got.values[:, :, 5] - changed.values[:, :, 5]).abs().max()) < 1.5


@pytest.mark.parametrize("codec", ["kivi", "kvquant"])
def test_groups_that_nobody_needs_are_forgotten(codec: str) -> None:
    made = store("ragged", codec)
    made.load(slots(320))
    assert made.content.shared["scale"].shape[2] == 10
    view, after = made.view(), made.successor()
    keep = (view.positions >= 64) & (view.positions < 128)
    keep[0, 0] = view.positions[0, 0] >= 300
    after.load_kept(view, keep)
    assert after.content.shared["scale"].shape[2] == 2
    got = after.view()
    assert torch.equal(got.keys[1, 1][got.valid[1, 1]], view.keys[1, 1, 64:128])
    assert torch.equal(got.keys[0, 0][got.valid[0, 0]], view.keys[0, 0, 300:])


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "options", "message"),
    [
        ("int4", {"bits": 3}, "expected one of 2, 4, 8"),
        ("int4", {"group": 0}, "how many numbers share a scale"),
        ("int4", {"group": 5}, "a power of two"),
        ("kivi", {"key_bits": 16}, "expected one of 2, 4, 8"),
        ("lloyd-max", {"bits": 8}, "for 2 or 4 bits"),
        ("hadamard", {"size": 3}, "size"),
    ],
)
def test_impossible_options_are_refused(codec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(keepkv.KeepKVError, match=message):
        CODECS.build(codec, **options)


def test_widths_that_make_no_whole_bytes_are_refused() -> None:
    made = STORES.build("dense", Held(codec=CODECS.build("int4", group=16)))
    given = slots()
    with pytest.raises(keepkv.KeepKVError, match=r"24 numbers do not make .* whole groups of 16"):
        made.load(given.with_(keys=torch.randn(B, H, S, 24)))


def test_levels_are_symmetric_and_in_order() -> None:
    for bits in (2, 4):
        at = levels(bits)
        assert all(a < b for a, b in pairwise(at))
        assert all(math.isclose(a, -b, abs_tol=1e-9) for a, b in zip(at, reversed(at), strict=True))
