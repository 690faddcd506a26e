"""Attention over the blocks of a serving engine: places as the plugin writes them, the kernel in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_slots import DEVICE, both, compare, every_dtype, needs_triton, normal, wide
from torch import Tensor

from keepkv import kernels
from keepkv.attention.attend import attend
from keepkv.attention.part import Part
from keepkv.errors import UnsupportedInput
from keepkv.integrations.vllm.places import equal_places, packed_places
from keepkv.kernels.paged import PagedSlots


@dataclass(frozen=True)
class Row:
    """counts: slots of each lane at ``event``; more: tokens since."""

    event: int
    counts: list[int]
    more: int
    packed: bool


def first_block(row: Row, size: int) -> int:
    """As the plan has it for lanes of different lengths."""
    mean = -(-sum(row.counts) // len(row.counts))
    return max(0, row.event // size - -(-mean // size) - 1)


def blocks(
    rows: list[Row], layers: int, heads: int, size: int, d: int, dv: int, layer: int = 0, votes: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PagedSlots:  # fmt: skip
    """Random slots; whatever no row holds is NaN."""
    long = max(-(-(r.event + r.more) // size) for r in rows)
    most = long * len(rows)
    table = torch.randperm(most, device=DEVICE).view(len(rows), long).int()
    keys, values = (normal(layers, most, heads, size, n, dtype=dtype) for n in (d, dv))
    log_votes = 2 * normal(layers, most, heads, size) if votes else None
    counts = torch.tensor([r.counts for r in rows], device=DEVICE)
    own = counts[:, layer * heads : (layer + 1) * heads]
    longest = int((own + torch.tensor([[r.more] for r in rows], device=DEVICE)).max())

    def of(x: list[int]) -> Tensor:
        return torch.tensor(x, device=DEVICE)

    made = PagedSlots(
        keys, values, log_votes, table, of([r.event for r in rows]), of([r.event + r.more for r in rows]), counts,
        of([first_block(r, size) for r in rows]), of([r.packed for r in rows]), longest, layer,
    )  # fmt: skip
    *at, real, held = made.places()
    lost = torch.ones(keys.shape[:4], dtype=torch.bool, device=DEVICE)
    lost[tuple(x[real] for x in at)] = False
    for x in (keys, values):
        x[lost] = float("nan")
    if log_votes is not None:
        old = torch.zeros_like(lost)
        old[tuple(x[held] for x in at)] = True
        log_votes[~old] = float("nan")
    return made


ROWS = [Row(40, [17, 5, 23, 1], 9, True), Row(33, [12] * 4, 0, False), Row(64, [30, 2, 9, 40], 21, True),
        Row(0, [0] * 4, 27, False)]  # fmt: skip


@needs_triton
@every_dtype
@pytest.mark.parametrize("layer", [0, 1])
def test_paged_attention(dtype: torch.dtype, layer: int) -> None:
    slots, g, d = blocks(ROWS, 2, 2, 16, 32, 48, layer, dtype=dtype), 3, 32
    query, exact = (
        normal(len(ROWS), 2 * g, d, dtype=dtype),
        slots._replace(keys=wide(slots.keys), values=wide(slots.values)),
    )
    for options in ({}, {"softcap": 5.0, "sinks": normal(2 * g)}):
        got = kernels.paged_attention(query, slots, scaling=d**-0.5, **options, backend="triton")
        known = {name: wide(x) for name, x in options.items()}
        expected = kernels.paged_attention(wide(query), exact, scaling=d**-0.5, **known, backend="reference")
        compare(got, expected, dtype)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_a_slot_of_votes_is_as_many_copies(backend: str) -> None:
    slots, query = blocks([Row(48, [20], 9, True)], 1, 1, 16, 16, 24), normal(1, 2, 16)
    assert slots.log_votes is not None
    *at, real, held = slots.places()
    counts = torch.ones_like(real, dtype=torch.long)
    counts[held] = torch.randint(1, 6, (int(held.sum()),), device=DEVICE)
    slots.log_votes[tuple(x[held] for x in at)] = counts[held].float().log()
    keys, values = (
        x[tuple(i[real] for i in at)].repeat_interleave(counts[real], 0) for x in (slots.keys, slots.values)
    )
    expected = (0.25 * query[0] @ keys.T).softmax(-1) @ values
    got = kernels.paged_attention(query, slots, scaling=0.25, backend=backend)
    torch.testing.assert_close(got.output.view(2, 24), expected, atol=1e-5, rtol=1e-5)


@needs_triton
def test_many_parts_and_no_votes() -> None:
    slots = blocks([Row(900, [400, 3], 70, True), Row(512, [511, 511], 5, False)], 1, 2, 32, 16, 16, votes=False)
    query = normal(2, 4, 16)
    got, expected = both(kernels.paged_attention, {"query": query, "slots": slots}, scaling=0.3)
    compare(got, expected, torch.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Row], int, int, int, int]:
    layers, heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 16]))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        event, packed = draw(st.integers(1, 90)), draw(st.booleans())
        counts = draw(st.lists(st.integers(0, event), min_size=layers * heads, max_size=layers * heads))
        rows.append(Row(event, counts, draw(st.integers(1, 20)), packed))
    return rows, layers, heads, size, draw(st.integers(0, layers - 1))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_slots_are_where_the_plugin_writes_them(case: tuple[list[Row], int, int, int, int]) -> None:
    rows, layers, heads, size, layer = case
    slots = blocks(rows, layers, heads, size, 4, 4, layer)
    of_layer, block, head, offset, real, held = slots.places()
    for i, row in enumerate(rows):
        counts, own = torch.tensor(row.counts), slice(layer * heads, (layer + 1) * heads)
        if row.packed:
            there = packed_places(counts, row.event, first_block(row, size), size)
        else:
            there = equal_places(counts, row.event, size)
        for h, lane in enumerate(range(layers * heads)[own]):
            kept = there.real[lane]
            wanted = [
                (int(x) // heads, int(slots.table[i, b]), int(x) % heads, int(o))
                for b, x, o in zip(*(y[lane][kept].tolist() for y in there[:3]), strict=True)
            ]
            since = range(row.event, row.event + row.more)
            wanted += [(layer, int(slots.table[i, t // size]), h, t % size) for t in since]
            mine = real[i, h]
            got = list(zip(*(x[i, h][mine].tolist() for x in (of_layer, block, head, offset)), strict=True))
            assert got == wanted and int(held[i, h].sum()) == row.counts[lane]


def test_the_reference_is_attention_over_what_is_held() -> None:
    slots = blocks(ROWS, 2, 2, 16, 8, 8, layer=1)
    query = normal(len(ROWS), 4, 8)
    got = kernels.paged_attention(query, slots, scaling=0.5, backend="reference")
    *at, real, held = slots.places()
    for i in range(len(ROWS)):
        for h in range(2):
            mine = tuple(x[i, h][real[i, h]] for x in at)
            assert slots.log_votes is not None
            votes = slots.log_votes[mine].masked_fill(~held[i, h][real[i, h]], 0.0)
            there = (slots.keys[mine], slots.values[mine], votes, torch.zeros_like(votes))
            part = Part(*(x[None, None] for x in there))
            out = attend(query[i, None, 2 * h : 2 * h + 2, None], [part], 0.5).output
            torch.testing.assert_close(got.output[i, 2 * h : 2 * h + 2], out[0, :, 0])


@pytest.mark.parametrize(
    "wrong",
    [{"counts": torch.zeros(4, 3)}, {"layer": 2}, {"log_votes": torch.zeros(1)}, {"end": torch.zeros(3)}],
    ids=lambda x: next(iter(x)),
)
def test_shapes_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    slots = blocks(ROWS, 2, 2, 16, 8, 8)
    with pytest.raises(UnsupportedInput):
        kernels.paged_attention(normal(len(ROWS), 4, 8), slots._replace(**wrong), scaling=0.5)
    with pytest.raises(UnsupportedInput):
        kernels.paged_attention(normal(len(ROWS), 3, 8), slots, scaling=0.5)
