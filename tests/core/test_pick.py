"""Slots are picked as ``gather`` would, however they lie in memory."""

from __future__ import annotations

import pytest
import torch

from keepkv.core.pick import pick
from keepkv.core.slots import Slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("layout", ["contiguous", "room behind", "token by token", "one for all heads"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (1, 2, 7, 5), (2, 3, 7), (2, 3, 7, 0)])
def test_what_is_picked_is_what_gather_gives(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    b, h, s, *rest = shape
    x = torch.randn(b, h, s, *rest).mul(9).to(dtype)
    if layout == "room behind":
        x = torch.cat((x, x), 2)[:, :, :s]
    elif layout == "token by token":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "one for all heads":
        x = x[:, :1].expand(b, h, s, *rest)
    columns = torch.randint(s, (b, h, 5))
    wide = columns.view(b, h, 5, *[1] * len(rest)).expand(b, h, 5, *rest)
    assert torch.equal(pick(x, columns), x.gather(2, wide))
    assert pick(x, columns[..., :0]).shape == (b, h, 0, *rest)


@pytest.mark.parametrize("counts", [[[3, 3], [3, 3]], [[3, 0], [2, 5]], [[0, 0], [0, 0]]])
def test_selected_slots_keep_their_order_and_empty_ones_come_first(counts: list[list[int]]) -> None:
    keys = torch.randn(2, 2, 6, 4)
    positions = torch.arange(6, dtype=torch.int32).expand(2, 2, 6).contiguous()
    slots = Slots(keys, keys, torch.zeros(2, 2, 6), positions)
    keep = torch.stack([torch.stack([torch.randperm(6) < n for n in row]) for row in counts])
    order, kept = slots.kept_indices(keep)
    size, chosen = max(n for row in counts for n in row), slots.select(keep)
    assert order.shape == kept.shape == (2, 2, size)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        n, expected = counts[b][h], keep[b, h].nonzero()[:, 0]
        assert kept[b, h].tolist() == [False] * (size - n) + [True] * n
        assert torch.equal(order[b, h, size - n :], expected)
        assert not keep[b, h, order[b, h, : size - n]].any()
        assert chosen.positions[b, h].tolist() == [-1] * (size - n) + expected.tolist()
        assert torch.equal(chosen.keys[b, h, size - n :], keys[b, h, expected])
