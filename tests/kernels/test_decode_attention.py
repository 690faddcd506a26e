"""Attention of one token: the kernel, in Triton's interpreter or on a GPU, and tiles of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_slots import (
    DEVICE,
    INF,
    both,
    compare,
    every_dtype,
    needs_triton,
    normal,
    ragged,
    rectangle,
    segments,
    wide,
)
from running import batch, generate
from torch.testing import assert_close

import keepkv
from keepkv import kernels
from keepkv.attention.attend import attend
from keepkv.attention.part import Part
from keepkv.core.slots import LayerView, Slots
from keepkv.kernels.decode.tiles import decode_in_tiles
from keepkv.kernels.segments import TILE, Segments, segments_of
from keepkv.kernels.tolerance import ATOL, EXACT, RTOL
from keepkv.observe import attention
from keepkv.store import Held
from keepkv.store.ragged import RaggedStore

# decode_attention


@needs_triton
@every_dtype
@pytest.mark.parametrize(
    "b, h, g, s, d, dv",
    [(2, 2, 4, 300, 32, 32), (1, 2, 1, 70, 80, 48), (2, 1, 8, 40, 96, 96), (1, 1, 1, 33, 256, 16)],
)
def test_decode_attention(dtype: torch.dtype, b: int, h: int, g: int, s: int, d: int, dv: int) -> None:
    slots = rectangle(b, h, g, s, d, dv, dtype)
    for options in ({}, {"softcap": 5.0, "sinks": normal(h * g), "weights": True}):
        compare(*both(kernels.decode_attention, slots, scaling=d**-0.5, **options), dtype)


@needs_triton
def test_it_says_what_the_engine_says() -> None:
    slots = rectangle(2, 2, 2, 50, 16, 8)
    sinks, common = normal(4), {"scaling": 0.3, "softcap": 8.0}
    got = kernels.decode_attention(**slots, sinks=sinks, **common, weights=True, backend="triton")
    parts = [Part(*(slots[name] for name in Part._fields[:4]))]
    assert_close(got.output[:, :, None], attend(slots["query"][:, :, None], parts, sinks=sinks, **common).output)
    view = LayerView(
        Slots(*(slots[name] for name in ("keys", "values", "log_votes", "positions"))),
        slots["query"][:, :, None], torch.full((2, 1), 99, device=DEVICE), torch.full((2,), 100, device=DEVICE),
        **common, sink_logits=sinks,
    )  # fmt: skip
    weights = attention.weights(view, view.queries, view.query_positions)
    assert got.weights is not None
    assert_close(got.weights, weights[:, :, :, 0])


@needs_triton
def test_one_token_steps_of_the_engine_use_the_kernel_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from keepkv.kernels.decode import triton

    slots = rectangle(1, 2, 2, 20, 16, 16)
    part = Part(*(slots[name] for name in Part._fields[:4]))
    calls, kernel = [], triton.decode_attention
    monkeypatch.setattr(triton, "decode_attention", lambda *given: calls.append(1) or kernel(*given))
    expected = attend(slots["query"][:, :, None], [part], 0.25).output
    ours = len(calls)
    monkeypatch.setenv("KEEPKV_KERNELS", "triton")
    assert_close(attend(slots["query"][:, :, None], [part], 0.25).output, expected)
    assert (ours, len(calls)) == ((0, 1) if DEVICE.type == "cpu" else (1, 2))
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    attend(slots["query"][:, :, None], [part], 0.25)
    assert len(calls) == ours + 1


@needs_triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the zoo's models are on the CPU")
@pytest.mark.parametrize("arch, method", [("llama", "keepkv"), ("gpt-oss", "keepkv"), ("deepseek-v3", "snapkv")])
def test_generation_by_the_kernel(arch: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.model(arch), batch((30, 17))  # grouped heads; sinks; one latent for keys and values
    run = [generate(model, inputs, keepkv.Cache(model, method, 12, sinks=2, window=4), new=3)]
    monkeypatch.setenv("KEEPKV_KERNELS", "triton")
    run.append(generate(model, inputs, keepkv.Cache(model, method, 12, sinks=2, window=4), new=3))
    assert torch.equal(run[0].sequences, run[1].sequences)
    assert_close(run[1].scores_, run[0].scores_, rtol=1e-4, atol=1e-4)
    assert not torch.equal(run[1].scores_, run[0].scores_)  # it was the kernel


@needs_triton
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("lengths", [[[5, 0], [300, 17]], [[0, 0], [0, 1]], [[1], [129], [128]]], ids=str)
def test_ragged_slots(lengths: list[list[int]], gap: int) -> None:
    slots = ragged(lengths, gap=gap)
    sinks = normal(slots["query"].shape[1])
    got, expected = both(kernels.decode_attention, slots, scaling=0.25, weights=True, sinks=sinks)
    compare(got, expected, torch.float32)
    heads = slots["lengths"].repeat_interleave(2, 1) == 0
    assert (got.output[heads] == 0).all() and (got.lse[heads] == -INF).all()


@needs_triton
@settings(max_examples=12, deadline=None)
@given(segments(2, 70), st.sampled_from([1, 3, 8]))
def test_any_ragged_shape(lengths: list[list[int]], g: int) -> None:
    compare(*both(kernels.decode_attention, ragged(lengths, g=g), scaling=0.25, weights=True), torch.float32)


@needs_triton
def test_it_reads_a_flat_store_as_it_lies() -> None:
    slots = rectangle(2, 2, 2, 40, 16, 16)
    positions = slots["positions"].masked_fill(torch.rand(2, 2, 40, device=DEVICE) < 0.3, -1)
    positions[1, 0] = -1
    store = RaggedStore(Held())
    store.load(Slots(slots["keys"], slots["values"], slots["log_votes"], positions))
    body, segments = store.body.fields, store.body.segments
    assert segments is not None
    got = kernels.decode_attention(
        slots["query"], body["keys"], body["values"], body["log_votes"], body["positions"], scaling=0.25,
        offsets=segments.first, lengths=segments.lengths, longest=segments.longest, backend="triton",
    )  # fmt: skip
    expected = kernels.decode_attention(**(slots | {"positions": positions}), scaling=0.25, backend="reference")
    assert_close(got.output, expected.output)
    assert_close(got.lse, expected.lse)


@needs_triton
def test_lengths_of_a_rectangle_say_the_same_as_empties_first() -> None:
    slots = rectangle(2, 2, 2, 90, 16, 16)
    lengths = torch.tensor([[90, 3], [0, 41]], device=DEVICE)
    first = torch.arange(90, device=DEVICE) >= 90 - lengths[..., None]
    positions = torch.where(first, 7, -1)
    by_positions = kernels.decode_attention(
        **(slots | {"positions": positions}), scaling=0.25, weights=True, backend="triton"
    )
    del slots["positions"]
    got, expected = both(kernels.decode_attention, slots, scaling=0.25, weights=True, lengths=lengths)
    compare(got, expected, torch.float32)
    compare(got, kernels.Decoded(*map(wide, by_positions)), torch.float32)


@needs_triton
def test_empty_slots_are_never_read() -> None:
    slots = rectangle(2, 1, 2, 40, 16, 16)
    expected = kernels.decode_attention(**slots, scaling=0.25, backend="triton").output
    for name in ("keys", "values", "log_votes"):
        slots[name][slots["positions"] < 0] = float("nan")
    assert torch.equal(kernels.decode_attention(**slots, scaling=0.25, backend="triton").output, expected)


@needs_triton
def test_where_nothing_is_seen() -> None:
    slots = rectangle(1, 2, 2, 20, 16, 16)
    slots["positions"][:, 0] = -1
    slots["log_votes"][:, 1] = -INF
    got = kernels.decode_attention(**slots, scaling=0.25, sinks=normal(4), weights=True, backend="triton")
    assert got.weights is not None
    assert (got.output == 0).all() and (got.weights == 0).all() and (got.lse == -INF).all()


@needs_triton
def test_votes_are_copies() -> None:
    query, keys, values = normal(1, 2, 16), normal(1, 1, 9, 16), normal(1, 1, 9, 16)
    times = torch.tensor([1, 4, 1, 1, 2, 7, 1, 1, 3], device=DEVICE)
    voted = kernels.decode_attention(
        query, keys, values, times.float().log()[None, None], scaling=0.5, backend="triton"
    )
    copies = [x.repeat_interleave(times, 2) for x in (keys, values)]
    assert_close(voted.output, kernels.decode_attention(query, *copies, scaling=0.5, backend="triton").output)


@needs_triton
@pytest.mark.parametrize("size", [200.0, 0.0])
def test_large_and_equal_logits(size: float) -> None:
    slots = rectangle(1, 1, 2, 80, 16, 16)
    slots["query"] *= 0
    slots["query"][..., 0] = 1
    slots["keys"][..., 0] = torch.linspace(-size, size, 80, device=DEVICE)
    compare(*both(kernels.decode_attention, slots, scaling=1.0, weights=True), torch.float32)


@needs_triton
def test_strides_do_not_matter() -> None:
    slots = rectangle(2, 2, 2, 40, 16, 24)
    expected = kernels.decode_attention(**slots, scaling=0.25, backend="triton").output
    grown = {name: torch.cat((x, x), 2)[:, :, :40] for name, x in slots.items() if name != "query"}  # a store's slack
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in slots.items() if x.dim() == 4}
    askew = {name: x.transpose(2, 3).contiguous().transpose(2, 3) for name, x in slots.items() if x.dim() == 4}
    for other in (grown, turned, askew):
        assert torch.equal(kernels.decode_attention(**(slots | other), scaling=0.25, backend="triton").output, expected)


# decode_in_tiles


def tiled(slots: dict[str, Any], scaling: float, softcap: float | None = None) -> kernels.Decoded:
    """``decode_in_tiles`` of slots as ``ragged`` gives them."""
    where = segments_of(slots["keys"], slots["offsets"], slots["lengths"])
    fields = (slots[name] for name in ("query", "keys", "values", "log_votes"))
    return decode_in_tiles(*fields, where, scaling, softcap)


def check_tiled(lengths: list[list[int]], g: int, dtype: torch.dtype = torch.float32) -> None:
    slots = {name: x.to(dtype) if x.is_floating_point() and name != "log_votes" else x
             for name, x in ragged(lengths, g=g).items()}  # fmt: skip
    for softcap in (None, 3.0):
        exact = {name: wide(x) for name, x in slots.items()}
        expected = kernels.decode_attention(**exact, scaling=0.25, softcap=softcap, backend="reference")
        output, lse, _ = tiled(slots, 0.25, softcap)
        assert output.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(output.double(), expected.output, rtol=RTOL[dtype], atol=ATOL[dtype])
        assert_close(lse.double(), expected.lse, **EXACT)


@every_dtype
@pytest.mark.parametrize(
    "lengths", [[[64, 64]], [[5, 0], [300, 17]], [[0, 63, 1]], [[0, 0, 0, 90, 0]], [[1] * 30, [7] * 30]], ids=str
)
def test_decode_in_tiles(lengths: list[list[int]], dtype: torch.dtype) -> None:
    """Segments that are tiles, that are smaller, empty, that end or begin within one; a rest behind the last tile."""
    check_tiled(lengths, 2, dtype)


@settings(max_examples=60, deadline=None)
@given(segments(5, 150), st.sampled_from([1, 3, 8]))
def test_decode_in_tiles_any_ragged_shape(lengths: list[list[int]], g: int) -> None:
    assume(sum(map(sum, lengths)) >= TILE)
    check_tiled(lengths, g)


def test_tiles_say_where_they_cannot() -> None:
    for slots in (ragged([[TILE - 1]]), ragged([[50, 50]], gap=2)):
        assert segments_of(slots["keys"], slots["offsets"], slots["lengths"]).tiles is None


def test_every_slot_is_in_one_tile_of_its_segment() -> None:
    lengths = torch.tensor([[70, 0, 3], [500, 64, 1]])
    first = lengths.flatten().cumsum(0).view_as(lengths) - lengths
    work = Segments(2, 3, 500, int(lengths.sum()), True, first, lengths).tiles
    assert work is not None and work.whole == 638 // TILE and len(work.extra) <= 2 * lengths.numel()
    slot = torch.cat((torch.arange(work.whole * TILE).view(-1, TILE), work.extra))
    owner = work.owner[:, None].expand_as(slot)
    inside = ~work.outside[:, 0]
    found = torch.stack((slot[inside], owner[inside]))
    expected = torch.stack((torch.arange(638), torch.arange(6).repeat_interleave(lengths.flatten())))
    assert torch.equal(found[:, found[0].argsort()], expected)
