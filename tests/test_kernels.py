"""Every kernel against its reference in float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import keepkv
import zoo
from keepkv import kernels
from keepkv.attention.reference import Part, attend
from keepkv.errors import KeepKVError, UnsupportedInput
from keepkv.kernels.tolerance import ATOL, EXACT, RTOL
from keepkv.reduce.forms import groups
from keepkv.score import attention
from keepkv.slots import LayerView, Slots
from keepkv.store.flat import FlatStore
from merge_views import make_view, padded
from running import batch, generate

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


# decode


@needs_triton
@every_dtype
@pytest.mark.parametrize(
    "b, h, g, s, d, dv",
    [(2, 2, 4, 300, 32, 32), (1, 2, 1, 70, 80, 48), (2, 1, 8, 40, 96, 96), (1, 1, 1, 33, 256, 16)],
)
def test_decode(dtype: torch.dtype, b: int, h: int, g: int, s: int, d: int, dv: int) -> None:
    slots = rectangle(b, h, g, s, d, dv, dtype)
    for options in ({}, {"softcap": 5.0, "sinks": normal(h * g), "weights": True}):
        compare(*both(kernels.decode, slots, scaling=d**-0.5, **options), dtype)


@needs_triton
def test_decode_says_what_the_engine_says() -> None:
    slots = rectangle(2, 2, 2, 50, 16, 8)
    sinks, common = normal(4), {"scaling": 0.3, "softcap": 8.0}
    got = kernels.decode(**slots, sinks=sinks, **common, weights=True, backend="triton")
    parts = [Part(*(slots[name] for name in Part._fields))]
    assert_close(got.output[:, :, None], attend(slots["query"][:, :, None], parts, sinks=sinks, **common))
    view = LayerView(
        Slots(*(slots[name] for name in ("keys", "values", "log_votes", "positions"))),
        slots["query"][:, :, None], torch.full((2, 1), 99, device=DEVICE), torch.full((2,), 100, device=DEVICE),
        **common, sinks=sinks,
    )  # fmt: skip
    weights = attention.weights(view, view.queries, view.query_positions)
    assert got.weights is not None
    assert_close(got.weights, weights[:, :, :, 0])


@needs_triton
def test_one_token_steps_of_the_engine_use_the_kernel_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from keepkv.kernels import decode_triton

    slots = rectangle(1, 2, 2, 20, 16, 16)
    part = Part(*(slots[name] for name in Part._fields))
    calls, kernel = [], decode_triton.decode
    monkeypatch.setattr(decode_triton, "decode", lambda *given: calls.append(1) or kernel(*given))
    expected = attend(slots["query"][:, :, None], [part], 0.25)
    ours = len(calls)
    monkeypatch.setenv("KEEPKV_KERNELS", "triton")
    assert_close(attend(slots["query"][:, :, None], [part], 0.25), expected)
    assert (ours, len(calls)) == ((0, 1) if DEVICE.type == "cpu" else (1, 2))
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    attend(slots["query"][:, :, None], [part], 0.25)
    assert len(calls) == ours + 1


@needs_triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the zoo's models are on the CPU")
@pytest.mark.parametrize("arch, method", [("llama", "keepkv"), ("gpt-oss", "keepkv"), ("deepseek-v3", "snapkv")])
def test_generation_by_the_kernel(arch: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.model(arch), batch((30, 17))  # grouped heads; sinks; one latent for keys and values
    run = [generate(model, inputs, keepkv.Cache(model, method, 12, sinks=2, window=4), new=3)]
    monkeypatch.setenv("KEEPKV_KERNELS", "triton")
    run.append(generate(model, inputs, keepkv.Cache(model, method, 12, sinks=2, window=4), new=3))
    assert torch.equal(run[0].sequences, run[1].sequences)
    assert_close(run[1].scores_, run[0].scores_, rtol=1e-4, atol=1e-4)
    assert not torch.equal(run[1].scores_, run[0].scores_)  # it was the kernel


@needs_triton
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("lengths", [[[5, 0], [300, 17]], [[0, 0], [0, 1]], [[1], [129], [128]]], ids=str)
def test_decode_ragged(lengths: list[list[int]], gap: int) -> None:
    slots = ragged(lengths, gap=gap)
    got, expected = both(kernels.decode, slots, scaling=0.25, weights=True, sinks=normal(slots["query"].shape[1]))
    compare(got, expected, torch.float32)
    heads = slots["lengths"].repeat_interleave(2, 1) == 0
    assert (got.output[heads] == 0).all() and (got.lse[heads] == -INF).all()


@needs_triton
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 2).flatmap(
        lambda h: st.lists(st.lists(st.integers(0, 70), min_size=h, max_size=h), min_size=1, max_size=3)
    ),
    st.sampled_from([1, 3, 8]),
)
def test_decode_any_ragged_shape(lengths: list[list[int]], g: int) -> None:
    compare(*both(kernels.decode, ragged(lengths, g=g), scaling=0.25, weights=True), torch.float32)


@needs_triton
def test_decode_reads_a_flat_store_as_it_lies() -> None:
    slots = rectangle(2, 2, 2, 40, 16, 16)
    positions = slots["positions"].masked_fill(torch.rand(2, 2, 40, device=DEVICE) < 0.3, -1)
    positions[1, 0] = -1
    store = FlatStore({})
    store.load(Slots(slots["keys"], slots["values"], slots["log_votes"], positions))
    body = store.body
    got = kernels.decode(
        slots["query"], body["keys"], body["values"], body["log_votes"], body["positions"], scaling=0.25,
        offsets=store._offsets(), lengths=body["lengths"], longest=store._longest, backend="triton",
    )  # fmt: skip
    expected = kernels.decode(**(slots | {"positions": positions}), scaling=0.25, backend="reference")
    assert_close(got.output, expected.output)
    assert_close(got.lse, expected.lse)


@needs_triton
def test_lengths_of_a_rectangle_say_the_same_as_empties_first() -> None:
    slots = rectangle(2, 2, 2, 90, 16, 16)
    lengths = torch.tensor([[90, 3], [0, 41]], device=DEVICE)
    first = torch.arange(90, device=DEVICE) >= 90 - lengths[..., None]
    positions = torch.where(first, 7, -1)
    by_positions = kernels.decode(**(slots | {"positions": positions}), scaling=0.25, weights=True, backend="triton")
    del slots["positions"]
    got, expected = both(kernels.decode, slots, scaling=0.25, weights=True, lengths=lengths)
    compare(got, expected, torch.float32)
    compare(got, kernels.Decoded(*map(wide, by_positions)), torch.float32)


@needs_triton
def test_empty_slots_are_never_read() -> None:
    slots = rectangle(2, 1, 2, 40, 16, 16)
    expected = kernels.decode(**slots, scaling=0.25, backend="triton").output
    for name in ("keys", "values", "log_votes"):
        slots[name][slots["positions"] < 0] = float("nan")
    assert torch.equal(kernels.decode(**slots, scaling=0.25, backend="triton").output, expected)


@needs_triton
def test_decode_where_nothing_is_seen() -> None:
    slots = rectangle(1, 2, 2, 20, 16, 16)
    slots["positions"][:, 0] = -1
    slots["log_votes"][:, 1] = -INF
    got = kernels.decode(**slots, scaling=0.25, sinks=normal(4), weights=True, backend="triton")
    assert got.weights is not None
    assert (got.output == 0).all() and (got.weights == 0).all() and (got.lse == -INF).all()


@needs_triton
def test_votes_are_copies() -> None:
    query, keys, values = normal(1, 2, 16), normal(1, 1, 9, 16), normal(1, 1, 9, 16)
    times = torch.tensor([1, 4, 1, 1, 2, 7, 1, 1, 3], device=DEVICE)
    voted = kernels.decode(query, keys, values, times.float().log()[None, None], scaling=0.5, backend="triton")
    copies = [x.repeat_interleave(times, 2) for x in (keys, values)]
    assert_close(voted.output, kernels.decode(query, *copies, scaling=0.5, backend="triton").output)


@needs_triton
@pytest.mark.parametrize("size", [200.0, 0.0])
def test_decode_of_large_and_of_equal_logits(size: float) -> None:
    slots = rectangle(1, 1, 2, 80, 16, 16)
    slots["query"] *= 0
    slots["query"][..., 0] = 1
    slots["keys"][..., 0] = torch.linspace(-size, size, 80, device=DEVICE)
    compare(*both(kernels.decode, slots, scaling=1.0, weights=True), torch.float32)


@needs_triton
def test_strides_do_not_matter() -> None:
    slots = rectangle(2, 2, 2, 40, 16, 24)
    expected = kernels.decode(**slots, scaling=0.25, backend="triton").output
    grown = {name: torch.cat((x, x), 2)[:, :, :40] for name, x in slots.items() if name != "query"}  # a store's slack
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in slots.items() if x.dim() == 4}
    askew = {name: x.transpose(2, 3).contiguous().transpose(2, 3) for name, x in slots.items() if x.dim() == 4}
    for other in (grown, turned, askew):
        assert torch.equal(kernels.decode(**(slots | other), scaling=0.25, backend="triton").output, expected)


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
    for options in ({}, {"softcap": 5.0, "sinks": normal(h * g), "mean": False}):
        got, expected = both(kernels.window_scores, window, scaling=d**-0.5, **options)
        assert_close(got.double(), expected, **EXACT)
        assert (got[-1, :, :, : s // 4] == 0).all()  # empty
        if not options:  # the real queries of a row share one attention each
            assert_close(got.sum(-1), torch.ones(b, h, g, device=DEVICE))


@needs_triton
def test_window_scores_are_what_snapkv_takes() -> None:
    view = padded(make_view(groups=2, slots=30, queries=5, votes=True, softcap=6.0, sinks=torch.randn(4)), 4, 2)
    s = view.slots
    given = [x.float().to(DEVICE) if x.is_floating_point() else x.to(DEVICE) for x in (
        view.queries, view.query_positions, s.keys, s.positions, s.log_votes,
    )]  # fmt: skip
    assert view.sinks is not None
    options = {"scaling": view.scaling, "softcap": 6.0, "sinks": view.sinks.to(DEVICE)}
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


# compact


def fields(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    keys = (50 * normal(*shape, 24)).to(dtype)
    positions = torch.arange(math.prod(shape), device=DEVICE, dtype=torch.int32).view(shape)
    return {"keys": keys, "values": normal(*shape, 5), "log_votes": normal(*shape), "positions": positions}


def moved(before: Tensor, after: Tensor, keep: Tensor) -> bool:
    """Whether ``after`` (S,…) starts with the kept of ``before``, in order."""
    kept = before[keep]
    return torch.equal(after[: len(kept)], kept)


@needs_triton
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 300), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_compact(s: int, share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(s)
    before, keep = fields(2, 1, s, dtype=dtype), torch.rand(2, 1, s, device=DEVICE) < share
    for backend in ("triton", "reference"):
        after = {name: torch.cat((x, x), 2)[:, :, :s] for name, x in before.items()}  # strided, as in a store's slack
        counts = kernels.compact(after, keep, backend=backend)
        assert torch.equal(counts, keep.sum(-1))
        for b in range(2):
            assert all(moved(x[b, 0], after[name][b, 0], keep[b, 0]) for name, x in before.items())
            assert (after["positions"][b, 0, counts[b, 0] :] == -1).all()


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compact_segments_where_they_lie(backend: str) -> None:
    offsets, lengths = torch.tensor([[0, 200], [203, 207]], device=DEVICE), torch.tensor([[150, 0], [4, 9]])
    lengths = lengths.to(DEVICE)
    before, keep = fields(220), torch.rand(220, device=DEVICE) < 0.5
    after = {name: x.clone() for name, x in before.items()}
    counts = kernels.compact(after, keep, offsets=offsets, lengths=lengths, backend=backend)
    outside = torch.ones(220, dtype=torch.bool)
    for start, n, count in zip(offsets.flatten(), lengths.flatten(), counts.flatten(), strict=True):
        part = slice(int(start), int(start + n))
        outside[part] = False
        assert count == keep[part].sum()
        assert all(moved(x[part], after[name][part], keep[part]) for name, x in before.items())
        assert (after["positions"][part][int(count) :] == -1).all()
    assert all(torch.equal(after[name][outside], x[outside]) for name, x in before.items())
    # What is left is attended to with the same offsets and the new lengths.
    query, where = normal(2, 2, 24), {"offsets": offsets, "scaling": 0.2, "backend": backend}
    got = kernels.decode(query, after["keys"], after["values"], after["log_votes"], lengths=counts, **where)
    votes = before["log_votes"].masked_fill(~keep, -INF)
    expected = kernels.decode(query, before["keys"], before["values"], votes, lengths=lengths, **where)
    assert_close(got.output, expected.output)


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
    with pytest.raises(UnsupportedInput, match="positions are needed"):
        kernels.compact({"keys": slots["keys"]}, slots["positions"] >= 0)
    with pytest.raises(UnsupportedInput, match="masks must"):
        kernels.assign(slots["keys"], slots["positions"] >= 0, slots["positions"][..., :3] >= 0)


def test_the_core_does_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import keepkv, keepkv.kernels, torch; x = torch.ones(1, 1, 16)\n"
    code += "assert keepkv.kernels.decode(x, x[None], x[None], scaling=1.0).output.eq(1).all()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
