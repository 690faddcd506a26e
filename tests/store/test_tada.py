"""The codec TaDA against its formula in float64, and its two identities of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keepkv.core.layer_info import LayerInfo
from keepkv.core.rope import Rope
from keepkv.errors import CalibrationError, KeepKVError
from keepkv.kernels.codes import BITS, unpack
from keepkv.store import CODECS
from keepkv.store.codec.tada import Tada, break_even, mean_bits

B, H, G, S, T, D, DV = 2, 4, 2, 9, 3, 16, 8


def drawn(*shape: int, seed: int = 0, **like: Any) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **like)


KEYS, VALUES = drawn(B, H, S, D) + 2 * drawn(B, 1, S, D, seed=1), drawn(B, H, S, DV, seed=2)
CHOICES = [
    {"centre": c, "mean": m, "bits": b} for b in BITS for c, m in ((True, "16bit"), (True, "8bit"), (False, "16bit"))
]
per_choice = pytest.mark.parametrize("choice", CHOICES, ids=lambda x: "-".join(map(str, x.values())))


@per_choice
def test_decoding_is_the_formula(choice: dict[str, Any]) -> None:
    """x̂ = mean − (scale·code + zero), by loops in float64; deviations are of the mean as it is held."""
    codec = CODECS.build("tada", **choice)
    fields = codec.encode(KEYS, VALUES)
    for name, x, read in zip(("keys", "values"), (KEYS, VALUES), codec.decode(fields), strict=True):
        width, bits = x.shape[-1], choice["bits"]
        code = unpack(fields[name], bits, width).double()
        scale, zero = fields[f"{name}_scale"].double(), fields[f"{name}_zero"].double()
        if choice["centre"]:
            mean = fields[f"{name}_mean"].double()
            if choice["mean"] == "8bit":
                mean = mean * fields[f"{name}_mean_scale"].double() + fields[f"{name}_mean_zero"].double()
            assert mean.shape == (B, 1, S, width) and (mean[:, 0] - x.double().mean(1)).abs().max() < 0.04
        else:
            assert f"{name}_mean" not in fields
        for b, h, s in torch.cartesian_prod(*map(torch.arange, x.shape[:3])).tolist():
            part = scale[b, h, s] * code[b, h, s] + zero[b, h, s]
            true = mean[b, 0, s] - x[b, h, s].double() if choice["centre"] else x[b, h, s].double()
            low, high = true.min(), true.max()
            assert scale[b, h, s, 0] == pytest.approx((high - low).item() / (2**bits - 1), rel=3e-3)
            # Half a step, and what is lost where the zero is held in float16.
            assert ((part - true).abs() <= scale[b, h, s] / 2 + low.abs() * 2**-11 + 1e-6).all()
            back = mean[b, 0, s] - part if choice["centre"] else part
            assert torch.allclose(read[b, h, s].double(), back, atol=1e-6)


@per_choice
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, None)])
def test_attention_on_codes_is_attention_on_what_they_decode_to(
    choice: dict[str, Any], dtype: torch.dtype, close: float | None
) -> None:
    codec = CODECS.build("tada", **choice)
    fields = codec.encode(KEYS.to(dtype), VALUES.to(dtype))
    # What is written in bfloat16 is attended to in float32.
    wide = torch.promote_types(dtype, torch.float32)
    query, weights = drawn(B, H * G, T, D, seed=3).to(wide), drawn(B, H * G, T, S, seed=4).softmax(-1).to(wide)
    keys, values = (x.to(wide).repeat_interleave(G, 1) for x in codec.decode(fields))
    # Each logit is a sum of D products, of keys that are rounded once more where they are decoded to bfloat16.
    tolerance = close or 2**-8 * (query.abs() @ keys.abs().mT).max().item()
    assert (codec.logits(query, fields) - query @ keys.mT).abs().max() <= tolerance * max(1, D**0.5)
    assert (codec.mix(weights, fields) - weights @ values).abs().max() <= (close or 2**-8 * values.abs().max())


def test_the_mean_commutes_with_rope() -> None:
    """Centring after the rotation is the rotation of what is centred before it."""
    rope = Rope(1 / 1e4 ** (torch.arange(0, D, 2) / D))
    positions = torch.arange(S).expand(B, H, S)
    turned = rope.rotate(KEYS, positions)
    mean = rope.rotate(KEYS.mean(1, keepdim=True), positions[:, :1])
    assert torch.allclose(turned.mean(1, keepdim=True), mean, atol=1e-5)
    away = rope.rotate(KEYS.mean(1, keepdim=True) - KEYS, positions)
    assert torch.allclose(mean - turned, away, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_alike_in_all_heads_costs_no_error(bits: int) -> None:
    """Equal heads, constants, and a single head: deviations are those of rounding the mean, and never NaN."""
    codec = CODECS.build("tada", bits=bits, centre=True)
    for x in (KEYS[:, :1].bfloat16().float().expand(B, H, S, D), torch.full((B, H, S, D), 3.5), KEYS[:, :1].bfloat16()):
        keys, values = codec.decode(codec.encode(x, x))
        assert torch.allclose(keys.float(), x.float(), atol=1e-6) and torch.equal(keys, values)


def test_eight_bits_are_close() -> None:
    keys, _ = (codec := CODECS.build("tada", bits=8, centre=True)).decode(codec.encode(KEYS, VALUES))
    assert (keys - KEYS).norm() / KEYS.norm() < 0.005


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_comes_back_in_its_dtype(dtype: torch.dtype) -> None:
    codec = CODECS.build("tada", centre=True)
    keys, values = codec.decode(codec.encode(KEYS.to(dtype), VALUES.to(dtype)))
    assert keys.dtype == values.dtype == dtype and keys.shape == KEYS.shape and values.shape == VALUES.shape


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_the_formula(bits: int) -> None:
    """A token of Llama 3.1 8B: means 512, codes, scales 64 (section 4 of the specification)."""
    x = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16)
    held = sum(t.nbytes for t in CODECS.build("tada", bits=bits, centre=True).encode(x, x).values())
    assert held == 512 + 2 * 8 * 128 * bits // 8 + 64 == {2: 1088, 4: 1600, 8: 2624}[bits]
    assert sum(t.nbytes for t in CODECS.build("tada", bits=bits, centre=False).encode(x, x).values()) == held - 512
    eight = CODECS.build("tada", bits=bits, centre=True, mean="8bit").encode(x, x)
    assert sum(t.nbytes for t in eight.values()) == held - 256 + 8


def test_break_even_is_the_table() -> None:
    for heads, sixteen, eight in ((32, 0.48, 0.27), (8, 0.93, 0.71), (4, 0.995, 0.92)):
        assert break_even(heads, 16) == pytest.approx(sixteen, abs=5e-3)
        assert break_even(heads, 8) == pytest.approx(eight, abs=5e-3)
    assert break_even(1, 16) == float("inf") and mean_bits("8bit", 32) == 9


def known(rho: tuple[float, float] = (0.95, 0.1), most: tuple[float, float] | None = None) -> dict[str, Any]:
    """A calibration of 2 bits."""
    return {
        "tada_rho": torch.tensor(rho),
        "tada_most": torch.tensor(most or rho),
        "tada_shape": torch.tensor([8, 128, 128]),
        "tada_bits": torch.tensor(2, dtype=torch.uint8),
    }


def test_centres_what_pays_with_the_bits_of_the_layer() -> None:
    codec = CODECS.build("tada", bits="calibrated", value_bits=8)
    assert codec.needs_calibration == "tada"
    own = codec.for_layer(LayerInfo(), known())
    assert (own.bits, own.value_bits, own.centred("keys"), own.centred("values")) == (2, 8, True, False)
    assert own.needs_calibration is None and own.for_layer(LayerInfo(), None) is own
    fields = own.encode(KEYS, VALUES)
    assert "keys_mean" in fields and "values_mean" not in fields and fields["keys"].shape[-1] == D // 4
    assert CODECS.build("tada", mean="8bit").for_layer(LayerInfo(), known((0.0, 0.75))).centred("values")
    assert CODECS.build("tada", bits="calibrated", centre=True).for_layer(LayerInfo(), known()).centred("values")


@pytest.mark.filterwarnings("error")
def test_says_once_that_nothing_pays() -> None:
    codec = CODECS.build("tada")
    with pytest.warns(UserWarning, match=r"centres nothing.*8 heads correlate by at most 0\.12 .*from 0\.93 on"):
        own = codec.for_layer(LayerInfo(), known((0.12, 0.03)))
    assert not own.centred("keys") and not own.centred("values") and own.packed(own.encode(KEYS, VALUES)) is not None
    codec.for_layer(LayerInfo(index=1, rank=1, ranks=2), known((0.12, 0.03)))
    codec.for_layer(LayerInfo(), known((0.12, 0.03), most=(0.99, 0.03)))  # it pays in another layer
    CODECS.build("tada", bits="calibrated", centre=True).for_layer(LayerInfo(), known((0.12, 0.03)))


def test_without_a_mean_codes_are_what_packed_attention_reads() -> None:
    codec = CODECS.build("tada", centre=False, bits=8)
    packed = codec.packed(codec.encode(KEYS, VALUES))
    assert packed is not None
    for one, x in zip(packed, codec.decode(codec.encode(KEYS, VALUES)), strict=True):
        assert torch.equal(one.expand(torch.float32), x)
    assert CODECS.build("tada", key_centre=False, centre=True).packed(codec.encode(KEYS, VALUES)) is None


WRONG: dict[str, dict[str, Any]] = {
    "bits=3": {"bits": 3},
    "'calibrated'": {"bits": "searched"},
    "bits=True": {"bits": True},
    "key_bits=16": {"key_bits": 16},
    "'8bit'": {"mean": 8},
    "'auto'": {"centre": "keys"},
    "options": {"group": 4},
}


@pytest.mark.parametrize(("words", "wrong"), WRONG.items())
def test_what_is_wrong_is_refused(words: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(KeepKVError, match=words):
        CODECS.build("tada", **wrong)


def test_refuses_what_it_cannot_write() -> None:
    with pytest.raises(CalibrationError, match="need a calibration 'tada'"):
        Tada().for_layer(LayerInfo(3), None)
    with pytest.raises(KeepKVError, match="a calibration 'tada' says"):
        Tada("calibrated", centre=True).encode(KEYS, VALUES)
    with pytest.raises(KeepKVError, match="7 numbers"):
        Tada(4, centre=True).encode(KEYS[..., :7], VALUES)
