"""Where kept slots lie in blocks: no two in one place, none outside of the region; needs no vLLM."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepkv.integrations.vllm.places import Places, equal_places, packed_places, recent_places


def taken(places: Places) -> set[tuple[int, int, int]]:
    found = [
        (int(b), int(lane), int(o))
        for b, lane, o, real in zip(*(x.flatten() for x in places), strict=True)
        if bool(real)
    ]
    assert len(set(found)) == len(found), "two slots in one place"
    return set(found)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    """Counts of heads, the event, the first block that the plan's bound allows, and the size of a block."""
    block = draw(st.sampled_from([1, 4, 8, 16]))
    event = draw(st.integers(1, 200))
    counts = torch.tensor(draw(st.lists(st.integers(1, event), min_size=1, max_size=12)))
    mean = ceil(int(counts.sum()) / len(counts))
    first = max(0, event // block - ceil(mean / block) - 1)
    return counts, event, draw(st.integers(0, first)), block


@settings(deadline=None)
@given(ragged())
def test_packed_pages_fit_whatever_the_counts(case: tuple[torch.Tensor, int, int, int]) -> None:
    counts, event, first, block = case
    places = packed_places(counts, event, first, block)
    found = taken(places)
    assert len(found) == int(counts.sum()) and places.real.sum(-1).tolist() == counts.tolist()
    for at, lane, offset in found:
        assert first <= at <= event // block and 0 <= lane < len(counts) and 0 <= offset < block
        assert at * block + offset < event or at < event // block
    recent = taken(recent_places(event, event + 20, len(counts), block))
    assert not found & recent, "tokens to come would overwrite what is kept"


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(40, 200), st.sampled_from([4, 16]))
def test_equal_heads_end_right_before_the_event(counts: list[int], event: int, block: int) -> None:
    found = taken(equal_places(torch.tensor(counts), event, block))
    for head, count in enumerate(counts):
        slots = sorted(at * block + offset for at, lane, offset in found if lane == head)
        assert slots == list(range(event - count, event))


def test_pages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError, match="reach the block of token"):
        packed_places(torch.tensor([33, 33]), event=64, first_block=3, block=16)


def test_slots_of_a_head_stay_in_order() -> None:
    places = packed_places(torch.tensor([5, 9]), event=21, first_block=0, block=4)
    assert places.real.tolist()[0] == [False] * 4 + [True] * 5
    page = places.block * 2 + places.lane
    for head in range(2):
        main = [int(p) * 4 + int(o) for p, o, b, r in zip(page[head], places.offset[head], places.block[head], places.real[head], strict=True) if r and b < 5]  # fmt: skip # noqa: E501
        assert main == sorted(main)
