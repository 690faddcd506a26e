"""Ways to attend over packed slots on a CPU, beside attention over exact ones: one token, one layer, in turns.

    python -m benchmarks.packed.candidates [--threads 1] [--rounds 9] [--slots 2048 16384 65536] [--out FILE]
    python -m benchmarks.packed.candidates --again  # measures nothing: the table of the rows

Every round calls each candidate once, in an order that changes, and its time is divided by that of torch's fused
attention over bfloat16 slots in the same round: a busy machine slows both. A row has the median of these ratios and its
quartiles. One thread is timed by the processor time that it gets, so what takes turns with it does not count.
``integer_kernels`` need layouts of their own (see ``Layouts``), so they show what torch has, not what a cache can use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keepkv import kernels
from keepkv.kernels.codes import Codes, pack
from keepkv.measure.environment import revision, versions

RESULTS = Path(__file__).parent / "results" / "candidates.jsonl"
WARM = 2
GROUP = 256  # slots with one scale, for the integer kernels
Candidate = Callable[[], Tensor]  # the output (H·G,D)


@dataclass(frozen=True)
class Shape:
    """KV heads H, query heads of each G, dimension D, slots S of one row."""

    heads: int
    groups: int
    dim: int
    slots: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slots", type=int, nargs="*", default=[2048, 16384, 65536])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="only print the table of the rows that there are")
    a = parser.parse_args()
    if a.again:
        return print(table([json.loads(line) for line in a.out.read_text(encoding="utf-8").splitlines()]))
    torch.set_num_threads(a.threads)
    made = {"cpu": processor(), "threads": a.threads, "versions": versions(), "revision": revision()}
    with a.out.open("w", encoding="utf-8") as file, torch.inference_mode():
        for slots in a.slots:
            for heads, groups, dim in ((8, 4, 64), (8, 2, 64), (4, 4, 128), (4, 2, 128)):
                for row in measured(Shape(heads, groups, dim, slots), a.rounds):
                    print(json.dumps(row), flush=True)
                    file.write(json.dumps(row | made) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the ratio to fused attention over bfloat16 slots, and nanoseconds for a slot and KV head."""
    shapes = sorted({(row["slots"], row["dim"], row["groups"], row["heads"]) for row in rows})
    heads = [f"{h} × {g} × {d}, {s // 1024}k" for s, d, g, h in shapes]
    lines = [
        f"| KV heads × query heads of each × D, slots | {' | '.join(heads)} |",
        "|---" + "|--:" * len(shapes) + "|",
    ]
    for name in dict.fromkeys(row["candidate"] for row in rows):
        found = {(x["slots"], x["dim"], x["groups"], x["heads"]): x for x in rows if x["candidate"] == name}
        cells = [f"{found[x]['ratio']:.2f} ({found[x]['ns_per_slot_and_head']:.0f})" for x in shapes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(shape: Shape, rounds: int) -> Iterator[dict[str, object]]:
    """Rows of every candidate on one shape."""
    torch.manual_seed(0)
    torch.compiler.reset()  # it gives up a function that was compiled for many shapes
    h, g, d, s = shape.heads, shape.groups, shape.dim, shape.slots
    query = torch.randn(1, h * g, d) / d**0.25
    keys, values = torch.randn(1, h, s, d), torch.randn(1, h, s, d)
    found = dict(candidates(query, keys, values))
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for round_ in range(WARM + rounds):
        for name in random.Random(round_).sample(list(found), len(found)):
            started = clock()
            found[name][0]()
            if round_ >= WARM:
                seconds[name].append(clock() - started)
    exact = attention(query.double(), keys.double(), values.double())
    floor = memory_floor()
    base = seconds["fused, bfloat16"]
    for name, (call, bits) in found.items():
        ratios = [x / y for x, y in zip(seconds[name], base, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        yield {
            "candidate": name, "heads": h, "groups": g, "dim": d, "slots": s,
            "ns_per_slot_and_head": round(median(seconds[name]) / s / h * 1e9, 2),
            "ns_least": round(min(seconds[name]) / s / h * 1e9, 2),
            "ns_floor": round(2 * (d * bits / 8 + (4 if bits <= 8 else 0)) * floor * 1e9, 2),
            "ratio": round(median(ratios), 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3),
            "error": float(f"{(call().double() - exact).norm() / exact.norm():.2g}"),
        }  # fmt: skip


def candidates(query: Tensor, keys: Tensor, values: Tensor) -> Iterator[tuple[str, tuple[Candidate, float]]]:
    """Each with the bits of a number that it reads."""
    h, d = keys.shape[1], keys.shape[-1]
    for dtype in (torch.bfloat16, torch.float32):
        k, v, q = keys.to(dtype), values.to(dtype), query.to(dtype).view(1, h, -1, d)
        name, bits = str(dtype).removeprefix("torch."), 8 * dtype.itemsize
        yield f"fused, {name}", (partial(fused, q, k, v, torch.zeros(1, h, 1, k.shape[2], dtype=dtype)), bits)
        yield f"C++, {name}", (partial(exact_kernel, query, k, v), bits)
    for bits in (8, 4, 2):
        k, v = coded(keys, bits), coded(values, bits)
        yield f"C++, {bits} bits", (partial(packed_kernel, query, k, v, "cpu"), bits)
        yield f"torch in tiles, {bits} bits", (partial(packed_kernel, query, k, v, "reference"), bits)
        if bits == 4:
            yield "torch.compile, 4 bits", (partial(torch.compile(unpack_and_sum, dynamic=False), query, k, v), bits)
            yield "integer kernels, 4 bits", (partial(integer_kernels, query, Layouts.of(k, v)), bits)


def exact_kernel(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return kernels.decode_attention(query, keys, values, scaling=1.0, backend="cpu").output[0]


def packed_kernel(query: Tensor, keys: Codes, values: Codes, backend: str) -> Tensor:
    return kernels.decode_packed(query, keys, values, scaling=1.0, backend=backend).output[0]


def fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """As keepkv attends over a rectangle: the query heads of a KV head are queries of one head."""
    return scaled_dot_product_attention(query, keys, values, mask, scale=1.0).flatten(0, 2)


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    share = (query.view(*keys.shape[:2], -1, keys.shape[-1]) @ keys.mT).softmax(-1)
    return (share @ values).flatten(0, 2)


def coded(x: Tensor, bits: int) -> Codes:
    """Uniform codes, one float16 scale and zero a vector."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = low.half()
    code = ((x - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return Codes(pack(code, bits), scale, zero, bits, x.shape[-1])


def unpack_and_sum(query: Tensor, keys: Codes, values: Codes) -> Tensor:
    """What inductor is given: halves of bytes times halves of queries, written as sums that it can fuse."""
    h, half = keys.codes.shape[1], keys.codes.shape[-1]
    q = query.view(h, -1, 1, half, 2)
    low, high = halves(keys)
    u = (low * q[..., 0]).sum(-1) + (high * q[..., 1]).sum(-1)  # (H,G,S)
    u = u * keys.scale[0, :, None, :, 0] + keys.zero[0, :, None, :, 0] * query.view(h, -1, 1, 2 * half).sum(-1)
    share = u.softmax(-1)
    weighted = share * values.scale[0, :, None, :, 0]
    low, high = halves(values)
    sums = torch.stack(((low * weighted[..., None]).sum(2), (high * weighted[..., None]).sum(2)), -1).flatten(-2)
    return (sums + (share * values.zero[0, :, None, :, 0]).sum(-1, keepdim=True)).flatten(0, 1)


def halves(x: Codes) -> tuple[Tensor, Tensor]:
    return (x.codes[0, :, None] & 15).float(), (x.codes[0, :, None] >> 4).float()


@dataclass(frozen=True)
class Layouts:
    """What ``_weight_int4pack_mm_for_cpu`` reads, a head each: codes and their scales.

    It multiplies by transposed weights with one scale for each group of inputs. So values lie by dimension, not by
    slot, and the scales of slots move into the softmax shares.
    """

    keys: list[tuple[Tensor, Tensor]]
    values: list[tuple[Tensor, Tensor]]
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, keys: Codes, values: Codes) -> Layouts:
        ones = torch.ones(keys.codes.shape[2] // GROUP, values.width)
        k = [
            (packed_for_integers(code), scales(keys.scale[0, i], keys.zero[0, i]))
            for i, code in enumerate(numbers(keys))
        ]
        v = [(packed_for_integers(code.mT.contiguous()), scales(ones, 0 * ones)) for code in numbers(values)]
        return cls(k, v, values.scale[0, :, None, :, 0].float(), values.zero[0, :, None, :, 0].float())


def numbers(x: Codes) -> Tensor:
    """The codes themselves, (H,S,W) int32."""
    return x._replace(scale=torch.ones_like(x.scale), zero=None).expand(torch.float32)[0].int()


def packed_for_integers(code: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(code, 2)


def scales(scale: Tensor, zero: Tensor) -> Tensor:
    """Of groups: weight = scale · (code − 8) + zero. scale (N,1) of N vectors, or (K/group,N)."""
    both = torch.stack((scale.float(), zero.float() + 8 * scale.float()), -1)
    return (both.transpose(0, 1) if scale.shape[-1] == 1 else both).bfloat16().contiguous()


def integer_kernels(query: Tensor, x: Layouts) -> Tensor:
    h, product = len(x.keys), torch.ops.aten._weight_int4pack_mm_for_cpu
    q = query.view(h, -1, query.shape[-1]).bfloat16()
    u = torch.stack([product(q[i], code, q.shape[-1], scale) for i, (code, scale) in enumerate(x.keys)])
    share = u.float().softmax(-1)
    weighted = (share * x.scale).bfloat16()
    sums = torch.stack([product(weighted[i], code, GROUP, scale) for i, (code, scale) in enumerate(x.values)])
    return (sums.float() + (share * x.zero).sum(-1, keepdim=True)).flatten(0, 1)


def memory_floor() -> float:
    """Seconds for each byte that is read once from memory, the best of some."""
    x, best = torch.ones(1 << 27, dtype=torch.uint8).view(torch.int64), float("inf")
    for _ in range(8):
        started = time.thread_time()
        x.sum()
        best = min(best, time.thread_time() - started)
    return best / (x.numel() * 8)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{named}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
