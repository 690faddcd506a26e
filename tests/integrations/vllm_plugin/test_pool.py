"""Slots written to blocks and read from them again, however a backend lays blocks out; needs no vLLM."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keepkv.core.slots import EMPTY, Slots
from keepkv.core.stats import Stat
from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.pages import Held, Pages
from keepkv.integrations.vllm.plan import Plan
from keepkv.integrations.vllm.pool import SLOT_BYTES, Pool
from keepkv.integrations.vllm.wish import wish_of

HEADS, DIM, BLOCK, BLOCKS = 2, 4, 8, 12


def caches(layers: int, dtype: torch.dtype, by_slots: bool = False, room: int = SLOT_BYTES) -> list[Tensor]:
    """Tensors (blocks,H,slots,2D) of some layers in one buffer, with room behind each page. by_slots: all heads of a
    slot lie together, and not all slots of a head."""
    size = torch.empty(0, dtype=dtype).element_size()
    page = HEADS * BLOCK * (2 * DIM * size + room) // size
    buffer = torch.zeros(layers, BLOCKS, page, dtype=dtype)
    inner = (2 * DIM, HEADS * 2 * DIM, 1) if by_slots else (BLOCK * 2 * DIM, 2 * DIM, 1)
    return [
        torch.as_strided(buffer, (BLOCKS, HEADS, BLOCK, 2 * DIM), (page, *inner), buffer[i].storage_offset())
        for i in range(layers)
    ]


def plan(method: str, prompt: int, layers: int, budget: float | int) -> Plan:
    wish = wish_of({"keepkv_method": method, "keepkv_budget": budget}, None)
    assert wish is not None
    return Plan(wish, prompt, BLOCK, layers)


def slots(counts: Tensor, dtype: torch.dtype, stats: dict[str, Stat], seed: int) -> Slots:
    """Random ones, empty ones first."""
    made = torch.Generator().manual_seed(seed)
    size = int(counts.max())
    real = torch.arange(size) >= size - counts[:, None]
    shape = (1, len(counts), size)
    return Slots(
        torch.randn(*shape, DIM, generator=made).to(dtype) * real[..., None],
        torch.randn(*shape, DIM, generator=made).to(dtype) * real[..., None],
        torch.rand(shape, generator=made) * real,
        torch.arange(size, dtype=torch.int32).expand(shape).masked_fill(~real, EMPTY),
        {name: torch.rand(shape, generator=made) * real for name in stats},
    )


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["knorm", "h2o", "random"]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(),
    st.lists(st.integers(1, 30), min_size=HEADS, max_size=HEADS), st.integers(30, 60), st.integers(0, 9),
    st.permutations(range(BLOCKS)),
)  # fmt: skip
def test_what_is_written_is_read(
    method: str, dtype: torch.dtype, transposed: bool, counts: list[int], event: int, more: int, table: list[int]
) -> None:
    one = plan(method, event, 1, 0.9)
    held = Held(slice(0, HEADS), event, torch.tensor(counts))
    pages = Pages(Pool(caches(1, dtype), transposed), torch.tensor(table), one)
    given_ = slots(held.counts, dtype, one.wish.method.score.stats, sum(counts))  # type: ignore[arg-type]
    pages.begin(held, event, event + more)
    pages.write(held, given_)
    found = pages.read(held, event + more)
    size = int(max(counts))
    assert found.positions.shape == (1, HEADS, size + more)
    for name in ("keys", "values", "log_votes", "positions"):
        kept, expected = getattr(found, name)[:, :, :size], getattr(given_, name)
        real = given_.valid
        assert torch.equal(kept[real], expected[real]), name
    assert found.positions[0, :, size:].tolist() == [list(range(event, event + more))] * HEADS
    for name, x in given_.stats.items():
        assert torch.equal(found.stats[name][:, :, :size][given_.valid], x[given_.valid])
        assert not found.stats[name][:, :, size:].any(), "tokens since begin with what the score says"


@pytest.mark.parametrize("by_slots", [False, True])
def test_pages_of_all_layers_are_packed_together(by_slots: bool) -> None:
    one, layers = plan("keepkv2", 60, 3, 24), 3
    tensors = caches(layers, torch.float32, by_slots)
    pool = Pool(tensors, transposed=False)
    counts = torch.tensor([40, 3, 60, 11, 7, 23])
    assert int(counts.sum()) <= one.held(60) * len(counts)
    table = torch.randperm(BLOCKS)
    helds = [Held(slice(HEADS * i, HEADS * (i + 1)), 60, counts) for i in range(layers)]
    written = [slots(counts[h.lanes], torch.float32, {}, i) for i, h in enumerate(helds)]
    pages = Pages(pool, table, one)
    for held, x in zip(helds, written, strict=True):
        pages.write(held, x)
    for held, x in zip(helds, written, strict=True):
        found = pages.read(held, 60)
        assert torch.equal(found.keys[x.valid], x.keys[x.valid]) and torch.equal(found.positions, x.positions)
    first = one.first_block(60)
    untouched = torch.cat([t[table[:first]].flatten() for t in tensors])
    assert first > 0 and not untouched.any(), "blocks that are given back were written to"


def test_tensors_without_room_or_apart_are_refused() -> None:
    with pytest.raises(KeepKVError, match="no room"):
        Pool(caches(1, torch.float32, room=8), transposed=False)
    with pytest.raises(KeepKVError, match="one buffer"):
        Pool([*caches(1, torch.float32), *caches(1, torch.float32)], transposed=False)
