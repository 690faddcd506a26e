"""Every kernel against its reference in float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_slots import DEVICE, INF, both, every_dtype, needs_triton, normal, ragged, rectangle
from merge_views import make_view, padded
from torch import Tensor
from torch.testing import assert_close

from keepkv import kernels
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.kernels.tolerance import EXACT
from keepkv.observe import attention
from keepkv.reduce.forms import groups

# window_scores


def asked(b: int, w: int, s: int) -> Tensor:
    """Positions of the last ``w`` of ``s`` tokens; the last row has three queries of padding."""
    positions = torch.arange(s - w, s, device=DEVICE).repeat(b, 1)
    positions[-1, : min(3, w - 1)] = -1
    return positions


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


# assign


def masks(b: int, h: int, s: int) -> tuple[Tensor, Tensor]:
    """Slots that leave, and targets: a third each; one head has no target, another nothing that leaves."""
    draw = torch.rand(b, h, s, device=DEVICE)
    leaving, targets = draw < 0.3, draw > 0.6
    targets[0, 0], leaving[-1, -1] = False, False
    return leaving, targets


@needs_triton
@every_dtype
@pytest.mark.parametrize("b, h, s, d", [(2, 2, 300, 32), (1, 2, 60, 80)])
def test_assign(dtype: torch.dtype, b: int, h: int, s: int, d: int) -> None:
    keys, (leaving, targets) = normal(b, h, s, d, dtype=dtype), masks(b, h, s)
    into, cosine = kernels.assign(keys, leaving, targets, backend="triton")
    expected_into, expected = kernels.assign(keys.double(), leaving, targets, backend="reference")
    assert_close(cosine.double(), expected, **EXACT)
    found = expected_into >= 0
    assert torch.equal(into >= 0, found) and targets.gather(-1, into.clamp(min=0))[found].all()
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    chosen = (unit * unit.gather(2, into.clamp(min=0)[..., None].expand_as(unit))).sum(-1)
    assert_close(chosen[found], expected[found], **EXACT)  # another target only where the two are as near
    assert (into == expected_into).double().mean() > 0.99


@needs_triton
def test_of_equal_cosines_the_oldest_wins() -> None:
    keys, targets = normal(1, 1, 200, 32), torch.ones(1, 1, 200, dtype=torch.bool, device=DEVICE)
    keys[:, :, [30, 40, 190]] = keys[:, :, [7]]
    leaving = torch.zeros_like(targets)
    leaving[..., [10, 11]], targets[..., [7, 10, 11]] = True, False
    keys[:, :, 10] = keys[:, :, 7] * 2  # the same direction as three targets, in three tiles
    keys[:, :, 11] = 0  # no direction at all
    into, cosine = kernels.assign(keys, leaving, targets, backend="triton")
    assert into[0, 0, 10] == 30 and into[0, 0, 11] == 0
    assert cosine[0, 0, 11] == 0 and (into[~leaving] == -1).all()


# merge_segments


@needs_triton
@every_dtype
@pytest.mark.parametrize("d, dv", [(32, 32), (80, 24)])
def test_merge_segments(dtype: torch.dtype, d: int, dv: int) -> None:
    b, h, s, size = 2, 2, 90, 6
    u, group = 5 * normal(b, h, s), torch.randint(0, size + 1, (b, h, s), device=DEVICE)
    group[0, 0], group[0, 1], group[1, 0, :9] = 2, size, 3  # all in one; none in any
    u[1, 1, ::3], u[1, 1][group[1, 1] == 4] = -INF, -INF  # members without mass, and a group without any
    keys, values = normal(b, h, s, d, dtype=dtype), normal(b, h, s, dv, dtype=dtype)
    given = {"u": u, "keys": keys, "values": values, "group": group, "size": size}
    got, expected = both(kernels.merge_segments, given)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.double(), theirs, **EXACT)  # no half precision on the way, whatever came in
    form = groups(u.double(), torch.zeros_like(u), group, size)
    assert_close(got.log_mass.double(), form.log_mass, **EXACT)
    assert_close(got.values.double(), form.mean(values.double()), **EXACT)
    only = kernels.merge_segments(**(given | {"keys": None}), backend="triton")
    assert only.keys is None and torch.equal(only.values, got.values)


@needs_triton
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50), st.integers(0, 9), st.integers(0, 5))
def test_merge_segments_of_any_size(s: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    group = torch.randint(0, size + 1, (1, 2, s), device=DEVICE)
    given = {"u": normal(1, 2, s), "keys": normal(1, 2, s, 16), "values": normal(1, 2, s, 16), "group": group}
    got, expected = both(kernels.merge_segments, given, size=size)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours.double(), theirs, **EXACT)


# all of them


@needs_triton
def test_the_same_in_every_run() -> None:
    slots, (leaving, targets) = rectangle(2, 2, 2, 300, 32, 32), masks(2, 2, 300)
    queries, group = normal(2, 4, 6, 32), torch.randint(0, 9, (2, 2, 300), device=DEVICE)
    runs = [
        (
            *kernels.decode(**slots, scaling=0.2, weights=True, backend="triton"),
            kernels.window_scores(
                queries, asked(2, 6, 300), slots["keys"], slots["positions"], scaling=0.2, backend="triton"
            ),
            *kernels.assign(slots["keys"], leaving, targets, backend="triton"),
            *kernels.merge_segments(slots["log_votes"], slots["keys"], slots["values"], group, 8, backend="triton"),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_on_the_cpu_the_reference_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 16)
    assert kernels.choose(None, x) == kernels.choose("auto", x) == kernels.choose("reference", x) == "reference"
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    assert kernels.choose(None, x) == "reference"
    monkeypatch.setenv("KEEPKV_KERNELS", "fast")
    with pytest.raises(KeepKVError, match="unknown kernel backend 'fast'"):
        kernels.choose(None, x)


@needs_triton
def test_what_triton_cannot_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(2, 16)
    assert kernels.choose("triton", x) == "triton"
    for tensors, reason in (
        ([x.double()], "float64"),
        ([x, x.half()], "differ in dtype"),
        ([torch.zeros(1, 512)], "up to 256, not 512"),
        ([x.clone().requires_grad_()], "no backward"),
    ):
        with pytest.raises(KeepKVError, match=reason):
            kernels.choose("triton", *tensors)
    assert kernels.choose("triton", x.double(), computes=False) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(KeepKVError, match="on cpu, not on a CUDA device"):
        kernels.choose("triton", x)


def test_what_does_not_fit_together_is_refused() -> None:
    slots = rectangle(1, 2, 2, 8, 16, 16)
    for wrong, message in (
        ({"query": normal(1, 3, 16)}, "multiple of heads"),
        ({"values": slots["values"][:, :, :5]}, "values for slots"),
        ({"sinks": normal(3)}, "as many sinks"),
        ({"offsets": torch.zeros(1, 2)}, "rectangle"),
        ({"lengths": torch.zeros(1, 3)}, "2 heads"),
    ):
        with pytest.raises(UnsupportedInput, match=message):
            kernels.decode(**{**slots, "scaling": 1.0, **wrong})
    with pytest.raises(UnsupportedInput, match="masks must"):
        kernels.assign(slots["keys"], slots["positions"] >= 0, slots["positions"][..., :3] >= 0)


def test_the_core_does_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import keepkv, keepkv.kernels, torch; x = torch.ones(1, 1, 16)\n"
    code += "assert keepkv.kernels.decode(x, x[None], x[None], scaling=1.0).output.eq(1).all()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
