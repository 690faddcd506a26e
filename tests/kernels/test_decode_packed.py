"""Attention of one token over codes: the reference against attention over expanded slots in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codes_at_random import codes_at_random, expanded, packed_ragged, packed_rectangle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_slots import DEVICE, INF, compare, every_dtype, normal, segments
from torch.profiler import profile
from torch.testing import assert_close

from keepkv import kernels
from keepkv.errors import UnsupportedInput
from keepkv.kernels.codes import BITS, Codes
from keepkv.kernels.packed import reference

PLAIN = {"bits": 4, "width": 16}
KINDS = [
    {"groups": 1, "zero": True},
    {"groups": 4, "zero": True},
    {"groups": 2, "zero": False},
    {"groups": 1, "zero": False, "levels": True},
    {"groups": 2, "zero": True, "levels": True, "turn": True},
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


def empty_slots_do_not_matter(backend: str) -> None:
    slots = packed_rectangle(2, 1, 2, 40, PLAIN, {**PLAIN, "zero": False})
    expected = kernels.decode_packed(**slots, scaling=0.25, backend=backend).output
    empty = slots["positions"] < 0
    slots["log_votes"][empty] = float("nan")
    for name in ("keys", "values"):
        slots[name].scale[empty] = float("nan")
    assert torch.equal(kernels.decode_packed(**slots, scaling=0.25, backend=backend).output, expected)


def test_empty_slots_do_not_matter() -> None:
    empty_slots_do_not_matter("reference")


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
    with profile(profile_memory=True) as seen:
        kernels.decode_packed(**slots, scaling=0.25)
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda x: x.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 1 << 17 < peak <= 1 << 19  # all of it expanded: 5 MiB


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
        ({"keys": keys._replace(scale=keys.scale.expand(-1, -1, -1, 3))}, "groups that divide the numbers"),
        ({"keys": keys._replace(scale=keys.scale[:, :, :5])}, "as many slots"),
        ({"keys": keys._replace(zero=keys.zero[..., 0])}, "zeros of keys must have the shape"),
        ({"keys": keys._replace(levels=torch.zeros(4))}, "stand for 16 levels, not"),
        ({"values": keys._replace(turn=torch.eye(8))}, "the turn of values must be 16 × 16"),
    ):
        with pytest.raises(UnsupportedInput, match=message):
            kernels.decode_packed(**{**slots, "scaling": 1.0, **wrong})
