"""What all kernels share: which one runs, what is refused, and that results repeat."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernel_slots import DEVICE, asked, masks, needs_triton, normal, rectangle

from keepkv import kernels
from keepkv.errors import KeepKVError, UnsupportedInput


@needs_triton
def test_the_same_in_every_run() -> None:
    slots, (leaving, targets) = rectangle(2, 2, 2, 300, 32, 32), masks(2, 2, 300)
    queries, group = normal(2, 4, 6, 32), torch.randint(0, 9, (2, 2, 300), device=DEVICE)
    runs = [
        (
            *kernels.decode_attention(**slots, scaling=0.2, weights=True, backend="triton"),
            kernels.window_scores(
                queries, asked(2, 6, 300), slots["keys"], slots["positions"], scaling=0.2, backend="triton"
            ),
            *kernels.nearest_key(slots["keys"], leaving, targets, backend="triton"),
            *kernels.merge_groups(slots["log_votes"], slots["keys"], slots["values"], group, 8, backend="triton"),
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
            kernels.decode_attention(**{**slots, "scaling": 1.0, **wrong})
    with pytest.raises(UnsupportedInput, match="masks must"):
        kernels.nearest_key(slots["keys"], slots["positions"] >= 0, slots["positions"][..., :3] >= 0)


def test_the_core_does_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import keepkv, keepkv.kernels, torch; x = torch.ones(1, 1, 16)\n"
    code += "assert keepkv.kernels.decode_attention(x, x[None], x[None], scaling=1.0).output.eq(1).all()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
