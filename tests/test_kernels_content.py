"""The kernels of keepkv2's score against their references in float64: leverage, likeness, picking and turning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from keepkv import kernels
from keepkv.errors import UnsupportedInput
from keepkv.kernels.tolerance import ATOL, EXACT, RTOL
from keepkv.rope import Rope
from keepkv.score.distinct import NAMES, remember_distinct
from keepkv.slots import EMPTY
from kernel_slots import DEVICE, both, every_dtype, needs_triton, normal, rectangle
from score_views import part_of_queries, row, rows_of, together


def rope(dims: int, scaling: float = 1.0, interleaved: bool = False) -> Rope:
    return Rope(1e4 ** (-torch.arange(dims // 2, device=DEVICE) / (dims / 2)), scaling, interleaved)


# leverage

ROPES = [None, rope(16), rope(16, 1.3, True), rope(8)]


@needs_triton
@every_dtype
@pytest.mark.parametrize("b, h, s, d", [(2, 2, 90, 16), (1, 1, 150, 80), (1, 1, 40, 160)])
def test_leverage(dtype: torch.dtype, b: int, h: int, s: int, d: int) -> None:
    slots = rectangle(b, h, 1, s, d, d, dtype)
    away = slots["keys"] + 3 * normal(b, h, 1, d).to(dtype)  # a mean that is large beside the spread
    given = {"keys": away, "positions": slots["positions"], "log_votes": slots["log_votes"].clamp(max=3.0)}
    for turned in ROPES:
        got, expected = both(kernels.leverage, given, ridge=0.5, rope=turned)
        assert_close(got.double(), expected, rtol=2e-3, atol=1e-4)
        assert (got[slots["positions"] < 0] == 0).all()
    got, expected = both(kernels.leverage, given | {"log_votes": None}, ridge=1.0, rope=None)
    assert_close(got.double(), expected, rtol=2e-3, atol=1e-4)


@needs_triton
def test_leverage_where_nothing_is_said() -> None:
    positions = torch.arange(20, device=DEVICE).expand(1, 1, 20)
    for keys in (torch.zeros(1, 1, 20, 16), torch.ones(1, 1, 20, 16), 1e17 * normal(1, 1, 20, 16)):
        for backend in ("triton", "reference"):
            got = kernels.leverage(keys.to(DEVICE), positions, ridge=1.0, backend=backend)
            assert torch.isfinite(got).all()
    empty = kernels.leverage(normal(1, 1, 20, 16), positions * 0 - 1, ridge=1.0, backend="triton")
    assert (empty == 0).all()
    assert kernels.leverage(normal(1, 2, 0, 16), positions[:, :, :0].expand(1, 2, 0), ridge=1.0).shape == (1, 2, 0)


@needs_triton
def test_angles_far_into_a_text() -> None:
    """A text of a hundred thousand tokens: angles in float32 are as coarse as the model's own."""
    positions = torch.arange(99_900, 100_000, device=DEVICE).expand(1, 1, 100)
    given = {"keys": normal(1, 1, 100, 32), "positions": positions}
    got = kernels.leverage(**given, ridge=1.0, rope=rope(32), backend="triton")
    expected = kernels.leverage(**given, ridge=1.0, rope=rope(32), backend="reference")
    assert_close(got, expected, rtol=2e-2, atol=1e-3)


# likeness


@needs_triton
@every_dtype
@pytest.mark.parametrize(
    "t, d, g, block, padding", [(70, 32, 2, 16, (0, 13)), (300, 80, 4, 256, (0, 290)), (1, 16, 1, 4, (0, 0))]
)
def test_likeness(dtype: torch.dtype, t: int, d: int, g: int, block: int, padding: tuple[int, int]) -> None:
    given, sums = queries(t, d, g, padding, dtype), [normal(2, 2 * g, d) for _ in range(2)]
    exact = [x.double() for x in sums]
    got = kernels.likeness(*given, *sums, groups=g, block=block, backend="triton")
    wide = given[0].double(), *given[1:]
    expected = kernels.likeness(*wide, *exact, groups=g, block=block, backend="reference")
    assert_close(got.double(), expected, **EXACT)
    assert got.isinf().any(-1).sum(-1).tolist() == [[n] * 2 for n in padding]
    for mine, other in zip(sums, exact, strict=True):
        assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


def queries(
    t: int, d: int, g: int, padding: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Of two rows, positions, and tokens seen: the first has read 37 before, the second 5."""
    before, pads = torch.tensor([37, 5], device=DEVICE), torch.tensor(padding, device=DEVICE)
    columns = torch.arange(t, device=DEVICE) - pads[:, None]
    positions = torch.where(columns >= 0, columns + before[:, None], -1)
    return normal(2, 2 * g, t, d, dtype=dtype), positions, before + t - pads


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "reference"])
@settings(max_examples=10, deadline=None)
@given(t=st.integers(2, 60), cut=st.integers(1, 59), block=st.integers(2, 20))
def test_where_forwards_end_makes_no_difference(backend: str, t: int, cut: int, block: int) -> None:
    cut = min(cut, t - 1)
    q, positions, seen = queries(t, 16, 2, (0, 0))
    whole = [torch.zeros(2, 4, 16, device=DEVICE) for _ in range(2)]
    pieces = [x.clone() for x in whole]
    options = {"groups": 2, "block": block, "backend": backend}
    once = kernels.likeness(q, positions, seen, *whole, **options)
    first = kernels.likeness(q[:, :, :cut], positions[:, :cut], seen - t + cut, *pieces, **options)
    second = kernels.likeness(q[:, :, cut:], positions[:, cut:], seen, *pieces, **options)
    assert_close(torch.cat((first, second), dim=2), once, **EXACT)
    for mine, other in zip(pieces, whole, strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


# pick and turn


@needs_triton
@every_dtype
def test_pick(dtype: torch.dtype) -> None:
    b, h, g, size, t, d = 2, 3, 2, 5, 7, 24
    held, new = normal(b, h, size, d, dtype=dtype), normal(b, t, h * g, d, dtype=dtype).transpose(1, 2)
    order = torch.randint(-1, 40, (b, h, size), device=DEVICE)
    positions = torch.arange(20, 20 + t, device=DEVICE).expand(b, t)
    chosen = torch.randint(0, size + t * g, (b, h, size), device=DEVICE)
    got = kernels.pick(chosen, held, order, new, positions, backend="triton")
    expected = kernels.pick(chosen, held, order, new, positions, backend="reference")
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)
    for i, place in enumerate(chosen[1, 2].tolist()):
        token, head = divmod(place - size, g)
        vector = held[1, 2, place] if place < size else new[1, 2 * g + head, token]
        number = order[1, 2, place] if place < size else (20 + token) * g + head
        assert torch.equal(got[0][1, 2, i], vector) and got[1][1, 2, i] == number


@needs_triton
@every_dtype
@pytest.mark.parametrize("turned", ROPES[1:], ids=str)
def test_turn(dtype: torch.dtype, turned: Rope) -> None:
    x, by = normal(2, 3, 40, 24, dtype=dtype), torch.randint(-50, 3000, (2, 3, 40), device=DEVICE)
    got, expected = both(kernels.turn, {"x": x, "by": by, "rope": turned})
    assert got.dtype == dtype
    assert_close(got.double(), expected, rtol=RTOL[dtype], atol=max(ATOL[dtype], 2e-3))
    at = torch.randint(50, 90, (2, 3, 40), device=DEVICE)
    there = turned.rotate(turned.unrotate(x.double(), at), at + by)
    assert_close(expected, there, rtol=1e-3, atol=2e-3)


def test_what_does_not_fit_is_refused() -> None:
    x, by = normal(1, 2, 4, 8), torch.zeros(1, 2, 3, dtype=torch.long, device=DEVICE)
    with pytest.raises(UnsupportedInput, match="moved by"):
        kernels.turn(x, by, rope(8))
    with pytest.raises(UnsupportedInput, match="positions"):
        kernels.leverage(x, by, ridge=1.0)
    with pytest.raises(UnsupportedInput, match="seen"):
        kernels.likeness(x, by[0, :1], by[0, 0], x[:, :, 0], x[:, :, 0], groups=1, block=4)
    with pytest.raises(UnsupportedInput, match="order"):
        kernels.pick(by, x, by, x, by[0, :1])


# together


@needs_triton
def test_references_are_the_same_whatever_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two padded rows read in three pieces: what is remembered by kernels and by their references."""
    monkeypatch.setattr("keepkv.score.distinct.BLOCK", 5)
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("KEEPKV_KERNELS", backend)
        view = rows_of(together([row(2, slots=23, queries=23), row(3, slots=9, queries=9)]), [0, 1])
        view.queries = view.queries.float()
        view.state = {}
        for start, stop in ((0, 15), (15, 16), (16, 23)):
            piece = part_of_queries(view, start, stop)
            piece.state = view.state
            remember_distinct(piece, 30)
        found.append(view.state)
    assert (found[0][NAMES[1]][1] == EMPTY).sum(-1).tolist() == [12, 12]  # 30 places, 18 queries
    for name in NAMES:
        assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)
