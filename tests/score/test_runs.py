"""Runs of tokens: where every token is held they are read in place, and give what slot by slot gives."""

from __future__ import annotations

import pytest
import torch

from keepkv.observe import chunks


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(("slots", "size"), [(40, 8), (37, 8), (5, 8), (8, 8)])
@pytest.mark.parametrize("how", ["amax", "amin", "sum"])
def test_regular_runs_are_runs(slots: int, size: int, first: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = (torch.arange(slots) - first).div(size, rounding_mode="floor").clamp(min=-1).expand(2, 3, slots)
    x = torch.randn(2, 3, slots, 5)
    fast = chunks.per_chunk(x, home, how)
    back = chunks.at_chunk(fast, home)
    monkeypatch.setattr(chunks, "_regular", lambda home: None)
    slow = chunks.per_chunk(x, home, how)
    assert torch.equal(fast, slow)
    for b, h, s in ((b, h, s) for b in range(2) for h in range(3) for s in range(slots) if home[b, h, s] >= 0):
        mine = x[b, h, home[b, h] == home[b, h, s]]
        expected = mine.double().sum(0) if how == "sum" else getattr(mine, how)(0)
        assert torch.allclose(back[b, h, s].double(), expected.double())


def test_runs_with_gaps_are_not_regular() -> None:
    whole = (torch.arange(24) // 8).expand(1, 2, 24)
    assert chunks._regular(whole) == (0, 8)
    for change in ((0, 1, 3, -1), (0, 0, 9, 0)):
        home = whole.clone()
        home[change[0], change[1], change[2]] = change[3]
        assert chunks._regular(home) is None
    assert chunks._regular(torch.full((1, 1, 4), -1)) is None
