"""Runs of tokens: where every token is held they are read in place, and give what slot by slot gives."""

from __future__ import annotations

import pytest
import torch

from keepkv.observe.chunks import Runs


def irregular(home: torch.Tensor) -> Runs:
    """The same runs, found slot by slot."""
    runs = Runs(home)
    runs.regular = None
    return runs


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(("slots", "size"), [(40, 8), (37, 8), (5, 8), (8, 8)])
@pytest.mark.parametrize("how", ["amax", "amin", "sum"])
def test_regular_runs_are_runs(slots: int, size: int, first: int, how: str) -> None:
    home = (torch.arange(slots) - first).div(size, rounding_mode="floor").clamp(min=-1).expand(2, 3, slots)
    x = torch.randn(2, 3, slots, 5)
    fast, slow = Runs(home), irregular(home)
    assert fast.regular == (first, min(size, slots - first))
    assert torch.equal(fast.per(x, how), slow.per(x, how))
    table, back = slow.per(x, how), fast.at(fast.per(x, how))
    for ahead in (0, 1):
        assert torch.equal(fast.at(table, ahead), slow.at(table, ahead))
    for b, h, s in ((b, h, s) for b in range(2) for h in range(3) for s in range(slots) if home[b, h, s] >= 0):
        mine = x[b, h, home[b, h] == home[b, h, s]]
        expected = mine.double().sum(0) if how == "sum" else getattr(mine, how)(0)
        assert torch.allclose(back[b, h, s].double(), expected.double())


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(("slots", "size"), [(40, 8), (37, 8), (5, 8)])
def test_regular_runs_rank_their_slots(slots: int, size: int, first: int) -> None:
    home = (torch.arange(slots) - first).div(size, rounding_mode="floor").clamp(min=-1).expand(2, 3, slots)
    scores = torch.randn(2, 3, slots).mul(2).round()  # with ties
    scores[0, 0, 1:3] = float("nan")
    found = Runs(home).ranks(scores)
    assert torch.equal(found, irregular(home).ranks(scores))
    clean = scores.nan_to_num(nan=float("-inf"))
    for s in range(slots):
        mine = (home == home[..., s : s + 1]) & (torch.arange(slots) != s)
        better = (clean > clean[..., s : s + 1]) | ((clean == clean[..., s : s + 1]) & (torch.arange(slots) < s))
        assert torch.equal(found[..., s], (mine & better).sum(-1))


def test_runs_with_gaps_are_not_regular() -> None:
    whole = (torch.arange(24) // 8).expand(1, 2, 24)
    assert Runs(whole).regular == (0, 8)
    for change in ((0, 1, 3, -1), (0, 0, 9, 0)):
        home = whole.clone()
        home[change[0], change[1], change[2]] = change[3]
        assert Runs(home).regular is None
    assert Runs(torch.full((1, 1, 4), -1)).regular is None
