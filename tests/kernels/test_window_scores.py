"""Attention that slots receive from a window of queries: the kernel, its reference, and what scores take."""

from __future__ import annotations

import pytest
import torch
from kernel_slots import DEVICE, asked, both, every_dtype, needs_triton, normal, ragged, rectangle
from merge_views import make_view, padded
from torch.testing import assert_close

from keepkv import kernels
from keepkv.kernels.tolerance import EXACT
from keepkv.observe import attention


@needs_triton
@every_dtype
@pytest.mark.parametrize("b, h, g, s, d, w", [(2, 2, 4, 140, 32, 9), (1, 1, 1, 150, 80, 70), (1, 2, 8, 20, 96, 4)])
def test_window_scores(dtype: torch.dtype, b: int, h: int, g: int, s: int, d: int, w: int) -> None:
    slots = rectangle(b, h, g, s, d, d, dtype)
    window = {name: slots[name] for name in ("keys", "positions", "log_votes")}
    window |= {"queries": normal(b, h * g, w, d, dtype=dtype), "query_positions": asked(b, w, s)}
    for options in ({}, {"softcap": 5.0, "sinks": normal(h * g), "mean": False}, {"peak": True}):
        got, expected = both(kernels.window_scores, window, scaling=d**-0.5, **options)
        assert_close(got.double(), expected, **EXACT)
        assert (got[-1, :, :, : s // 4] == 0).all()  # empty
        if not options:  # the real queries of a row share one attention each
            assert_close(got.sum(-1), torch.ones(b, h, g, device=DEVICE))


@needs_triton
def test_window_scores_are_what_snapkv_takes() -> None:
    view = padded(make_view(groups=2, slots=30, queries=5, votes=True, softcap=6.0, sink_logits=torch.randn(4)), 4, 2)
    s = view.slots
    given = [x.float().to(DEVICE) if x.is_floating_point() else x.to(DEVICE) for x in (
        view.queries, view.query_positions, s.keys, s.positions, s.log_votes,
    )]  # fmt: skip
    assert view.sink_logits is not None
    options = {"scaling": view.scaling, "softcap": 6.0, "sinks": view.sink_logits.to(DEVICE)}
    got = kernels.window_scores(*given, **options, mean=False, backend="triton")
    assert_close(got.double().cpu(), attention.received(view, view.queries, view.query_positions), **EXACT)


@needs_triton
@pytest.mark.parametrize("gap", [0, 2])
def test_window_scores_ragged(gap: int) -> None:
    slots = ragged([[5, 0], [140, 17]], gap=gap)
    for name in ("query", "values"):
        del slots[name]
    positions = torch.randint(0, 160, slots["log_votes"].shape, device=DEVICE)
    slots |= {"positions": positions, "queries": normal(2, 4, 6, 16), "query_positions": asked(2, 6, 160)}
    got, expected = both(kernels.window_scores, slots, scaling=0.25)
    assert_close(got.double(), expected, **EXACT)


@needs_triton
def test_window_of_no_query_and_of_no_slot() -> None:
    none = torch.zeros(1, 0, dtype=torch.long, device=DEVICE)
    keys, positions = normal(1, 1, 4, 16), torch.arange(4, device=DEVICE)[None, None]
    for w, s in ((0, 4), (3, 0)):
        when = none if w == 0 else asked(1, 3, 9)
        given = (normal(1, 2, w, 16), when, keys[:, :, :s], positions[..., :s])
        assert torch.equal(
            kernels.window_scores(*given, scaling=1.0, backend="triton"), torch.zeros(1, 1, 2, s, device=DEVICE)
        )
