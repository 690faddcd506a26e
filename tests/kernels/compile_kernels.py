"""Compile every kernel for a GPU that need not be here, and print what each needs.

    python tests/kernels/compile_kernels.py CAPABILITY [DTYPE] [HEAD_DIM]

A line for each specialisation: kernel, bytes of shared memory, registers of a thread, bytes spilled. Launches are made
by the very functions that launch them on a GPU, and stop short of running.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from keepkv.core.rope import Rope
from keepkv.kernels.assign import triton as assign
from keepkv.kernels.codes import BITS, Codes
from keepkv.kernels.decode import triton as decode
from keepkv.kernels.leverage import triton as leverage
from keepkv.kernels.logits import KeySlots
from keepkv.kernels.merge import triton as merge
from keepkv.kernels.packed import triton as packed
from keepkv.kernels.paged import PagedSlots
from keepkv.kernels.paged import triton as paged
from keepkv.kernels.segments import Segments, segments_of
from keepkv.kernels.window import triton as window

compiled: list[tuple[str, Any]] = []


class Offline:
    """What Triton asks of a driver on the way to machine code."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stop_short(capability: int) -> None:
    """From here on, launches compile and go no further."""
    driver.set_active(Offline(capability))
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only


def launch_all(dtype: torch.dtype, d: int) -> None:
    """Every kernel, with all of its options and with none."""
    b, h, g, s = 1, 2, 4, 1000
    query, keys, values = (torch.zeros(*shape, dtype=dtype) for shape in ((b, h * g, d), (b, h, s, d), (b, h, s, d)))
    votes, positions = torch.zeros(b, h, s), torch.zeros(b, h, s, dtype=torch.int32)
    flat = [x.flatten(0, 2) for x in (keys, values, votes)]
    rectangle = segments_of(keys)
    segments = segments_of(flat[0], torch.zeros(b, h, dtype=torch.int64), torch.full((b, h), s), s)
    full = KeySlots(keys, votes, positions, rectangle, 0.1, 30.0, torch.zeros(h * g))
    decode.decode_attention(query, full, values, True)
    decode.decode_attention(query, KeySlots(keys, None, None, rectangle, 0.1, None, None), values, False)
    decode.decode_attention(query, KeySlots(flat[0], flat[2], None, segments, 0.1, None, None), flat[1], True)
    packed_all(query, full, segments)
    paged_all(query, keys)
    queries, asked = query[:, :, None].repeat(1, 1, 32, 1), torch.zeros(b, 32, dtype=torch.int64)
    window.window_scores(queries, asked, full, asked[:, 0], True)
    ragged = KeySlots(flat[0], None, positions.flatten(), segments, 0.1, None, None)
    window.window_scores(queries, asked, ragged, asked[:, 0], False)
    drawn = torch.zeros(b, h, 8, dtype=torch.long)
    for rope in (None, Rope(torch.ones(d // 2)), Rope(torch.ones(d // 4), 1.2, True)):
        for at in (None, drawn):
            leverage.key_leverage(keys, positions, votes if rope is None else None, 1.0, rope, at)
    half = torch.arange(s).expand(b, h, s) < s // 2
    assign.nearest_key(keys, half, ~half)
    merge.merge_groups(votes, keys, values, positions.long(), 5)
    merge.merge_groups(votes, None, values, positions.long(), 5)


def paged_all(query: torch.Tensor, keys: torch.Tensor) -> None:
    """Attention over blocks of 16 slots, of one layer and of two that are packed together."""
    h, d = keys.shape[1], keys.shape[-1]
    one = torch.zeros(1, dtype=torch.int32)
    for layers, votes, softcap in ((1, None, None), (2, torch.zeros(2, 64, h, 16), 30.0)):
        kv = torch.zeros(layers, 64, h, 16, d, dtype=keys.dtype)
        table, counts = torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, layers * h, dtype=torch.int64)
        slots = PagedSlots(kv, kv, votes, table, one, one, counts, one, one.bool(), 1000, layers - 1)
        paged.paged_attention(query, slots, 0.1, softcap, None if votes is None else torch.zeros(query.shape[1]))


def packed_all(query: torch.Tensor, full: KeySlots, segments: Segments) -> None:
    """Attention over codes: each number of bits ragged, as history lies; groups and levels in rectangles."""
    b, h, s, d = full.keys.shape

    def codes(bits: int, groups: int = 1, levels: torch.Tensor | None = None) -> Codes:
        scale = torch.zeros(b, h, s, groups, dtype=query.dtype)
        packed_ = torch.zeros(b, h, s, d * bits // 8, dtype=torch.uint8)
        return Codes(packed_, scale, None if levels is not None else scale.clone(), bits, d, levels)

    for bits in BITS:
        flat = codes(bits).each(lambda x: x.flatten(0, 2))
        slots = KeySlots(flat.codes, torch.zeros(b * h * s), None, segments, 0.1, None, None)
        packed.decode_packed(query, slots, flat, flat, False)
    for keys, values in ((codes(2, d // 16), codes(4, d // 16)), (codes(4, 1, torch.zeros(16)), codes(2))):
        packed.decode_packed(query, full._replace(keys=keys.codes), keys, values, True)


def needs(kernel: Any) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, from the machine code itself."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


if __name__ == "__main__":
    given = sys.argv[1:]
    stop_short(int(given[0]))
    launch_all(getattr(torch, given[1] if given[1:] else "bfloat16"), int(given[2]) if given[2:] else 128)
    for name, kernel in compiled:
        print(name, kernel.metadata.shared, *needs(kernel))
