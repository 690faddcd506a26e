"""Rotation as data: undone, and averaged in closed form."""

from __future__ import annotations

import pytest
import torch
from rotations import F64, make, matrix

from keepkv.core.rope import Rope

LAYOUTS = [
    pytest.param(8, False, 1.0, id="half-split"),
    pytest.param(8, True, 1.0, id="interleaved"),
    pytest.param(4, False, 1.0, id="partial"),
    pytest.param(4, True, 1.4, id="partial-interleaved-scaled"),
    pytest.param(8, False, 1.3, id="scaled"),
]
layouts = pytest.mark.parametrize(("dims", "interleaved", "scaling"), LAYOUTS)


@layouts
def test_rotation_and_its_inverse(dims: int, interleaved: bool, scaling: float) -> None:
    rope = make(dims, interleaved, scaling)
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 500, 5000]])
    turned = rope.rotate(x, positions[:, None])
    for b in range(2):
        for n in range(5):
            wanted = x[b, :, n].double() @ matrix(rope, int(positions[b, n])).T
            torch.testing.assert_close(turned[b, :, n].double(), wanted, rtol=0, atol=2e-3 if n > 2 and b else 1e-5)
    torch.testing.assert_close(rope.unrotate(turned, positions[:, None]), x, rtol=0, atol=1e-6)
    assert rope.rotate(x.bfloat16(), positions[:, None]).dtype == torch.bfloat16


@layouts
@pytest.mark.parametrize("count", [1, 2, 7, 512])
def test_average_in_closed_form(dims: int, interleaved: bool, scaling: float, count: int) -> None:
    """Mean rotation and mean second moment equal the mean over positions, to 1e-12, from far positions too."""
    rope = make(dims, interleaved, scaling)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, dtype=F64, generator=rng)
    factor = torch.randn(2, 3, 8, 8, dtype=F64, generator=rng)
    moment = factor @ factor.transpose(-1, -2)
    start = torch.tensor([0, 100_003])
    mean, back = rope.average(x, start, count), rope.average(x, start, count, transpose=True)
    second = rope.average_moment(moment, start, count)
    for b in range(2):
        turns = torch.stack([matrix(rope, int(start[b]) + j) for j in range(count)])
        torch.testing.assert_close(mean[b], x[b] @ turns.mean(0).T, rtol=0, atol=1e-10 if b else 1e-12)
        torch.testing.assert_close(back[b], x[b] @ turns.mean(0), rtol=0, atol=1e-10 if b else 1e-12)
        wanted = torch.stack([turns @ m @ turns.transpose(-1, -2) for m in moment[b]]).mean(1)
        torch.testing.assert_close(second[b], wanted, rtol=0, atol=1e-9 if b else 1e-11)


def test_average_keeps_slow_pairs_and_damps_fast_ones() -> None:
    rope = Rope(5e5 ** (-torch.arange(64) / 64))
    x = torch.ones(1, 1, 128)
    size = rope.average(x, torch.tensor([1000]), 512)[0, 0].view(2, 64).norm(dim=0) / 2**0.5
    assert (size < 0.05).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert (size > 0.95).float().mean().item() == pytest.approx(0.53, abs=0.05)
