"""Kernels compile for GPUs that are not here: the interpreter accepts programs that the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = set("_attend _attend_codes _attend_pages _combine _normalise _normalisers _received _assign _merge".split())
KERNELS |= {"_moments", "_norms"}
SHARED = 99 << 10  # bytes that one program may have on the smallest of these GPUs
SPILLED = 16  # bytes of a thread: a few kernels are up to four registers short


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (extra 'triton')")
@pytest.mark.parametrize(
    "capability, dtype, head_dim",
    [
        (90, "bfloat16", 128),
        pytest.param(80, "float16", 80, marks=pytest.mark.slow),
        pytest.param(80, "float32", 64, marks=pytest.mark.slow),
        pytest.param(90, "bfloat16", 256, marks=pytest.mark.slow),
        pytest.param(100, "bfloat16", 96, marks=pytest.mark.slow),
        pytest.param(120, "bfloat16", 128, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles(capability: int, dtype: str, head_dim: int, tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, Path(__file__).parent / "compile_kernels.py", str(capability), dtype, str(head_dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in rows} == KERNELS
    assert all(int(shared) <= SHARED and int(spilled) <= SPILLED for _, shared, _, spilled in rows), done.stdout
