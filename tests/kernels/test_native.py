"""The kernel in C++: against float64, whatever the shape; what it refuses; how it is built."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from codes_at_random import codes_at_random, expanded, packed_ragged, packed_rectangle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_slots import DEVICE, INF, compare, every_dtype, normal, ragged, rectangle, segments, wide
from torch import Tensor
from torch.testing import assert_close

import keepkv
from keepkv import kernels
from keepkv.attention.attend import attend
from keepkv.attention.part import Part
from keepkv.errors import KeepKVError
from keepkv.kernels import native
from keepkv.kernels.codes import BITS
from keepkv.kernels.dispatch import computing
from keepkv.kernels.native import decode as cpp
from keepkv.kernels.segments import segments_of

pytestmark = [
    pytest.mark.skipif(isinstance(native.library(), str), reason=f"no kernels in C++: {native.library()}"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the slots are on a GPU"),
]
ALL = {"softcap": 5.0, "weights": True}
KINDS = [
    {"groups": 1, "zero": True},
    {"groups": 2, "zero": False},
    {"groups": 1, "zero": False, "levels": True},
    {"groups": 2, "zero": True, "levels": True, "turn": True},
]


def exactly(slots: dict[str, Any], **options: Any) -> kernels.Decoded:
    """In float64, over expanded slots."""
    exact = {name: wide(x) for name, x in options.items()}
    return kernels.decode_attention(**expanded(slots), **exact, backend="reference")


def check_codes(slots: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    options = {"scaling": 0.25, **options}
    compare(kernels.decode_packed(**slots, **options, backend="cpu"), exactly(slots, **options), dtype)


def check_floats(slots: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    options = {"scaling": 0.25, **options}
    exact = {name: wide(x) for name, x in {**slots, **options}.items()}
    got = kernels.decode_attention(**slots, **options, backend="cpu")
    compare(got, kernels.decode_attention(**exact, backend="reference"), dtype)


# Codes


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_codes(bits: int, kind: dict[str, Any]) -> None:
    keys = {"bits": bits, "width": 64, **kind}
    values = {**keys, "bits": 4 if bits == 8 else 8, "width": 96}
    slots = packed_rectangle(2, 2, 5, 300, keys, values)
    for options in ({}, {**ALL, "sinks": normal(10)}):
        check_codes(slots, **options)


@every_dtype
@pytest.mark.parametrize("width, groups", [(64, 1), (128, 4), (24, 1), (300, 1)])
def test_signed_codes(width: int, groups: int, dtype: torch.dtype) -> None:
    signed = {"bits": 8, "signed": True, "width": width, "groups": groups}
    check_codes(packed_rectangle(2, 2, 3, 300, {**signed, "zero": False}, signed, dtype), dtype, weights=True)
    ragged_ = packed_ragged([[5, 0], [200, 17]], {**signed, "zero": False}, {"bits": 4, "width": 32})
    check_codes(ragged_, weights=True)


@every_dtype
def test_dtypes(dtype: torch.dtype) -> None:
    kind = {"bits": 4, "width": 64, "turn": True}
    check_codes(packed_rectangle(1, 2, 2, 150, kind, kind, dtype), dtype, weights=True)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS), st.sampled_from(BITS), st.integers(1, 150), st.integers(1, 150), st.integers(0, 300),
    st.integers(1, 9),
)  # fmt: skip
def test_any_width(key_bits: int, value_bits: int, d: int, dv: int, slots: int, g: int) -> None:
    """Rows that fill a vector of the processor, that share one, that fill none: whatever lies in memory behind them."""
    keys, values = {"bits": key_bits, "width": d}, {"bits": value_bits, "width": dv}
    check_codes(packed_rectangle(1, 2, g, slots + 1, keys, values), scaling=d**-0.5)


@pytest.mark.parametrize("bits, width, groups", [(2, 128, 8), (4, 64, 8), (8, 32, 8), (8, 256, 4), (4, 24, 3)])
def test_groups(bits: int, width: int, groups: int) -> None:
    kind = {"bits": bits, "width": width, "groups": groups}
    check_codes(packed_rectangle(1, 2, 3, 70, kind, kind))


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("lengths", [[[5, 0], [3000, 17]], [[0, 0], [0, 1]], [[0]], [[128], [129]]], ids=str)
def test_ragged_codes(lengths: list[list[int]], gap: int) -> None:
    kind = {"bits": 4, "width": 16}
    slots = packed_ragged(lengths, kind, {**kind, "groups": 2}, gap=gap)
    check_codes(slots, weights=True, sinks=normal(slots["query"].shape[1]))
    got = kernels.decode_packed(**slots, scaling=0.25, backend="cpu")
    heads = slots["lengths"].repeat_interleave(2, 1) == 0
    assert (got.output[heads] == 0).all() and (got.lse[heads] == -INF).all()


@settings(max_examples=20, deadline=None)
@given(segments(3, 200), st.sampled_from([1, 3, 8]), st.sampled_from(BITS))
def test_any_ragged_shape(lengths: list[list[int]], g: int, bits: int) -> None:
    check_codes(packed_ragged(lengths, {"bits": bits, "width": 16}, {"bits": 4, "width": 32}, g=g), weights=True)


def test_lengths_of_a_rectangle() -> None:
    kind = {"bits": 4, "width": 16}
    count = torch.tensor([[20, 3], [0, 11]])
    check_codes(packed_rectangle(2, 2, 2, 20, kind, kind) | {"lengths": count}, weights=True)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_what_empty_slots_hold_does_not_matter(kind: torch.dtype) -> None:
    slots = packed_rectangle(2, 1, 2, 40, {"bits": 4, "width": 16}, {"bits": 8, "width": 16, "zero": False})
    slots["positions"] = slots["positions"].to(kind)
    expected = kernels.decode_packed(**slots, scaling=0.25, backend="cpu").output
    empty = slots["positions"] < 0
    slots["log_votes"][empty] = float("nan")
    for name in ("keys", "values"):
        slots[name].scale[empty] = float("nan")
    assert torch.equal(kernels.decode_packed(**slots, scaling=0.25, backend="cpu").output, expected)


def test_slots_with_room_around_them() -> None:
    """As in a store that grows: rows and heads far apart, slots side by side; and slots that do not lie so at all."""
    slots = packed_rectangle(3, 4, 2, 60, {"bits": 4, "width": 32}, {"bits": 2, "width": 64})
    part = {name: x if name == "query" else (x.each(lambda y: y[1:, 1:3, 5:50]) if name in ("keys", "values") else
            x[1:, 1:3, 5:50]) for name, x in slots.items()} | {"query": slots["query"][1:, :4]}  # fmt: skip
    check_codes(part, weights=True)
    turned = {name: x.each(lambda y: y.mT.contiguous().mT) if name in ("keys", "values") else x
              for name, x in part.items()}  # fmt: skip
    got, expected = (kernels.decode_packed(**x, scaling=0.25, backend="cpu").output for x in (turned, part))
    assert torch.equal(got, expected)


def test_one_answer_for_any_number_of_threads() -> None:
    slots = packed_ragged([[4000, 100], [2500, 1]], {"bits": 4, "width": 64}, {"bits": 2, "width": 64})
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(kernels.decode_packed(**slots, scaling=0.25, weights=True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_what_is_not_a_number_stays_so() -> None:
    slots = packed_rectangle(1, 2, 2, 20, {"bits": 4, "width": 16}, {"bits": 4, "width": 16})
    slots["query"][0, 1] = float("nan")
    got = kernels.decode_packed(**slots, scaling=0.25, backend="cpu").output
    assert got[0, 1].isnan().all() and got[0, [0, 2, 3]].isfinite().all()


def test_logits_that_only_the_largest_survives() -> None:
    slots = packed_rectangle(1, 1, 2, 700, {"bits": 4, "width": 16}, {"bits": 4, "width": 16})
    for size in (1e3, 1e6):
        check_codes(slots | {"query": size * slots["query"], "log_votes": None})


# Slots that are no codes


@every_dtype
def test_floats(dtype: torch.dtype) -> None:
    for d, dv, s in ((64, 64, 300), (20, 128, 70), (33, 7, 41)):
        check_floats(rectangle(2, 2, 3, s, d, dv, dtype), dtype, **ALL, sinks=normal(6))


@settings(max_examples=15, deadline=None)
@given(segments(2, 150), st.sampled_from([1, 3, 8]))
def test_any_ragged_shape_of_floats(lengths: list[list[int]], g: int) -> None:
    check_floats(ragged(lengths, g=g, gap=2), weights=True)


@every_dtype
def test_one_token_of_the_engine_takes_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged slots and the recent zone; what is joined was not rounded before."""
    slots = {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name != "log_votes" else x
             for name, x in ragged([[90, 40], [7, 130]], g=2).items()}  # fmt: skip
    place = segments_of(slots["keys"], slots["offsets"], slots["lengths"])
    history = Part(slots["keys"], slots["values"], slots["log_votes"], torch.zeros(len(slots["keys"])).int(), place)
    recent = Part(normal(2, 2, 5, 16).to(dtype), normal(2, 2, 5, 16).to(dtype), None, torch.zeros(2, 2, 5).int())
    query = slots["query"][:, :, None]
    calls, kernel = [], cpp.decode_attention
    monkeypatch.setattr(cpp, "decode_attention", lambda *given: calls.append(1) or kernel(*given))
    got = attend(query, [history, recent], 0.25).output
    assert calls == [1, 1]
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    plain = attend(query, [history, recent], 0.25).output
    assert calls == [1, 1]
    assert_close(got, plain, rtol=1.6e-2 if dtype == torch.bfloat16 else 2e-3, atol=2e-5)


# What it refuses


def test_it_is_taken_unless_something_stands_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"bits": 4, "width": 16}
    slots = packed_rectangle(1, 2, 2, 30, kind, kind)
    calls, kernel = [], cpp.decode_attention
    monkeypatch.setattr(cpp, "decode_attention", lambda *given: calls.append(1) or kernel(*given))
    kernels.decode_packed(**slots, scaling=0.25)
    assert len(calls) == 1
    kernels.decode_packed(**slots, scaling=0.25, backend="reference")
    query = slots["query"].clone().requires_grad_()
    kernels.decode_packed(**{**slots, "query": query}, scaling=0.25).output.sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    kernels.decode_packed(**slots, scaling=0.25)
    assert len(calls) == 1


def test_what_it_cannot_do_is_refused_only_where_it_was_asked_for() -> None:
    kind = {"bits": 4, "width": 16}
    slots = packed_rectangle(1, 2, 2, 30, kind, kind)
    for wrong, message in (
        ({"query": slots["query"].double()}, "queries in .*float32.*, not torch.float64"),
        ({"query": slots["query"].clone().requires_grad_()}, "no backward: wrap the call in torch.no_grad"),
        ({"keys": codes_at_random(1, 2, 30, **kind, groups=4)}, "4 groups of 16 codes of 4 bits: at most 8"),
        ({"values": codes_at_random(1, 2, 30, **kind, dtype=torch.float64)}, "scales and zeros are torch.float64"),
    ):
        given_ = {**slots, **wrong, "scaling": 0.25}
        with pytest.raises(KeepKVError, match=message):
            kernels.decode_packed(**given_, backend="cpu")
        got = kernels.decode_packed(**given_)
        assert_close(got.output.double(), exactly({**slots, **wrong}, scaling=0.25).output, rtol=2e-5, atol=2e-5)


# How it is built


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which nothing is, and a library that is looked for again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    native.library.cache_clear()


def compiler(folder: Path, body: str) -> str:
    """The command of a compiler that does what ``body`` says with its last argument, where it shall write."""
    script = folder / "compiler.sh"
    script.write_text(f'for out; do :; done\necho called >> "{folder}/calls"\n{body}\n')
    return f"sh {script}"


def test_it_is_built_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = native._built  # by whatever compiler is here, before
    monkeypatch.undo()
    real = built()
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "cache"))
    monkeypatch.setenv("CXX", compiler(elsewhere, f'cp "{real}" "$out"'))
    for _ in range(2):
        native.library.cache_clear()
        assert computing(DEVICE) == "C++ for one token, else plain torch"
    assert (elsewhere / "calls").read_text().split() == ["called"] * 2  # compiled and linked
    assert sorted(x.suffix for x in (elsewhere / "cache" / "keepkv").iterdir()) == ["", ".so"]  # the lock; the library


@pytest.mark.parametrize(
    "named, said",
    [
        ("sh -c 'echo decode.cpp:1: error: no such thing >&2; exit 1'", "decode.cpp:1: error: no such thing"),
        ("/nowhere/c++", "/nowhere/c++"),
        (None, "no C\\+\\+ compiler was found: install g\\+\\+, or name one in the variable CXX"),
    ],
)
def test_without_a_compiler_plain_torch_computes(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, said: str
) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    if named is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", named.replace("sh ", "/bin/sh ", 1))
    kind = {"bits": 4, "width": 16}
    slots = packed_rectangle(1, 2, 2, 30, kind, kind)
    compare(kernels.decode_packed(**slots, scaling=0.25), exactly(slots, scaling=0.25), torch.float32)
    assert re.match(f"plain torch, for the kernels in C\\+\\+ could not be .*{said}", computing(DEVICE))
    with pytest.raises(KeepKVError, match=f"the kernels in C\\+\\+ could not be built or loaded: .*{said}"):
        kernels.decode_packed(**slots, scaling=0.25, backend="cpu")


def test_a_cache_whose_slots_it_reads_has_it_built_and_says_so_once(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """When the cache is made, not in the middle of a reply. What is left out by name, or needs none, is not built."""
    model = zoo.model("llama")
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    keepkv.Cache(model, "adakv", 40, codec="int4")
    monkeypatch.setenv("KEEPKV_KERNELS", "auto")
    keepkv.Cache(model, "snapkv", 40)
    assert capfd.readouterr().err == ""
    for _ in range(2):
        keepkv.Cache(model, "snapkv", 40, codec="int4")
    assert capfd.readouterr().err == native.NOTICE + "\n"
    native.library.cache_clear()  # as in another process: it lies in the folder now
    keepkv.Cache(model, "adakv", 40)
    assert capfd.readouterr().err == ""


def test_it_shares_the_threads_of_torch() -> None:
    """No second OpenMP is loaded."""
    code = (
        "from keepkv.kernels import native; native.library();"
        "print(len({x.split()[-1] for x in open('/proc/self/maps') if 'omp' in x.split()[-1].rsplit('/')[-1]}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
