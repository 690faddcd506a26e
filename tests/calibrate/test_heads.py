"""How alike KV heads are: correlations against loops, and what a rotation leaves alone."""

from __future__ import annotations

import pytest
import torch
import zoo

from keepkv.calibrate.heads import Alike, compare_heads

H, S, D = 4, 50, 6


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_correlation_is_the_mean_over_pairs() -> None:
    """Against loops, in two pieces; and the law of deviations, which is exact."""
    x = drawn(2, H, S, D) + 3 * drawn(1, 1, 1, D, seed=1) + drawn(2, 1, S, D, seed=2)
    found = Alike()
    found.add(x[:, :, :20])
    found.add(x[:, :, 20:])
    rows = x.double().transpose(0, 1).reshape(H, -1, D)

    def rho(y: torch.Tensor) -> float:
        pairs = [(y[a] * y[b]).sum().item() for a in range(H) for b in range(H) if a != b]
        return sum(pairs) / len(pairs) / (y.square().sum().item() / H)

    assert found.rho == pytest.approx(rho(rows)) and found.varying == pytest.approx(
        rho(rows - rows.mean(1, keepdim=True))
    )
    away = rows.mean(0) - rows
    assert found.energy == pytest.approx((away.square().sum() / rows.square().sum()).item())
    ranges = [(y.amax(-1) - y.amin(-1)).log2().mean().item() for y in (rows, away)]
    assert found.by_range == pytest.approx(ranges[0] - ranges[1]) and 0 < found.by_energy < 4


def test_one_head_has_nothing_in_common() -> None:
    found = Alike()
    found.add(drawn(1, 1, S, D))
    assert found.rho == found.varying == found.by_energy == found.by_range == 0.0


def test_rotation_does_not_change_how_alike_keys_are() -> None:
    """All heads of a token turn alike."""
    texts = torch.randint(3, 60, (3, 1, 24), generator=torch.Generator().manual_seed(7))
    found = compare_heads(zoo.model("llama"), texts)
    assert list(found) == [0, 1, 2]
    for layer in found.values():
        assert layer["keys"].tokens == 3 * 24
        assert layer["keys"].rho == pytest.approx(layer["before_rope"].rho, abs=1e-5)
