"""Attention of one token over codes: the reference against attention over expanded slots in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from allocations import peak
from codes_at_random import codes_at_random, expanded, packed_ragged, packed_rectangle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_slots import DEVICE, INF, compare, every_dtype, needs_triton, normal, segments
from running import batch, generate
from torch.testing import assert_close

import keepkv
from keepkv import kernels
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.kernels.codes import BITS, Codes
from keepkv.kernels.packed import reference
from keepkv.kernels.tolerance import ATOL, RTOL

PLAIN = {"bits": 4, "width": 16}
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
KINDS = [
    {"groups": 1, "zero": True},
    {"groups": 4, "zero": True},
    {"groups": 2, "zero": False},
    {"groups": 1, "zero": False, "levels": True},
    {"groups": 2, "zero": True, "levels": True, "turn": True},
]
SIGNED = {"bits": 8, "signed": True}
KERNEL_KINDS = [
    {"zero": True},
    {"zero": False},
    {"group": 16, "zero": True},
    {"zero": False, "levels": True},
    {"group": 16, "zero": True, "levels": True, "turn": True},
]


def naive(slots: dict[str, Any], **options: Any) -> kernels.Decoded:
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return kernels.decode_attention(**expanded(slots), **exact, backend="reference")


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test does not say; ``test_native`` is about C++."""
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")


@pytest.fixture(params=[None, 1500], ids=["one tile", "many tiles"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes a tile, so that small inputs make many."""
    if request.param:
        monkeypatch.setattr(reference, "TILE_BYTES", request.param)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_reference(bits: int, kind: dict[str, Any]) -> None:
    keys = {"bits": bits, "width": 16, **kind}
    values = {**keys, "bits": 4 if bits == 8 else 8, "width": 20}
    slots = packed_rectangle(2, 2, 2, 9, keys, values)
    for options in ({}, {"softcap": 5.0, "sinks": normal(4), "weights": True}):
        compare(kernels.decode_packed(**slots, scaling=0.25, **options), naive(slots, scaling=0.25, **options),
                torch.float32)  # fmt: skip


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("backend", BACKENDS)
@every_dtype
def test_signed_codes(dtype: torch.dtype, backend: str) -> None:
    """int8: numbers from −128 on. Keys without zeros, as codec "int8" has them; values in groups."""
    keys, values = {**SIGNED, "width": 64, "zero": False}, {**SIGNED, "width": 32, "groups": 2}
    slots = packed_rectangle(2, 2, 2, 40, keys, values, dtype)
    assert slots["keys"].expand(torch.float64).min() < 0 < slots["keys"].expand(torch.float64).max()
    options = {"scaling": 0.25, "softcap": 5.0, "sinks": normal(4)}
    got, expected = kernels.decode_packed(**slots, **options, backend=backend), naive(slots, **options)
    assert_close(got.lse.double(), expected.lse, rtol=RTOL[dtype], atol=ATOL[dtype])
    compare(got._replace(lse=expected.lse.float()), expected, dtype)


@every_dtype
def test_reference_computes_in_float32(dtype: torch.dtype) -> None:
    turned = {"bits": 2, "width": 16, "turn": True}
    slots = packed_rectangle(1, 2, 2, 30, turned, turned, dtype)
    compare(kernels.decode_packed(**slots, scaling=0.25, weights=True), naive(slots, scaling=0.25, weights=True), dtype)


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("lengths", [[[5, 0], [30, 17]], [[0, 0], [0, 1]], [[0]]], ids=str)
def test_ragged_slots(lengths: list[list[int]], gap: int) -> None:
    slots = packed_ragged(lengths, PLAIN, {**PLAIN, "groups": 2}, gap=gap)
    options = {"scaling": 0.25, "weights": True, "sinks": normal(slots["query"].shape[1])}
    got = kernels.decode_packed(**slots, **options)
    compare(got, naive(slots, **options), torch.float32)
    heads = slots["lengths"].repeat_interleave(2, 1) == 0
    assert (got.output[heads] == 0).all() and (got.lse[heads] == -INF).all()


@settings(max_examples=20, deadline=None)
@given(segments(3, 40), st.sampled_from([1, 3, 8]), st.sampled_from(BITS))
def test_any_ragged_shape(lengths: list[list[int]], g: int, bits: int) -> None:
    slots = packed_ragged(lengths, {**PLAIN, "bits": bits}, PLAIN, g=g)
    compare(kernels.decode_packed(**slots, scaling=0.25), naive(slots, scaling=0.25), torch.float32)


@pytest.mark.usefixtures("tiled")
def test_lengths_of_a_rectangle() -> None:
    slots = packed_rectangle(2, 2, 2, 20, PLAIN, PLAIN) | {"lengths": torch.tensor([[20, 3], [0, 11]], device=DEVICE)}
    compare(kernels.decode_packed(**slots, scaling=0.25, weights=True), naive(slots, scaling=0.25, weights=True),
            torch.float32)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_slots_do_not_matter(backend: str) -> None:
    slots = packed_rectangle(2, 1, 2, 40, PLAIN, {**PLAIN, "zero": False})
    expected = kernels.decode_packed(**slots, scaling=0.25, backend=backend).output
    empty = slots["positions"] < 0
    slots["log_votes"][empty] = float("nan")
    for name in ("keys", "values"):
        slots[name].scale[empty] = float("nan")
    assert torch.equal(kernels.decode_packed(**slots, scaling=0.25, backend=backend).output, expected)


def test_a_part_joins_one_of_floats_by_its_log_sum_exp() -> None:
    """As history in codes joins a recent window in 16 bits."""
    slots = packed_rectangle(1, 2, 2, 30, PLAIN, PLAIN)
    history = {name: x.each(lambda y: y[:, :, :20]) if isinstance(x, Codes) else x[:, :, :20] if name != "query" else x
               for name, x in slots.items()}  # fmt: skip
    whole = expanded(slots)
    recent = {name: x if name == "query" else x[:, :, 20:] for name, x in whole.items()}
    parts = [
        kernels.decode_packed(**history, scaling=0.25),
        kernels.decode_attention(**recent, scaling=0.25, backend="reference"),
    ]
    share = torch.stack([one.lse.double() for one in parts]).softmax(0)
    joined = sum(one.output.double() * x[..., None] for one, x in zip(parts, share, strict=True))
    assert_close(joined, naive(slots, scaling=0.25).output, rtol=2e-5, atol=2e-5)


# the kernel


def by_kernel(slots: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> kernels.Decoded:
    """What the kernel says, compared with float64. In half precision it rounds a turned query, levels, and the numbers
    of vectors of several groups, as expanded keys would be: log-sum-exps feel that."""
    got = kernels.decode_packed(**slots, scaling=0.25, **options, backend="triton")
    expected = naive(slots, scaling=0.25, **options)
    if dtype != torch.float32:
        assert_close(got.lse.double(), expected.lse, rtol=RTOL[dtype], atol=ATOL[dtype])
        got, expected = got._replace(lse=expected.lse.float()), expected._replace(weights=None)
    compare(got, expected, dtype)
    return got


@needs_triton
@pytest.mark.parametrize("kind", KERNEL_KINDS, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128])
def test_kernel(bits: int, width: int, kind: dict[str, Any]) -> None:
    groups = width // kind["group"] if "group" in kind else 1
    keys = {"bits": bits, "width": width, "groups": groups} | {n: x for n, x in kind.items() if n != "group"}
    slots = packed_rectangle(1, 2, 2, 40, keys, {**keys, "bits": {2: 4, 4: 8, 8: 2}[bits]})
    by_kernel(slots)


@needs_triton
@every_dtype
@pytest.mark.parametrize("kind", [{}, {"levels": True, "turn": True}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_kernel_in_every_dtype(dtype: torch.dtype, bits: int, kind: dict[str, Any]) -> None:
    keys = {"bits": bits, "width": 32, **kind}
    slots = packed_rectangle(2, 2, 3, 150, keys, keys, dtype)
    by_kernel(slots, dtype, softcap=5.0, sinks=normal(6), weights=True)


@needs_triton
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("lengths", [[[5, 0], [300, 17]], [[0, 0], [0, 1]], [[1], [129], [128]]], ids=str)
def test_kernel_over_ragged_slots(lengths: list[list[int]], gap: int) -> None:
    slots = packed_ragged(lengths, PLAIN, {"bits": 2, "width": 32, "groups": 2}, gap=gap)
    got = by_kernel(slots, weights=True, sinks=normal(slots["query"].shape[1]))
    heads = slots["lengths"].repeat_interleave(2, 1) == 0
    assert (got.output[heads] == 0).all() and (got.lse[heads] == -INF).all()


@needs_triton
@settings(max_examples=12, deadline=None)
@given(segments(2, 70), st.sampled_from([1, 3, 8]), st.sampled_from(BITS))
def test_kernel_over_any_ragged_shape(lengths: list[list[int]], g: int, bits: int) -> None:
    by_kernel(packed_ragged(lengths, {**PLAIN, "bits": bits}, PLAIN, g=g), weights=True)


@needs_triton
def test_float16_has_room_for_the_shares_of_tiny_values() -> None:
    """Values of 1e-4, of which those that matter have shares of 1e-4: products of both are below what float16 holds."""
    slots = packed_rectangle(1, 1, 1, 200, PLAIN, PLAIN, torch.float16)
    del slots["positions"]
    slots["query"] *= 0
    slots["log_votes"] = torch.where(torch.arange(200, device=DEVICE) == 0, 9.0, 0.0).expand(1, 1, 200)
    values = slots["values"]
    small = values._replace(scale=values.scale.float() * 1e-4, zero=values.zero.float() * 1e-4)
    small.scale[..., 0, :], small.zero[..., 0, :] = 0.0, 0.0
    got = kernels.decode_packed(**(slots | {"values": small}), scaling=1.0, backend="triton").output.double()
    expected = naive(slots | {"values": small}, scaling=1.0).output
    assert_close(got, expected, rtol=0.0, atol=float(expected.abs().max()) / 20)


@needs_triton
def test_strides_and_offsets_do_not_matter() -> None:
    slots = packed_rectangle(2, 2, 2, 40, PLAIN, PLAIN)
    expected = kernels.decode_packed(**slots, scaling=0.25, backend="triton").output
    changes: list[Any] = [
        lambda x: torch.cat((x, x), 2)[:, :, :40],  # a store's slack
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat((x, x[..., :1]), -1)[..., :-1],  # slots that do not begin at words
    ]
    for change in changes:
        other = slots | {name: slots[name].each(change) for name in ("keys", "values")}
        assert torch.equal(kernels.decode_packed(**other, scaling=0.25, backend="triton").output, expected)


@needs_triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the zoo's models are on the CPU")
@pytest.mark.parametrize("method, codec", [("keepkv2", "int4"), ("snapkv", "lloyd-max")])
def test_generation_by_the_kernel(method: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged heads with votes, and rectangles with levels and a turn, each joined to a window of floats."""
    model, inputs = zoo.model("llama"), batch((60, 47))

    def run() -> Any:
        return generate(model, inputs, keepkv.Cache(model, method, 40, sinks=2, window=4, codec=codec), new=2)

    plain = run()
    monkeypatch.setenv("KEEPKV_KERNELS", "triton")
    fused = run()
    assert torch.equal(plain.sequences, fused.sequences)
    assert_close(fused.scores_, plain.scores_, rtol=1e-4, atol=1e-4)
    assert not torch.equal(fused.scores_, plain.scores_)  # it was the kernel


@needs_triton
def test_what_the_kernel_does_not_read_is_said_and_served_by_the_reference() -> None:
    for width, groups, bits, reason in (
        (20, 1, 4, "20 numbers in 4 bits do not fill words"),
        (48, 2, 4, "in 4 bits they take groups of 8, 16, 32 … numbers, not of 24"),
        (32, 4, 2, "in 2 bits they take groups of 16, 32, 64 … numbers, not of 8"),
        (512, 1, 4, "up to 256, not 512"),
    ):
        values = {"bits": bits, "width": width, "groups": groups}
        slots = packed_rectangle(1, 1, 1, 9, PLAIN, values)
        with pytest.raises(KeepKVError, match=reason):
            kernels.decode_packed(**slots, scaling=0.25, backend="triton")
        compare(kernels.decode_packed(**slots, scaling=0.25), naive(slots, scaling=0.25), torch.float32)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts allocations on the CPU")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("is_ragged", [False, True], ids=["rectangle", "ragged"])
def test_no_more_than_a_tile_is_expanded(
    bits: int, kind: dict[str, Any], is_ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE_BYTES", 1 << 19)
    options = {"bits": bits, "width": 64, **kind}
    slots = (
        packed_ragged([[2000, 4000], [3000, 1000]], options, options)
        if is_ragged
        else packed_rectangle(2, 2, 2, 2500, options, options)
    )
    most = peak(lambda: kernels.decode_packed(**slots, scaling=0.25))
    assert 1 << 17 < most <= 1 << 19  # all of it expanded: 5 MiB


def test_a_tile_is_8_mib() -> None:
    assert reference.TILE_BYTES == 8 << 20


def test_what_does_not_fit_together_is_refused() -> None:
    slots = packed_rectangle(1, 2, 2, 8, PLAIN, PLAIN)
    keys = slots["keys"]
    for wrong, message in (
        ({"query": normal(1, 4, 8)}, "dimension 8, for keys of 1 rows, 2 heads, dimension 16"),
        ({"values": codes_at_random(1, 2, 5, **PLAIN)}, "values for slots"),
        ({"keys": keys._replace(bits=3)}, "keys in 3 bits: a code has 2, 4, 8"),
        ({"keys": keys._replace(width=20)}, "20 numbers in 4 bits lie in 10 uint8 each, not in 8 torch.uint8"),
        ({"keys": keys._replace(codes=keys.codes.float())}, "not in 8 torch.float32"),
        ({"keys": keys._replace(codes=keys.codes.view(torch.int8))}, "not in 8 torch.int8"),
        ({"keys": keys._replace(scale=keys.scale.expand(-1, -1, -1, 3))}, "groups that divide the numbers"),
        ({"keys": keys._replace(scale=keys.scale[:, :, :5])}, "as many slots"),
        ({"keys": keys._replace(zero=keys.zero[..., 0])}, "zeros of keys must have the shape"),
        ({"keys": keys._replace(levels=torch.zeros(4))}, "stand for 16 levels, not"),
        ({"values": keys._replace(turn=torch.eye(8))}, "the turn of values must be 16 × 16"),
    ):
        with pytest.raises(UnsupportedInput, match=message):
            kernels.decode_packed(**{**slots, "scaling": 1.0, **wrong})
