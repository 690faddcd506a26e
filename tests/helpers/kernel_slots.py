"""Slots to try kernels on, and how their answers are compared with the reference's in float64."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from keepkv.kernels.tolerance import ATOL, EXACT, RTOL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF = float("inf")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (extra 'triton')")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def rectangle(b: int, h: int, g: int, s: int, d: int, dv: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Query, slots and votes, of which some are huge and some say that a slot has none; empties first, as in a
    padded batch, and one at the end, as in a static store."""
    votes, positions = 2 * normal(b, h, s), torch.arange(s, device=DEVICE, dtype=torch.int32).repeat(b, h, 1)
    votes[..., s // 2], votes[..., s // 3] = -INF, 60.0
    positions[-1, :, : s // 4], positions[0, 0, -1] = -1, -1
    slots = {"keys": normal(b, h, s, d, dtype=dtype), "values": normal(b, h, s, dv, dtype=dtype)}
    return {"query": normal(b, h * g, d, dtype=dtype), **slots, "log_votes": votes, "positions": positions}


def ragged(lengths: list[list[int]], d: int = 16, g: int = 2, gap: int = 0) -> dict[str, Any]:
    """Query and slots of segments with ``gap`` slots of nobody, full of NaN, before each."""
    count = torch.tensor(lengths, device=DEVICE)
    ends = (count + gap).flatten().cumsum(0).view_as(count)
    total, (b, h) = int(ends[-1, -1]) if count.numel() else 0, count.shape
    keys, values, votes = normal(total, d), normal(total, d), normal(total)
    mine = torch.zeros(total, dtype=torch.bool, device=DEVICE)
    for end, n in zip(ends.flatten().tolist(), count.flatten().tolist(), strict=True):
        mine[end - n : end] = True
    for x in (keys, values, votes):
        x[~mine] = float("nan")
    where = {"offsets": ends - count, "lengths": count}
    return {"query": normal(b, h * g, d), "keys": keys, "values": values, "log_votes": votes, **where}


def asked(b: int, w: int, s: int) -> Tensor:
    """Positions of the last ``w`` of ``s`` tokens; the last row has three queries of padding."""
    positions = torch.arange(s - w, s, device=DEVICE).repeat(b, 1)
    positions[-1, : min(3, w - 1)] = -1
    return positions


def masks(b: int, h: int, s: int) -> tuple[Tensor, Tensor]:
    """Slots that leave, and targets: a third each; one head has no target, another nothing that leaves."""
    draw = torch.rand(b, h, s, device=DEVICE)
    leaving, targets = draw < 0.3, draw > 0.6
    targets[0, 0], leaving[-1, -1] = False, False
    return leaving, targets


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def both(function: Any, given: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """What the kernel says, and what the reference says in float64."""
    exact = {name: wide(x) for name, x in {**given, **options}.items()}
    return function(**given, **options, backend="triton"), function(**exact, backend="reference")


def compare(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Outputs by the tolerance of ``dtype``, log-sum-exps and weights as float32."""
    assert got.output.dtype == dtype
    assert_close(got.output.double(), expected.output, rtol=RTOL[dtype], atol=ATOL[dtype])
    assert_close(got.lse.double(), expected.lse, **EXACT)
    if expected.weights is not None:
        assert_close(got.weights.double(), expected.weights, **EXACT)


def segments(heads: int, longest: int) -> st.SearchStrategy[list[list[int]]]:
    """Lengths of the segments of one to three rows with up to ``heads`` heads."""
    return st.integers(1, heads).flatmap(
        lambda h: st.lists(st.lists(st.integers(0, longest), min_size=h, max_size=h), min_size=1, max_size=3)
    )
